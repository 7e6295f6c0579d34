"""The lattice that a weight is rounded to: a step a row and a column, at which all entries do the same damage.

With unit lower factors of the two moments of a metric, two-sided feedback leaves an error that is a sum over entries of
`scale * d_o[i] d_i[j] eta[i, j]^2` (P147), so the step of an entry is `step / sqrt(2 scale d_o[i] d_i[j])`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tersor.coding import LARGEST, Coded, code_costs
from tersor.forms.rounding import Grid, Prices, round_with_feedback
from tersor.metrics import Metric

RESOLUTION = 4  # factors of steps to an octave
FARTHEST = 60 * RESOLUTION  # factors lie between 2^-60 and 2^60
Ints = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Lattice:
    """A weight in the order in which it is rounded, with the factors of its metric and the logarithms of unit steps.

    The order is that of a pivoted factorisation, which spreads the pivots most; it need not be stored.
    """

    weight: Tensor
    row_order: Tensor
    column_order: Tensor
    lower_rows: Tensor | None
    lower_columns: Tensor | None
    row_logs: Ints
    column_logs: Ints

    @classmethod
    def of(cls, weight: Tensor, metric: Metric) -> Lattice:
        """The lattice of `weight` (rows, columns) under a metric."""
        row_order, column_order = metric.rows.pivoted_order, metric.columns.pivoted_order
        (lower_rows, d_rows), (lower_columns, d_columns) = (
            side.permuted(order).unit_lower
            for side, order in ((metric.rows, row_order), (metric.columns, column_order))
        )
        logs = (_logs(d_rows * 2 * max(metric.scale, 1e-300)), _logs(d_columns))
        ordered = weight.detach().float().cpu()[row_order][:, column_order]
        return cls(ordered, row_order, column_order, lower_rows, lower_columns, *logs)

    def round(self, step: float, trade: float) -> Coded:
        """The codes at a step, rounded with feedback; steps that are too small for any code are taken larger."""
        rows, columns = self._sides(step)
        scale = _outer(rows, columns)
        exact = self.weight / scale
        beyond = float(exact.abs().max()) * 16 / LARGEST
        if beyond > 1:
            rows = rows + math.ceil(RESOLUTION * min(math.log2(beyond), 100) if math.isfinite(beyond) else 400)
            scale = _outer(rows, columns)
            exact = self.weight / scale
        prices = None
        if trade > 0:
            plain = exact.round().clamp(-LARGEST, LARGEST).int()
            bits, classes = code_costs(Coded(plain.numpy(), rows, columns, RESOLUTION))
            prices = Prices(trade * math.log(2) / 6 * torch.from_numpy(bits).float(), torch.from_numpy(classes))
        grid = Grid(scale, torch.zeros(()).expand(scale.shape), float(LARGEST), -float(LARGEST), prices)
        rounded = round_with_feedback(self.weight, grid, self.lower_rows, self.lower_columns)
        codes = (rounded / scale).round().int()
        back = self.row_order.argsort(), self.column_order.argsort()
        return Coded(codes[back[0]][:, back[1]].numpy(), rows[back[0].numpy()], columns[back[1].numpy()], RESOLUTION)

    def rates(self, steps_an_octave: int, lowest: float, highest: float) -> Iterator[tuple[int, float]]:
        """(rung, bits an entry) of the steps 2^(rung / steps_an_octave), falling, whose rate lies within the bounds.

        The rate is that of independent Gaussians of the weight's mean square.
        """
        scale = _outer(*self._sides(1.0)).double().reshape(-1)
        squares = (self.weight.double().square().mean() + 1e-60) / scale[:: max(1, len(scale) // 65536)].square()
        rung = math.ceil(steps_an_octave * math.log2(12 * float(squares.max())) / 2) + 1
        for down in range(rung, rung - 200 * steps_an_octave, -1):
            rate = float((1 + 12 * squares / 4 ** (down / steps_an_octave)).log2().mean() / 2)
            if rate > highest:
                return
            if rate >= lowest:
                yield down, rate

    def _sides(self, step: float) -> tuple[Ints, Ints]:
        """The logarithms of the factors of rows and columns at a step, as integers."""
        rows = np.rint(self.row_logs + RESOLUTION * math.log2(step))
        return tuple(np.clip(logs, -FARTHEST, FARTHEST).astype(int) for logs in (rows, np.rint(self.column_logs)))  # type: ignore[return-value]


def _outer(rows: Ints, columns: Ints) -> Tensor:
    """The steps of all entries (rows, columns), from the logarithms of their factors."""
    factors = (torch.from_numpy(np.exp2(side / RESOLUTION).astype(np.float32)) for side in (rows, columns))
    return torch.outer(*factors)


def _logs(pivots: Tensor) -> Ints:
    """Logarithms of the steps of one side at step 1, in units of 1 / RESOLUTION."""
    logs: Ints = np.log2(pivots.double().clamp_min(1e-300).cpu().numpy())
    return -RESOLUTION / 2 * logs
