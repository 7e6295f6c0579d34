"""Which entries of a matrix are kept, in bytes that follow from the shape and the number kept alone.

Three codes: a bit an entry; Elias and Fano's code of sorted positions, which is smaller below a density of about a
quarter; and for `n:m` patterns the number of a group's choice among all `C(m, n)`. All are written and read by whole
tensors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from typing import Protocol

import torch
from torch import Tensor

from tersor.forms.base import Shape
from tersor.forms.packing import pack, packed_width, unpack


class Support(Protocol):
    """A code of masks (rows, columns) in which `kept` entries are chosen."""

    @property
    def kept(self) -> int: ...

    @property
    def shape(self) -> Shape:
        """The shape of the masks, whole groups of a pattern."""
        ...

    @property
    def nbytes(self) -> int: ...

    def encode(self, mask: Tensor) -> Tensor:
        """The bytes (nbytes,) of a mask."""
        ...

    def decode(self, stored: Tensor) -> Tensor:
        """The mask of what `encode` made."""
        ...


@dataclass(frozen=True)
class Bitmask:
    """One bit an entry."""

    shape: Shape
    kept: int

    @property
    def nbytes(self) -> int:
        return packed_width(math.prod(self.shape), 1)

    def encode(self, mask: Tensor) -> Tensor:
        return pack(mask.reshape(1, -1), 1)[0]

    def decode(self, stored: Tensor) -> Tensor:
        return unpack(stored[None], 1, math.prod(self.shape)).bool().reshape(self.shape)


@dataclass(frozen=True)
class Positions:
    """Sorted positions by the code of Elias (1974) and Fano (1971): about `2 + log2(entries / kept)` bits each.

    Of each position the low bits stand as they are, in planes; the high part of the k-th, plus k, is a bit that is set.
    """

    shape: Shape
    kept: int

    @property
    def low(self) -> int:
        """Low bits of a position."""
        return max(0, (math.prod(self.shape) // self.kept).bit_length() - 1)

    @property
    def high(self) -> int:
        """Bits that code the high parts."""
        return self.kept + ((math.prod(self.shape) - 1) >> self.low) + 1

    @property
    def nbytes(self) -> int:
        return packed_width(self.high, 1) + self.low * packed_width(self.kept, 1)

    def encode(self, mask: Tensor) -> Tensor:
        position = mask.reshape(-1).nonzero()[:, 0]
        upper = torch.zeros(1, self.high, dtype=torch.uint8, device=mask.device)
        upper[0, (position >> self.low) + torch.arange(self.kept, device=mask.device)] = 1
        planes = [pack((position >> k & 1)[None], 1)[0] for k in range(self.low)]
        return torch.cat([pack(upper, 1)[0], *planes])

    def decode(self, stored: Tensor) -> Tensor:
        start, width = packed_width(self.high, 1), packed_width(self.kept, 1)
        upper = unpack(stored[None, :start], 1, self.high)[0].nonzero()[:, 0]
        position = (upper - torch.arange(self.kept, device=stored.device)) << self.low
        for k, plane in enumerate(stored[start:].reshape(self.low, width)):
            position |= unpack(plane[None], 1, self.kept)[0].long() << k
        mask = torch.zeros(math.prod(self.shape), dtype=torch.bool, device=stored.device)
        mask[position] = True
        return mask.reshape(self.shape)


def smaller_support(shape: Shape, kept: int) -> Support:
    """The code of `kept` free entries that takes fewer bytes."""
    codes: tuple[Support, ...] = Bitmask(shape, kept), Positions(shape, kept)
    return min(codes, key=lambda code: code.nbytes)


@dataclass(frozen=True)
class Groups:
    """`n` of every `m` neighbours of a row, `ceil(log2 C(m, n))` bits a group; rows are filled up to whole groups."""

    whole: Shape
    n: int
    m: int

    @property
    def shape(self) -> Shape:
        return self.whole[0], -(-self.whole[1] // self.m) * self.m

    @property
    def count(self) -> int:
        return math.prod(self.shape) // self.m

    @property
    def kept(self) -> int:
        return self.count * self.n

    @property
    def bits(self) -> int:
        return (math.comb(self.m, self.n) - 1).bit_length()

    @property
    def nbytes(self) -> int:
        return sum(packed_width(self.count, part) for part in _parts(self.bits))

    def encode(self, mask: Tensor) -> Tensor:
        weights = 1 << torch.arange(self.m, device=mask.device)
        number = _choices(self.n, self.m)[1].to(mask.device)[(mask.reshape(-1, self.m) * weights).sum(1)]
        packed = []
        for part in _parts(self.bits):
            packed.append(pack((number & (2**part - 1))[None], part)[0])
            number = number >> part
        return torch.cat(packed)

    def decode(self, stored: Tensor) -> Tensor:
        number, start, shift = torch.zeros(self.count, dtype=torch.int64, device=stored.device), 0, 0
        for part in _parts(self.bits):
            width = packed_width(self.count, part)
            number |= unpack(stored[None, start : start + width], part, self.count)[0].long() << shift
            start, shift = start + width, shift + part
        return _choices(self.n, self.m)[0].to(stored.device)[number].reshape(self.shape)


def _parts(bits: int) -> list[int]:
    """Widths that `pack` knows and that add up to `bits`."""
    rest = [] if bits % 8 == 0 else [4, 3] if bits % 8 == 7 else [bits % 8]
    return [8] * (bits // 8) + rest


@cache
def _choices(n: int, m: int) -> tuple[Tensor, Tensor]:
    """All masks of `n` of `m` (C(m, n), m), and the number of each by its bits read as an integer (2^m,)."""
    masks = torch.zeros(math.comb(m, n), m, dtype=torch.bool)
    chosen = torch.tensor(list(combinations(range(m), n)))
    masks.scatter_(1, chosen, True)
    number = torch.zeros(2**m, dtype=torch.int64)
    number[(masks * (1 << torch.arange(m))).sum(1)] = torch.arange(len(masks))
    return masks, number
