"""Rounding a weight entry by entry so that the errors cancel under a metric.

`d(E) = tr(G E A E^T)` with unit lower factors `G = L_o D_o L_o^T` and `A = L_i D_i L_i^T` is the weighted norm of
`L_o^T E L_i`. Going from the last entry to the first, each target is moved by the errors already made, so that what
remains is the plain rounding error of that entry (P147 Model-Preserving Adaptive Rounding; one-sided: GPTQ, LDLQ).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

TILE = 96
PRICED = 1 << 20  # entries whose prices are looked up at a time
FREE_ROWS = 256  # rows of a tile where they do not feel one another

Tile = tuple[slice, slice]
Settler = Callable[..., None]  # of a tile's place, its targets, the two inner factors, and where to write


@dataclass(frozen=True)
class Prices:
    """What codes cost beside their error: `table` (classes, magnitudes) in squared steps, `classes` (rows, columns)."""

    table: Tensor
    classes: Tensor


@dataclass(frozen=True)
class Grid:
    """The values an entry may take: `scale * (code - zero)`, codes from `low` to `top`; scale and zero (rows, columns).

    With `prices` (for grids around zero) an entry takes the next code towards zero where that costs less in all.
    """

    scale: Tensor
    zero: Tensor
    top: float
    low: float = 0.0
    prices: Prices | None = None

    def codes(self, values: Tensor) -> Tensor:
        """The codes nearest to `values` (rows, columns), or the cheapest near to them."""
        exact = values / self.scale + self.zero
        codes = exact.round().clamp(self.low, self.top)
        if self.prices is not None:
            rows = max(1, PRICED // codes.shape[1])
            parts = zip(exact.split(rows), codes.split(rows), self.prices.classes.split(rows), strict=True)
            for near, part, classes in parts:
                part.copy_(_cheaper(near, part, self.prices.table, classes))
        return codes

    def nearest(self, values: Tensor) -> Tensor:
        """The grid's values at `codes(values)`."""
        return (self.codes(values) - self.zero) * self.scale

    @property
    def turned(self) -> Grid:
        prices = None if self.prices is None else Prices(self.prices.table, self.prices.classes.T)
        return Grid(self.scale.T, self.zero.T, self.top, self.low, prices)

    def settler(self, weight: Tensor) -> Settler:
        """The compiled loop that rounds a tile of `weight` to this grid; see `kernels.settle`."""
        from tersor.forms.kernels import settle

        scale, zero = (g.to(weight).contiguous() for g in (self.scale, self.zero))
        prices = self.prices or Prices(torch.zeros(1, 1), torch.zeros(1, 1, dtype=torch.uint8).expand(weight.shape))
        table = prices.table.to(weight).numpy()

        def tile(at: Tile, target: Tensor, *made: Tensor) -> None:
            values = [t.numpy() for t in (target, weight[at], scale[at], zero[at])]
            classes, others = prices.classes[at].numpy(), [t.numpy() for t in made]
            settle(*values, self.low, self.top, table, classes, *others)  # type: ignore[arg-type,call-arg]

        return tile


@dataclass(frozen=True)
class Levels:
    """The values of a table: `scale * level`, with rising `levels` (count,) and a scale for every entry."""

    scale: Tensor
    levels: Tensor

    @property
    def bounds(self) -> Tensor:
        """Halfway between neighbours (count - 1,); what lies on one is rounded down."""
        return (self.levels[1:] + self.levels[:-1]) / 2

    def codes(self, values: Tensor) -> Tensor:
        """The places in `levels` of those nearest to `values` (rows, columns)."""
        return torch.bucketize(values / self.scale, self.bounds)

    def nearest(self, values: Tensor) -> Tensor:
        """The values of the table at `codes(values)`."""
        return self.levels[self.codes(values)] * self.scale

    @property
    def turned(self) -> Levels:
        return Levels(self.scale.T, self.levels)

    def settler(self, weight: Tensor) -> Settler:
        """The compiled loop that rounds a tile of `weight` to these levels; see `kernels.settle_levels`."""
        from tersor.forms.kernels import settle_levels

        scale = self.scale.to(weight).contiguous()
        table = [t.to(weight).numpy() for t in (self.levels, self.bounds)]

        def tile(at: Tile, target: Tensor, *made: Tensor) -> None:
            values = [t.numpy() for t in (target, weight[at], scale[at])]
            settle_levels(*values, *table, *(t.numpy() for t in made))

        return tile


def _cheaper(exact: Tensor, codes: Tensor, table: Tensor, classes: Tensor) -> Tensor:
    """The codes, or the next towards zero where that costs less in all."""
    dearest, toward = table.shape[1] - 1, codes - codes.sign()

    def cost(codes: Tensor) -> Tensor:
        return (exact - codes).square() + table[classes.int(), codes.abs().clamp_max(dearest).int()]

    return torch.where((cost(toward) < cost(codes)) & (codes.abs() <= dearest), toward, codes)


def round_with_feedback(weight: Tensor, grid: Grid | Levels, rows: Tensor | None, columns: Tensor | None) -> Tensor:
    """Return the weight (rows, columns) rounded to the grid.

    `rows` (rows, rows) and `columns` (columns, columns) are the unit lower factors of the two moments, None for the
    identity: both None is rounding to the nearest, one of them one-sided feedback, both two-sided feedback.
    """
    if rows is None and columns is None:
        return grid.nearest(weight)
    if columns is None:
        return round_with_feedback(weight.T, grid.turned, None, rows).T.contiguous()
    return _by_tiles(weight, grid, rows, columns)


def _by_tiles(weight: Tensor, grid: Grid | Levels, lower_o: Tensor | None, lower_i: Tensor) -> Tensor:
    """Tiles from the last to the first; what lies outside of a tile enters its targets as matrix products.

    With `F = E L_i`, a target is its weight plus `L_o^T F` over the rows below and the columns after it, all settled
    already. The result equals the plain double loop but for the order of the sums.
    """
    weight = weight.cpu().contiguous()
    settle = grid.settler(weight)
    lower_i = lower_i.to(weight)
    lower_o = None if lower_o is None else lower_o.to(weight)
    rounded, error = torch.empty_like(weight), torch.zeros_like(weight)
    spread = error if lower_o is None else torch.zeros_like(weight)
    alone = torch.zeros(0, 0, dtype=weight.dtype)
    for o in spans(weight.shape[0], FREE_ROWS if lower_o is None else TILE):
        inner_o = alone if lower_o is None else lower_o[o, o].contiguous()
        below = None if lower_o is None else lower_o[o.stop :, o].T @ spread[o.stop :]
        for i in spans(weight.shape[1], TILE):
            inner_i = lower_i[i, i].contiguous()
            later = error[o, i.stop :] @ lower_i[i.stop :, i]
            target = weight[o, i] + (later if lower_o is None else inner_o.T @ later)
            if below is not None:
                target += below[:, i]
            at = (o, i)
            settle(at, target, inner_o, inner_i, rounded[at], error[at])
            if lower_o is not None:
                spread[at] = later + error[at] @ inner_i
    return rounded


def relative(values: Tensor) -> Tensor:
    """Importances over their mean."""
    return (values / values.mean().clamp_min(1e-300)).float()


def spans(length: int, tile: int) -> list[slice]:
    """Spans of at most `tile`, from the last to the first."""
    return [slice(max(0, stop - tile), stop) for stop in range(length, 0, -tile)]
