"""Reading a trellis-coded matrix where it lies in memory: whole, or row by row where rows are free.

On a CPU compiled loops read it, elsewhere tensor operations, with the same result.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tersor.coding.trellis import (
    HEADER,
    MOST_BITS,
    REMAINS,
    SIDE_BITS,
    UNIT,
    WINDOW,
    Trellis,
    rates_of,
    side_bytes,
    spread,
    values,
)

LEVELS = 1 << SIDE_BITS
BLOCK = 1 << 20  # entries that are read at a time by tensor operations
Array = np.ndarray[Any, Any]


def sides_of(trellis: Trellis) -> tuple[Array, Array, Array, Array]:
    """The rates of rows (1/64 bits) and columns (1/4096 bits), int32, and the scales of both, float32."""
    scales = (scales_of(side.values) for side in (trellis.row_scales, trellis.column_scales))
    return (trellis.row_rates.values, trellis.fine_columns, *scales)  # type: ignore[return-value]


def scales_of(logs: Array) -> Array:
    """2^(logs / 64) in float32, made so that every way of reading has the same bits."""
    found: Array = np.ldexp(fractions()[logs % UNIT], logs // UNIT)
    return found


@cache
def fractions() -> Array:
    """2^(k / 64) for k from 0 to 63, float32."""
    found: Array = np.exp2(np.arange(UNIT) / UNIT).astype(np.float32)
    return found


@cache
def shrink() -> Array:
    """What values are multiplied by at every rate (7,): the best code of a Gaussian has less variance than it."""
    found: Array = np.sqrt(1 - np.asarray(REMAINS)).astype(np.float32)
    return found


def reader_bytes(shape: tuple[int, int], stored: int, free_rows: bool) -> int:
    """Bytes in memory of a reader, beside a stream of `stored` bytes."""
    return shape[1] * LEVELS * _bit_type(stored).itemsize + 4 * shape[0] if free_rows else 0


def parsed(stream: Tensor, shape: tuple[int, int]) -> Trellis:
    """The trellis of a stream; raises TersorError where it is damaged."""
    return Trellis.from_bytes(stream.numpy().tobytes(), shape)


class Reader:
    """A stream ready to be read: its header, and where the rows of a level begin if they are free.

    Sides are expanded when they are read: they are small beside the matrix, but not beside its bits.
    """

    def __init__(self, trellis: Trellis, stream: Tensor) -> None:
        """`trellis` is what `stream` holds."""
        self.shape, self.free_rows, self.rotated = trellis.shape, trellis.free_rows, trellis.rotated
        self.stream, self.factors = stream, shrink() * np.float32(trellis.factor)
        sides = (trellis.row_rates, trellis.column_rates, trellis.row_scales, trellis.column_scales)
        self.numbers = np.array([(side.base, side.step) for side in sides], np.int64)
        if trellis.free_rows:
            begins, rank = _begins_and_rank(trellis, _bit_type(len(stream)))
        else:
            begins, rank = np.zeros((0, 0), np.int32), np.zeros(0, np.int32)
        self.begins, self.rank = (torch.from_numpy(a).to(stream.device) for a in (begins, rank))

    def rows(self, index: Tensor | None = None) -> Tensor:
        """The matrix as it was coded, or its rows at `index` (n,) where rows are free, in float32."""
        if self.stream.device.type != "cpu":
            return self._with_tensors(index)
        from tersor.forms import trellis_kernels as kernels

        count = self.shape[0] if index is None else len(index)
        out = np.empty((count, self.shape[1]), np.float32)
        fixed = (self.stream.numpy(), self.numbers, fractions(), self.factors, values(), out)
        if self.free_rows:
            chosen = np.arange(count) if index is None else index.numpy()
            kernels.read_rows(chosen, self.rank.numpy(), self.begins.numpy(), *fixed)
        else:
            kernels.read_diagonals(*fixed)
        return torch.from_numpy(out)

    def _with_tensors(self, index: Tensor | None) -> Tensor:
        """The same by tensor operations, on any device."""
        made = _Tensors.of(self.stream, self.shape, self.numbers, self.factors)
        if not self.free_rows:
            return made.diagonals()
        rows, columns = self.shape
        device = self.stream.device
        chosen = torch.arange(rows, device=device) if index is None else index.long()
        parts = []
        for part in chosen.split(max(1, BLOCK // columns)):
            rates = made.rates(part[:, None], made.every_column)
            begins = self.begins[made.row_codes[part]].long()
            states = made.states(begins + (self.rank[part].long()[:, None] + 1) * rates)
            parts.append(made.values(part[:, None], made.every_column, rates, states))
        return torch.cat(parts) if parts else torch.zeros(0, columns, device=device)


@dataclass(frozen=True)
class _Tensors:
    """The bits and the sides of a trellis on the device on which they are read."""

    bits: Tensor
    row_codes: Tensor
    row_rates: Tensor
    fine_columns: Tensor
    row_scales: Tensor
    column_scales: Tensor
    factors: Tensor  # of values at every rate

    @classmethod
    def of(cls, stream: Tensor, shape: tuple[int, int], numbers: Array, factors: Array) -> _Tensors:
        at, codes = HEADER.size, []
        for size in shape * 2:
            packed = stream[at : at + side_bytes(size)]
            bits = (packed[:, None] >> torch.arange(7, -1, -1, device=stream.device)) & 1
            bits = bits.reshape(-1)[: size * SIDE_BITS].reshape(size, SIDE_BITS)
            codes.append((bits.long() << torch.arange(SIDE_BITS - 1, -1, -1, device=stream.device)).sum(1))
            at += side_bytes(size)
        logs = [base + step * side for (base, step), side in zip(numbers.tolist(), codes, strict=True)]
        fine = torch.from_numpy(spread(shape[1])).to(stream.device) + logs[1] * UNIT
        known = torch.from_numpy(fractions()).to(stream.device)
        rows, columns = (torch.ldexp(known[side % UNIT], side.div(UNIT, rounding_mode="floor")) for side in logs[2:])
        return cls(stream[at:], codes[0], logs[0], fine, rows, columns, torch.from_numpy(factors).to(stream.device))

    @property
    def every_column(self) -> Tensor:
        return torch.arange(len(self.fine_columns), device=self.bits.device)[None]

    def diagonals(self) -> Tensor:
        rows, columns = len(self.row_rates), len(self.fine_columns)
        every_row = torch.arange(rows, device=self.bits.device)[None]
        blocks = torch.arange(rows + columns - 2, -1, -1, device=self.bits.device).split(max(1, BLOCK // rows))
        out, at = torch.zeros(rows, columns, device=self.bits.device), WINDOW
        for diagonals in blocks:
            column = diagonals[:, None] - every_row
            inside = (column >= 0) & (column < columns)
            column = column.clamp(0, columns - 1)
            rates = self.rates(every_row, column) * inside
            so_far, taken = rates.cumsum(1), rates.sum(1, keepdim=True)
            end = at + taken.cumsum(0)
            states = self.states(end - taken + so_far)
            ring = (taken >= WINDOW) & (inside.sum(1, keepdim=True) > 1) & (so_far < WINDOW)
            behind = self.states(end) << so_far.clamp_max(WINDOW)
            new = states & ((1 << so_far.clamp_max(WINDOW)) - 1)
            states = torch.where(ring, (behind | new) & ((1 << WINDOW) - 1), states)
            found = self.values(every_row, column, rates, states) * inside
            out.index_put_((every_row.expand_as(column), column), found, accumulate=True)
            at = end[-1]
        return out

    def rates(self, row: Tensor, column: Tensor) -> Tensor:
        total = self.row_rates[row].long() * UNIT + self.fine_columns[column] + UNIT * UNIT // 2
        return (total >> 12).clamp(0, MOST_BITS)

    def states(self, ends: Tensor) -> Tensor:
        begin = ends - WINDOW
        byte = begin >> 3
        word = sum((self.bits[byte + k].long() << (16 - 8 * k) for k in range(3)), torch.zeros_like(begin))
        return (word >> (24 - WINDOW - (begin & 7))) & ((1 << WINDOW) - 1)

    def values(self, row: Tensor, column: Tensor, rates: Tensor, states: Tensor) -> Tensor:
        table = torch.from_numpy(values()).to(self.bits.device)
        return table[states] * (self.row_scales[row] * self.column_scales[column] * self.factors[rates])


def _bit_type(stored: int) -> np.dtype[Any]:
    """What the number of a bit in a stream fits into."""
    return np.dtype(np.int32 if 8 * stored < 1 << 31 else np.int64)


def _begins_and_rank(trellis: Trellis, bit_type: np.dtype[Any]) -> tuple[Array, Array]:
    """Where the rows of a level begin in every column (levels, columns), and the rank of rows in their level."""
    side = trellis.row_rates
    counts = np.bincount(side.codes, minlength=LEVELS)
    rates = rates_of(side.base + side.step * np.arange(LEVELS), trellis.fine_columns).astype(np.int64)
    taken = counts[:, None] * rates
    of_columns = taken.sum(0)
    columns_after = np.concatenate([np.cumsum(of_columns[::-1])[::-1][1:], [0]])
    begins = WINDOW + columns_after + np.cumsum(taken, 0) - taken
    order = np.argsort(side.codes, kind="stable")
    rank = np.empty(len(order), np.int32)
    rank[order] = np.arange(len(order)) - (np.cumsum(counts) - counts)[side.codes[order]]
    return begins.astype(bit_type), rank
