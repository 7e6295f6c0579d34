"""The trellis code of a matrix: a bit stream of which every window of 12 bits is the state, and a state is a value.

An entry appends between 0 and 6 bits to the stream; the last 12 are its state, and a table of Gaussian values in random
order says what that state means. How many bits an entry takes follows from two logarithms, one of its row and one of
its column, so nothing but those and the bits is stored (`docs/forms/trellis.md` has the layout).
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np

from tersor.coding.stream import StreamError

MAGIC = b"TST1"
WINDOW = 12  # bits of a state
MOST_BITS = 6  # that an entry may take
UNIT = 64  # of logarithms in an octave, and of rates in a bit
SIDE_BITS = 5  # of a logarithm as stored
ENLARGED = 1 << 14  # the unit of a factor of all values
HEADER = struct.Struct("<4sIIBBH" + "hH" * 4)
# What a full search leaves of the mean square of a Gaussian at 0 to 6 bits (a test finds it again).
REMAINS = (1.0, 0.2763, 0.0747, 0.0199, 0.0054, 0.0015, 0.00043)
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Side:
    """A logarithm for every row or column in 1/64 octaves: `base + step * codes`, codes below 32."""

    base: int
    step: int
    codes: Array

    @classmethod
    def of(cls, logs: Array, deepest: float) -> Side:
        """The nearest to `logs` (n,) in octaves; none counts as further than `deepest` below the largest."""
        values = np.clip(np.nan_to_num(logs * UNIT, nan=-30000, neginf=-30000, posinf=30000), -30000, 30000)
        values = np.maximum(values, values.max() - deepest * UNIT)
        base = int(np.rint(values.min()))
        top = (1 << SIDE_BITS) - 1
        step = max(1, int(np.ceil((values.max() - base) / top)))
        return cls(base, step, np.clip(np.rint((values - base) / step), 0, top).astype(np.uint8))

    @property
    def values(self) -> Array:
        """(n,) int32, in 1/64 octaves."""
        found: Array = self.base + self.step * self.codes.astype(np.int32)
        return found


@dataclass(frozen=True)
class Trellis:
    """A matrix (rows, columns) as bits. The entries follow each other along diagonals from the last to the first.

    Where `free_rows`, rows do not feel one another: entries follow each other down the columns instead, rows of like
    rate together, and any row can be read alone. `rotated` says whether rows and columns are those of a rotated matrix.
    """

    shape: tuple[int, int]
    free_rows: bool
    rotated: tuple[bool, bool]
    row_rates: Side
    column_rates: Side
    row_scales: Side
    column_scales: Side
    bits: Array  # uint8, the state before the first entry in front
    enlarged: int = 0  # in 1/16384 of what the values are without it

    @property
    def factor(self) -> float:
        """What all values are multiplied by."""
        return 1 + self.enlarged / ENLARGED

    def enlarged_by(self, factor: float) -> Trellis:
        """The same with all values multiplied, by no less than one."""
        return replace(self, enlarged=min(max(0, round((factor - 1) * ENLARGED)), (1 << 16) - 1))

    def to_bytes(self) -> bytes:
        """The stream, of `stored_bytes(shape, len(bits))`."""
        sides = (self.row_rates, self.column_rates, self.row_scales, self.column_scales)
        flags = sum(1 << k for k, rotated in enumerate(self.rotated) if rotated)
        numbers = [n for side in sides for n in (side.base, side.step)]
        head = HEADER.pack(MAGIC, *self.shape, int(self.free_rows), flags, self.enlarged, *numbers)
        body = head + b"".join(_pack_side(side.codes) for side in sides) + self.bits.tobytes()
        return body + struct.pack("<I", zlib.crc32(body))

    @classmethod
    def from_bytes(cls, stream: bytes, shape: tuple[int, int]) -> Trellis:
        """Read a stream; raises StreamError where it is damaged or of another shape."""
        if len(stream) < HEADER.size + 4 or stream[:4] != MAGIC:
            raise StreamError("This is no trellis-coded weight: it does not begin with TST1.")
        if zlib.crc32(stream[:-4]) != struct.unpack("<I", stream[-4:])[0]:
            raise StreamError("A trellis-coded weight is damaged: its checksum is wrong.")
        _, rows, columns, free, flags, enlarged, *numbers = HEADER.unpack_from(stream)
        if (rows, columns) != shape:
            raise StreamError(f"A trellis-coded weight has shape {rows} x {columns}, not {shape[0]} x {shape[1]}.")
        at = HEADER.size
        sides: list[Side] = []
        for size, base, step in zip((rows, columns) * 2, numbers[::2], numbers[1::2], strict=True):
            width = side_bytes(size)
            sides.append(Side(base, step, _unpack_side(stream[at : at + width], size)))
            at += width
        bits = np.frombuffer(stream, np.uint8, len(stream) - 4 - at, at) if at < len(stream) - 4 else np.zeros(0, "u1")
        rates, column_rates, scales, column_scales = sides
        turned = bool(flags & 1), bool(flags & 2)
        found = cls(shape, bool(free), turned, rates, column_rates, scales, column_scales, bits, enlarged)
        if sum(int(b.sum()) for b in found.rates()) + WINDOW > 8 * len(bits):
            raise StreamError("A trellis-coded weight is damaged: it has fewer bits than its rates ask for.")
        return found

    def rates(self, rows: int = 1024) -> Iterator[Array]:
        """The bits that entries take, uint8, in blocks of rows."""
        for start in range(0, self.shape[0], rows):
            yield rates_of(self.row_rates.values[start : start + rows], self.fine_columns)

    @property
    def fine_columns(self) -> Array:
        """(columns,) int32: the rates of the columns in 1/4096 bits, spread a little so that any total can be met."""
        return fine_rates(self.column_rates.values)


def rates_of(rows: Array, fine: Array) -> Array:
    """The bits (rows, columns) that entries take, from the rates of rows in 1/64 bits and of columns in 1/4096."""
    total = rows[:, None] * UNIT + fine[None, :] + UNIT * UNIT // 2
    found: Array = np.clip(total >> 12, 0, MOST_BITS).astype(np.uint8)
    return found


def fine_rates(columns: Array) -> Array:
    """Rates of columns (n,) in 1/64 bits as such in 1/4096 bits, each raised by up to a quarter of a bit."""
    fine: Array = columns.astype(np.int32) * UNIT + spread(len(columns))
    return fine


def spread(columns: int) -> Array:
    """What is added to the rates of columns (columns,), int32: up to a quarter of a bit, in 1/4096."""
    found: Array = (np.arange(columns, dtype=np.int64) * 40503 % (16 * UNIT)).astype(np.int32)
    return found


def stored_bytes(shape: tuple[int, int], code_bytes: int) -> int:
    """Bytes of a stream whose codes take `code_bytes`."""
    return HEADER.size + 2 * (side_bytes(shape[0]) + side_bytes(shape[1])) + code_bytes + 4


@cache
def values() -> Array:
    """What states mean: (4096,) float32, quantiles of the unit Gaussian in a random order.

    Multiples of 1/4096, in an order made of integers, so that any machine has the same ones.
    """
    from scipy.special import ndtri

    count = 1 << WINDOW
    quantiles = ndtri((np.arange(count) + 0.5) / count)
    found: Array = np.rint(4096 * quantiles / quantiles.std()).astype(np.float32) / np.float32(4096)
    return found[_shuffled(count)]


def _shuffled(count: int) -> Array:
    """A permutation by a linear congruential generator (Knuth's MMIX), the same everywhere."""
    order, state = np.arange(count), 1
    for k in range(count - 1, 0, -1):
        state = (6364136223846793005 * state + 1442695040888963407) % (1 << 64)
        other = (state >> 33) % (k + 1)
        order[k], order[other] = order[other], order[k]
    return order


def side_bytes(size: int) -> int:
    """Bytes of the codes of a side of `size` logarithms."""
    return -(-size * SIDE_BITS // 8)


def _pack_side(codes: Array) -> bytes:
    bits = (codes[:, None] >> np.arange(SIDE_BITS - 1, -1, -1)) & 1
    return np.packbits(bits.astype(np.uint8)).tobytes()


def _unpack_side(packed: bytes, size: int) -> Array:
    bits = np.unpackbits(np.frombuffer(packed, np.uint8), count=size * SIDE_BITS).reshape(size, SIDE_BITS)
    found: Array = (bits << np.arange(SIDE_BITS - 1, -1, -1, dtype=np.uint8)).sum(1, dtype=np.uint8)
    return found
