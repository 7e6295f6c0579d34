"""Codes on a fixed support improved after rounding: one entry after the other, and the scales of all rows at once.

Feedback while rounding counts on all later entries to take up an error, but absent ones cannot. What is left to gain is
found by descent on the distance itself, which never goes up.
"""

from __future__ import annotations

from torch import Tensor

from tersor.forms.base import bits_of, from_bits
from tersor.forms.conjugate import conjugate_gradients
from tersor.forms.rounding import FREE_ROWS, TILE, spans
from tersor.metrics import Metric

ROUNDS, STEPS = 2, 4  # of scales and codes in turn; of conjugate gradients


def recoded(weight: Tensor, codes: Tensor, support: Tensor, scale: Tensor, metric: Metric) -> tuple[Tensor, Tensor]:
    """Codes `Q` (rows, columns) and scales `s` (rows,) with less of `d(W - diag(s) Q)`.

    With `F = R (W - diag(s) Q) C` a code is best moved by `F_ij / (R_ii C_jj s_i)`, rounded, and scales are best where
    the rows of `F o Q` sum to zero. Codes move by whole numbers, on the support, none beyond the largest that is given.
    """

    def felt(error: Tensor) -> Tensor:
        return metric.rows.apply(metric.columns.felt(error))

    most = float(codes.abs().max())
    for _ in range(ROUNDS):
        curvature = metric.rows.diagonal * (metric.columns.felt(codes) * codes).sum(1)
        found = conjugate_gradients(
            scale,
            (felt(weight - scale[:, None] * codes) * codes).sum(1),
            lambda s, codes=codes: (felt(s[:, None] * codes) * codes).sum(1),  # type: ignore[misc]
            STEPS,
            curvature.clamp_min(1e-9 * float(curvature.mean()) + 1e-30),
        )
        scale = from_bits(bits_of(found.clamp(0.5 * scale, 2 * scale).clamp_min(6e-8)))
        codes = _moved(weight, codes, support, scale, most, metric)
    return codes, scale


def _moved(weight: Tensor, codes: Tensor, support: Tensor, scale: Tensor, most: float, metric: Metric) -> Tensor:
    """Every entry in turn at its best code, given all others."""
    from tersor.forms.kernels import move_codes

    weight, codes, support, scale = weight.cpu(), codes.cpu().clone(), support.cpu(), scale.cpu()
    rows, columns = (side.moment.to(weight) for side in (metric.rows, metric.columns))
    columns = columns.diag() if metric.columns.is_diagonal else columns
    across = metric.columns.felt(weight - scale[:, None] * codes)
    none = weight.new_zeros(0, 0)
    for o in spans(len(weight), FREE_ROWS if metric.rows.is_diagonal else TILE):
        inner = none if metric.rows.is_diagonal else rows[o, o].contiguous()
        felt = across[o] if metric.rows.is_diagonal else rows[o] @ across
        parts = (t.contiguous().numpy() for t in (felt, support[o], scale[o], inner, columns, codes[o]))
        move_codes(*parts, most)  # type: ignore[call-arg,arg-type]
        across[o] = metric.columns.felt(weight[o] - scale[o, None] * codes[o])
    return codes
