"""Coding a weight by a trellis: its rotated frame, how many bits every row and column asks for, and the walk itself.

Rounding with feedback makes targets larger than the weight. So quick walks come first, in which every entry is rounded
to a lattice that leaves what its bits would: they show how large targets get, and what the error will be.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tersor.coding.trellis import MOST_BITS, REMAINS, WINDOW, Side, Trellis, fine_rates, rates_of, values
from tersor.forms.rotation import rotatable, rotate, turned_back
from tersor.forms.rounding import Grid, round_with_feedback
from tersor.forms.trellis_read import LEVELS, shrink, sides_of
from tersor.metrics import Felt, Metric
from tersor.metrics import Side as MetricSide

WALKS = 3  # quick ones, after which targets hardly change; one less where they begin from those of other bits
DAMPED = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0)  # shares of the mean diagonal
OVERLOADED = 4.0  # times the error of a quick walk, from which on a search is repeated under a more damped metric
RATES_DEEP, SCALES_DEEP = 8.0, 10.0  # octaves below the largest at which logarithms end
ROUNDS = 4  # of fitting the scales of rows and columns to each other
FREE = 4096  # rows from which on they are kept apart where they may be: where they begin takes memory too
LARGEST, NEVER = 2.0**30, 1e30  # a code of a quick walk, and the step of an entry that has no bits
SPARE = 2  # bytes that may be read behind the last bit
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Frame:
    """A weight as it is coded, rotated or not, with the factors of its metric there."""

    weight: Array
    metric: Metric
    counts: Array  # for how many rows each stands
    rotated: tuple[bool, bool]
    turned: tuple[Array, Array]  # the transposed unit lower factors, empty where they are the identity
    pivots: tuple[Array, Array]

    @property
    def free_rows(self) -> bool:
        return frees_rows(self.metric)

    @classmethod
    def of(cls, weight: Tensor, metric: Metric, turn: bool, counts: Array) -> Frame:
        matrix = weight.detach().float().cpu()
        sides, rotated = [metric.rows, metric.columns], [False, False]
        for k in range(2):
            if turn and not sides[k].is_diagonal and rotatable(sides[k].size):
                matrix = rotate(matrix) if k else rotate(matrix.T).T
                moment = sides[k].moment.double().cpu()
                sides[k], rotated[k] = MetricSide(rotate(rotate(moment).T)), True
        turned, pivots = [], []
        for side in sides:
            lower, pivot = side.unit_lower
            turned.append(np.zeros((0, 0), np.float32) if lower is None else _transposed(lower))
            pivots.append(pivot.cpu().numpy())
        judged = Metric(metric.kind, sides[0], sides[1], metric.scale)
        matrix = matrix.contiguous()
        return cls(matrix.numpy(), judged, counts, tuple(rotated), tuple(turned), tuple(pivots))  # type: ignore[arg-type]

    def walk(self, targets: Array, bits: float) -> _Coding:
        """The search itself; `targets` say how large what is rounded will be."""
        from tersor.forms import trellis_kernels as kernels

        room = bits if (self.counts == 1).all() else MOST_BITS  # rows that stand for themselves may take more than most
        code = np.zeros(code_bytes(self.weight.shape, room) + SPARE, np.uint8)
        trellis = self._sized(targets, bits, code[:-SPARE])
        error = np.zeros_like(self.weight)
        made = (sides_of(trellis), shrink(), values(), error, code)
        turned_i = self.turned[1]
        if self.free_rows:
            order = np.argsort(trellis.row_rates.codes, kind="stable")
            kernels.walk_columns(self.weight, turned_i, turned_i.size > 0, order, *made)
        else:
            turned_o, turned_i = (
                turned if turned.size else np.eye(size, dtype=np.float32)
                for turned, size in zip(self.turned, self.weight.shape, strict=True)
            )
            kernels.walk_diagonals(self.weight, turned_o, turned_i, *made)
        return _Coding(error, trellis)

    def quick_walk(self, targets: Array, bits: float) -> tuple[Array, Array]:
        """Targets and errors (rows, columns) where every entry is rounded to a lattice that leaves what its bits would.

        With `L` the unit lower factors the targets are those of the search too, `W - E + L_o^T E L_i`.
        """
        row_rates, fine, *scales = sides_of(self._sized(targets, bits, np.zeros(0, np.uint8)))
        rates = torch.from_numpy(rates_of(row_rates, fine))
        leaves = torch.tensor([math.sqrt(12 * share) for share in REMAINS])
        scale = torch.outer(*map(torch.from_numpy, scales)) * leaves[rates.long()]
        scale[(rates == 0) | (scale == 0)] = NEVER
        weight = torch.from_numpy(self.weight)
        lower_o, lower_i = (torch.from_numpy(t).T if t.size else None for t in self.turned)
        grid = Grid(scale, torch.zeros(()).expand(scale.shape), LARGEST, -LARGEST)
        rounded = round_with_feedback(weight, grid, lower_o, lower_i)
        error = weight - rounded
        felt = error if lower_i is None else error @ lower_i
        felt = felt if lower_o is None else lower_o.T @ felt
        return (rounded + felt).numpy(), error.numpy()

    def _sized(self, targets: Array, bits: float, code: Array) -> Trellis:
        """The rates and scales of rows and columns for targets of this size, with a code that may be written yet."""
        shape = (self.weight.shape[0], self.weight.shape[1])
        scales = _scales(targets, self.counts)
        rates = [0.5 * np.log2(np.maximum(p * s * s, 1e-300)) for p, s in zip(self.pivots, scales, strict=True)]
        row_scales, column_scales = (Side.of(np.log2(s), SCALES_DEEP) for s in scales)
        row_rates, column_rates = (Side.of(r, RATES_DEEP) for r in rates)
        total = int(bits * self.counts.sum() * shape[1]) if self.weight.any() else 0
        column_rates = _levelled(row_rates, column_rates, self.counts, total)
        return Trellis(shape, self.free_rows, self.rotated, row_rates, column_rates, row_scales, column_scales, code)

    def turned_back(self, matrix: Array) -> Tensor:
        """A matrix as it is coded, in the order and basis of the weight."""
        return turned_back(torch.from_numpy(matrix), *self.rotated)


@dataclass(frozen=True)
class _Coding:
    """What coding a weight gave: the error, and the code."""

    error: Array
    trellis: Trellis


class Coder:
    """A weight at any number of bits, each time in the frame of the damping that is best there.

    Feedback moves the error to where the metric is small; with few bits it pays to do less of that. Also states have a
    largest value, and a target beyond it may set off others: where a search leaves much more than a quick walk says,
    more damping is tried. Where a weight is a sample of rows, `counts` (rows,) says for how many each stands.
    """

    def __init__(
        self, weight: Tensor, metric: Metric, turn: bool, enlarge: bool = True, counts: Tensor | None = None
    ) -> None:
        self.weight, self.metric, self.turn, self.enlarge = weight, metric, turn, enlarge
        self.counts = np.ones(len(weight)) if counts is None else counts.double().numpy()
        self._frames: dict[float, Frame] = {}
        self._targets: dict[float, Array] = {}
        self._expected: dict[float, tuple[float, float]] = {}  # by bits

    def expected(self, bits: float) -> tuple[float, float]:
        """The divergence of a quick walk at `bits` an entry, and the damping that is best for it.

        The fewer bits, the more damping: what was best for more of them is where to begin.
        """
        if bits not in self._expected:
            more = min((known for known in self._expected if known > bits), default=None)
            best = (math.inf, 0.0)
            for damping in DAMPED if more is None else DAMPED[DAMPED.index(self._expected[more][1]) :]:
                found = self._quick(bits, damping)
                if found >= best[0]:
                    break
                best = (found, damping)
            self._expected[bits] = best
        return self._expected[bits]

    def coded(self, bits: float) -> tuple[float, Trellis]:
        """The divergence and the code at `bits` an entry."""
        expected, damping = self.expected(bits)
        kept: tuple[float, Trellis] | None = None
        for more in DAMPED[DAMPED.index(damping) :]:
            if kept is not None:
                expected = self._quick(bits, more)
            frame = self._frames[more]
            full = frame.walk(self._targets[more], bits)
            found, trellis = self._enlarged(frame.turned_back(full.error), full.trellis)
            if kept is None or found < kept[0]:
                kept = (found, trellis)
            if kept[0] <= OVERLOADED * expected:
                break
        assert kept is not None
        return kept

    def _enlarged(self, error: Tensor, trellis: Trellis) -> tuple[float, Trellis]:
        """The divergence of a code and the code, which is to lose nothing of the weight in its own direction."""
        if not self.enlarge:
            return self.metric.distance(error), trellis
        fitted = self._felt.weight - error
        larger = trellis.enlarged_by(self._felt.kept(fitted).factor())
        return self.metric.distance(error - (larger.factor - 1) * fitted), larger

    @cached_property
    def _felt(self) -> Felt:
        return self.metric.felt_by(self.weight.detach().float().cpu())

    def _quick(self, bits: float, damping: float) -> float:
        """The divergence of a quick walk; what it shows of targets is where the next one begins."""
        walks = WALKS - 1
        if damping not in self._frames:
            walks = WALKS
            amounts = (0.0 if side.is_diagonal else damping for side in (self.metric.rows, self.metric.columns))
            frame = self._frames[damping] = Frame.of(self.weight, self.metric.damped(*amounts), self.turn, self.counts)
            self._targets[damping] = frame.weight
        frame = self._frames[damping]
        for _ in range(walks):
            self._targets[damping], error = frame.quick_walk(self._targets[damping], bits)
        return self.metric.distance(frame.turned_back(error))


def frees_rows(metric: Metric) -> bool:
    """Whether rows are coded so that they can be read alone: those of a table, which do not feel one another."""
    return metric.rows.is_diagonal and metric.rows.size >= FREE


def code_bytes(shape: tuple[int, int], bits: float) -> int:
    """Bytes for the first state and `bits` an entry."""
    return -(-(WINDOW + int(bits * shape[0] * shape[1])) // 8)


def _transposed(lower: Tensor) -> Array:
    return np.ascontiguousarray(lower.cpu().numpy().T, dtype=np.float32)


def _scales(targets: Array, counts: Array) -> tuple[Array, Array]:
    """Factors of rows and columns whose product is the size of the targets, in the mean of squares."""
    squares = targets.astype(np.float64) ** 2 + 1e-60
    rows, columns = np.ones(len(squares)), np.ones(squares.shape[1])
    for _ in range(ROUNDS):
        rows = squares @ (1 / columns) / len(columns)
        columns = (counts / rows) @ squares / counts.sum()
    return np.sqrt(rows), np.sqrt(columns)


def _levelled(rows: Side, columns: Side, counts: Array, total: int) -> Side:
    """The rates of the columns, all moved alike so that the entries take as many bits as `total` allows."""
    alike = np.bincount(rows.codes, counts, minlength=LEVELS)
    known = alike.nonzero()[0]
    of_rows = rows.base + rows.step * known

    def taken(base: int) -> float:
        fine = fine_rates(base + columns.step * columns.codes.astype(np.int32))
        return float(alike[known] @ rates_of(of_rows, fine).sum(1, dtype=np.int64))

    low, high = -(1 << 15), (1 << 15) - 1
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if taken(middle) <= total else (low, middle - 1)
    return Side(low, columns.step, columns.codes)
