"""A closed-form refit of the steps of a coded matrix: row factors, then column factors, that fit its codes best.

With `K` the matrix without its row factors, the row factors `r` that lessen `tr(R (W - diag(r) K) C (...)^T)` solve
`(R o (K C K^T)) r = diag(R W C K^T)`; column factors likewise, transposed. Factors are rounded to 16-bit floats.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from tersor.coding import Coded, encode
from tersor.coding.stream import _encode_side
from tersor.metrics import Metric, Side


def refitted(weight: Tensor, metric: Metric, coded: Coded, factor_bits: int) -> tuple[Tensor, int]:
    """The matrix (rows, columns) after the refit, and the bytes by which factors of `factor_bits` enlarge its stream.

    The factors stand in the place of the logarithms of the steps, from which the classes of the codes are made anew;
    with 0 bits nothing is counted.
    """
    codes = torch.from_numpy(coded.codes).double()
    rows, columns = (torch.from_numpy(np.exp2(side / coded.resolution)) for side in (coded.rows, coded.columns))
    rows = _factors(weight.double(), codes * columns, metric.rows, metric.columns, rows)
    columns = _factors(weight.double().T, (rows[:, None] * codes).T, metric.columns, metric.rows, columns)
    common = columns.square().mean().sqrt()  # so that both sides lie well within the reach of 16 bits
    rows, columns = (rows * common).half().double(), (columns / common).half().double()
    matrix = (rows[:, None] * codes * columns).float()
    if not factor_bits:
        return matrix, 0
    row_logs, column_logs = (_logs(side, coded.resolution) for side in (rows, columns))
    again = Coded(coded.codes, row_logs, column_logs, coded.resolution)
    sides = sum(len(_encode_side(side)) for side in (row_logs, column_logs))
    factors = factor_bits * sum(coded.codes.shape) // 8
    return matrix, len(encode(again)) - sides + factors - len(encode(coded))


def _factors(weight: Tensor, plain: Tensor, rows: Side, columns: Side, usual: Tensor) -> Tensor:
    """The factors (rows,) of the rows of `plain`; a row of zeros keeps its `usual` one."""
    right = columns.apply(plain.T)  # C K^T
    known = plain.abs().sum(1) > 0
    moment = rows.moment.double()
    moment = torch.diag(moment) if rows.is_diagonal else moment
    system = (moment * (plain @ right))[known][:, known]
    wanted = (rows.apply(weight) * right.T).sum(1)[known]
    out = usual.clone()
    out[known] = torch.linalg.solve(system, wanted)
    return out


def _logs(factors: Tensor, resolution: int) -> np.ndarray:
    """Logarithms of factors in units of 1 / `resolution`, to the nearest; signs are those of the factors themselves."""
    return (resolution * factors.abs().clamp_min(1e-12).log2()).round().to(torch.int64).numpy()
