"""Rounding a weight entry by entry so that the errors cancel under a metric.

`d(E) = tr(G E A E^T)` with unit lower factors `G = L_o D_o L_o^T` and `A = L_i D_i L_i^T` is the weighted norm of
`L_o^T E L_i`. Going from the last entry to the first, each target is moved by the errors already made, so that what
remains is the plain rounding error of that entry (P147 Model-Preserving Adaptive Rounding; one-sided: GPTQ, LDLQ).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# A quantiser maps targets and the grids of their entries (each grid tensor shaped like the targets) to values.
Quantiser = Callable[..., Tensor]
TILE = 32


def round_with_feedback(
    weight: Tensor, quantise: Quantiser, grids: list[Tensor], rows: Tensor | None, columns: Tensor | None
) -> Tensor:
    """Return the rounded weights (batch, rows, columns), each entry on the grid that `quantise` and `grids` give it.

    `rows` (rows, rows) and `columns` (columns, columns) are the unit lower factors of the two moments, None for the
    identity: both None is rounding to the nearest, one of them one-sided feedback, both two-sided feedback. The batch
    holds several settings for one weight: they share the factors, and small steps cost less together.
    """
    if rows is None and columns is None:
        return quantise(weight, *grids)
    if rows is None:
        assert columns is not None
        return _one_sided(weight, quantise, grids, columns.to(weight))
    if columns is None:
        turned = [g.transpose(1, 2) for g in (weight, *grids)]
        return _one_sided(turned[0], quantise, turned[1:], rows.to(weight)).transpose(1, 2).contiguous()
    return _two_sided(weight, quantise, grids, rows.to(weight), columns.to(weight))


def _one_sided(weight: Tensor, quantise: Quantiser, grids: list[Tensor], lower: Tensor, block: int = 64) -> Tensor:
    """Columns from last to first; a block of columns is settled alone, what came before it enters as one product."""
    rounded, error = torch.empty_like(weight), torch.zeros_like(weight)
    for stop in range(weight.shape[2], 0, -block):
        start = max(0, stop - block)
        target = weight[..., start:stop] + error[..., stop:] @ lower[stop:, start:stop]
        inner = lower[start:stop, start:stop]
        for j in range(stop - start - 1, -1, -1):
            column = start + j
            rounded[..., column] = quantise(target[..., j], *(g[..., column] for g in grids))
            error[..., column] = weight[..., column] - rounded[..., column]
            target[..., :j] += error[..., column, None] * inner[j, :j]
    return rounded


def _two_sided(weight: Tensor, quantise: Quantiser, grids: list[Tensor], lower_o: Tensor, lower_i: Tensor) -> Tensor:
    """Tiles along anti-diagonals, all tiles of one anti-diagonal together, and so again inside the tiles.

    With `F = E L_i`, the target of a tile is its weight plus `L_o^T F` over the rows below it and the columns after
    it, both already settled; inside the tile each anti-diagonal of entries is rounded at once and its errors spread
    by one rank-n update. The result equals the plain double loop but for the order of the sums.
    """
    n_rows, n_columns = weight.shape[1:]
    tile = min(TILE, max(n_rows, n_columns))
    pad_o, pad_i = -n_rows % tile, -n_columns % tile
    padding = (0, pad_i, 0, pad_o)
    padded = torch.nn.functional.pad(weight, padding)
    grids = [torch.nn.functional.pad(g, padding, value=1.0) for g in grids]
    lower_o, lower_i = _padded_unit(lower_o, pad_o), _padded_unit(lower_i, pad_i)
    real = torch.nn.functional.pad(torch.ones_like(weight), padding)
    rounded, error = torch.zeros_like(padded), torch.zeros_like(padded)
    spread = torch.zeros_like(padded)  # F = E L_i, filled as tiles are settled
    tiles_o, tiles_i = padded.shape[1] // tile, padded.shape[2] // tile
    for diagonal in range(tiles_o + tiles_i - 2, -1, -1):
        members = range(max(0, diagonal - tiles_i + 1), min(tiles_o, diagonal + 1))
        spans = [(_span(i, tile), _span(diagonal - i, tile)) for i in members]
        carried = [error[:, o, i.stop :] @ lower_i[i.stop :, i] for o, i in spans]
        targets = [
            padded[:, o, i] + lower_o[o, o].T @ later + lower_o[o.stop :, o].T @ spread[:, o.stop :, i]
            for (o, i), later in zip(spans, carried, strict=True)
        ]
        stacked = [torch.stack([t[:, o, i] for o, i in spans]) for t in (padded, real, *grids)]
        inner_o = torch.stack([lower_o[o, o] for o, _ in spans])[:, None]
        inner_i = torch.stack([lower_i[i, i] for _, i in spans])[:, None]
        values, errors = _settle_tiles(torch.stack(targets), stacked, quantise, inner_o, inner_i)
        products = errors @ inner_i
        for k, (o, i) in enumerate(spans):
            rounded[:, o, i], error[:, o, i] = values[k], errors[k]
            spread[:, o, i] = carried[k] + products[k]
    return rounded[:, :n_rows, :n_columns].contiguous()


def _settle_tiles(
    target: Tensor, stacked: list[Tensor], quantise: Quantiser, lower_o: Tensor, lower_i: Tensor
) -> tuple[Tensor, Tensor]:
    """Round tiles (tiles, batch, b, b) with the errors made inside each fed back; padding entries make no error."""
    weight, real, *grids = stacked
    size = target.shape[-1]
    values, errors = torch.zeros_like(target), torch.zeros_like(target)
    for diagonal in range(2 * size - 2, -1, -1):
        i = torch.arange(max(0, diagonal - size + 1), min(size, diagonal + 1), device=target.device)
        j = diagonal - i
        chosen = quantise(target[..., i, j], *(g[..., i, j] for g in grids))
        error = (weight[..., i, j] - chosen) * real[..., i, j]
        values[..., i, j], errors[..., i, j] = chosen, error
        target += (lower_o[..., i, :].transpose(-1, -2) * error[..., None, :]) @ lower_i[..., j, :]
    return values, errors


def _span(index: int, tile: int) -> slice:
    return slice(index * tile, (index + 1) * tile)


def _padded_unit(lower: Tensor, pad: int) -> Tensor:
    """A unit lower factor continued by the identity."""
    if not pad:
        return lower
    lower = torch.nn.functional.pad(lower, (0, pad, 0, pad))
    lower.diagonal()[-pad:] = 1.0
    return lower
