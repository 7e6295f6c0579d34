"""A coded matrix as it lies in memory: integers of a few bits, the few that do not fit beside them, and the steps.

Made from a stream when it is decoded; rows can be expanded alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tersor.coding import Coded, decode
from tersor.forms.base import Array, Shape
from tersor.forms.packing import Arrays, in_reach, pack, packed_width, unpack

PACKED_BITS = (2, 3, 4, 5, 6, 8)
ALL = np.empty(0, np.int64)  # stands for the rows of a whole matrix


@dataclass(frozen=True)
class Packed:
    """Codes (rows, bytes) of `bits` bits above the lowest; those beyond are escapes, at sorted positions."""

    shape: Shape
    bits: int
    codes: Tensor
    positions: Tensor
    escapes: Tensor
    row_logs: Tensor
    column_logs: Tensor
    resolution: int

    @classmethod
    def of(cls, coded: Coded) -> Packed:
        """In the number of bits that takes the fewest bytes."""
        shape = (coded.codes.shape[0], coded.codes.shape[1])
        bits = min(PACKED_BITS, key=lambda bits: _packed_bytes(coded.codes, bits))
        codes = torch.from_numpy(coded.codes)
        half = 1 << (bits - 1)
        outside = (codes < -half) | (codes >= half)
        positions = outside.reshape(-1).nonzero().reshape(-1).to(_position_type(codes.numel()))
        rows, columns = (torch.from_numpy(side.astype(np.int16)) for side in (coded.rows, coded.columns))
        escapes = codes[outside].to(_escape_type(coded.codes))
        small = codes.clamp(-half, half - 1) + half
        return cls(shape, bits, pack(small, bits), positions, escapes, rows, columns, coded.resolution)

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self._tensors.values())

    @cached_property
    def _tensors(self) -> dict[str, Tensor]:
        return {k: v for k, v in self.__dict__.items() if isinstance(v, Tensor)}

    def to(self, device: torch.device) -> Packed:
        moved: dict[str, Any] = {name: tensor.to(device) for name, tensor in self._tensors.items()}
        return replace(self, **moved)

    def rows(self, index: Tensor | None) -> Tensor:
        """The matrix, or its rows at `index` (n,), in float32."""
        if in_reach(self.codes):
            return self._rows_compiled(index)
        codes, logs = self.codes, self.row_logs
        if index is not None:
            codes, logs = codes[index], logs[index]
        values = unpack(codes, self.bits, self.shape[1]).to(torch.float32) - float(1 << (self.bits - 1))
        if len(self.positions):
            at, escapes = self._escapes_of(index)
            values.reshape(-1)[at.long()] = escapes.to(torch.float32)
        values *= torch.exp2(logs.float() / self.resolution)[:, None]
        values *= torch.exp2(self.column_logs.float() / self.resolution)
        return values

    def _rows_compiled(self, index: Tensor | None) -> Tensor:
        from tersor.forms import unpacking

        out = torch.empty(self.shape[0] if index is None else len(index), self.shape[1])
        codes, rows, columns, positions, escapes = self._read()
        wanted = ALL if index is None else index.long().numpy()
        rows = rows if index is None else rows[wanted]
        steps = rows, columns, self.resolution
        unpacking.stepped(codes, self.bits, index is None, wanted, *steps, positions, escapes, out.numpy())
        return out

    def product(self, x: Array) -> Array | None:
        """`x W^T` (positions, rows) for few `x` (positions, columns), float32; None where no compiled loop can read."""
        if not in_reach(self.codes):
            return None
        from tersor.forms import unpacking

        out = np.empty((len(x), self.shape[0]), np.float32)
        codes, rows, columns, positions, escapes = self._read()
        steps = rows, columns, self.resolution
        unpacking.stepped_product(codes, self.bits, *steps, positions, escapes, x, out)
        return out

    def _read(self) -> tuple[Array, ...]:
        """What compiled loops read."""
        return self._arrays.of(self.codes, self.row_logs, self.column_logs, self.positions, self.escapes)

    @cached_property
    def _arrays(self) -> Arrays:
        return Arrays()

    def _escapes_of(self, index: Tensor | None) -> tuple[Tensor, Tensor]:
        """Where the escapes lie among the rows at `index`, and what they are."""
        if index is None:
            return self.positions, self.escapes
        columns = self.shape[1]
        ends = (((index.long() + k) * columns).to(self.positions.dtype) for k in (0, 1))
        first, last = (torch.searchsorted(self.positions, end) for end in ends)
        counts = last - first
        row = torch.repeat_interleave(torch.arange(len(index), device=index.device), counts)
        inside = torch.arange(len(row), device=index.device) - (counts.cumsum(0) - counts)[row]
        escape = first[row] + inside
        return row * columns + self.positions[escape] % columns, self.escapes[escape]


def unpack_stream(stream: Tensor, shape: Shape) -> Packed:
    """Decode a stream; raises TersorError where it is damaged or holds a matrix of another shape."""
    return Packed.of(decode(stream.numpy().tobytes(), shape))


def _packed_bytes(codes: Array, bits: int) -> int:
    half = 1 << (bits - 1)
    escapes = int(((codes < -half) | (codes >= half)).sum())
    each = _position_type(codes.size).itemsize + _escape_type(codes).itemsize
    return int(codes.shape[0]) * packed_width(int(codes.shape[1]), bits) + each * escapes


def _position_type(entries: int) -> torch.dtype:
    return torch.int32 if entries < 2**31 else torch.int64


def _escape_type(codes: Array) -> torch.dtype:
    return torch.int16 if np.abs(codes).max(initial=0) < 2**15 else torch.int32
