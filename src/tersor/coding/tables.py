"""Integer probability tables of the codes of a matrix, one for every standard deviation on a ladder.

A code is a Gaussian, or a mixture of two, of known scale, rounded to an integer. Its frequencies out of 2^20 are made
with integers alone, to a precision at which rounding them is beyond doubt, so that every machine has the same tables;
floating-point numbers never decide what a symbol means. The tables are specified in `docs/stream.md`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import pairwise
from math import isqrt

import numpy as np

TOTAL_BITS = 20
TOTAL = 1 << TOTAL_BITS
LOWEST, HIGHEST = -20, 28  # standard deviations 2^(index / 4): 1/32 to 128
_BITS = 128  # of the fixed-point numbers below the point
_ONE = 1 << _BITS
_REACH = 9 * _ONE  # beyond nine standard deviations a tail holds nothing
Array = np.ndarray


@dataclass(frozen=True)
class Family:
    """A mixture of two Gaussians of unit variance or nearly: `share` of 1/64 have `narrow`, the rest `wide` of 1/64."""

    share: int
    narrow: int
    wide: int


FAMILIES = (Family(64, 64, 64), Family(51, 54, 93), Family(38, 45, 87), Family(45, 29, 108))


@cache
def frequencies(family: int, index: int) -> Array:
    """Frequencies (2 reach + 2,) of the codes -reach to reach and of an escape, at standard deviation 2^(index / 4).

    They sum to 2^20; none is zero.
    """
    reach = reach_of(index)
    form = FAMILIES[family]
    tails = [_mixture_tail(form, index, code) for code in range(reach + 1)]  # P(|c| > code)
    masses = [(before - after) // 2 for before, after in pairwise(tails)]
    sides = [max(1, ((mass << (TOTAL_BITS + 1)) + _ONE) >> (_BITS + 1)) for mass in masses]  # to the nearest
    middle = TOTAL - 2 * sum(sides) - 1
    return np.array([*sides[::-1], middle, *sides, 1], dtype=np.int64)


def reach_of(index: int) -> int:
    """The largest code that has a frequency of its own: five standard deviations and two."""
    return 2 + 5 * _scale(index) // _ONE


@cache
def costs(family: int) -> Array:
    """Bits of every magnitude under every index (indices, magnitudes), signs included; escapes cost 20 bits and 16."""
    width = reach_of(HIGHEST) + 2
    out = np.full((HIGHEST - LOWEST + 1, width), 36.0, dtype=np.float64)
    for row, index in enumerate(range(LOWEST, HIGHEST + 1)):
        reach = reach_of(index)
        out[row, : reach + 1] = TOTAL_BITS - np.log2(frequencies(family, index)[reach : 2 * reach + 1])
    return out


@cache
def _scale(index: int) -> int:
    """2^(index / 4) in fixed point, exact but for its last bits."""
    root = isqrt(isqrt(1 << (4 * _BITS + 4 * 32 + index)))  # 2^(_BITS + 32 + index / 4)
    return root >> 32


def _mixture_tail(form: Family, index: int, code: int) -> int:
    """P(|x| > code + 1/2) of the mixture at standard deviation 2^(index / 4), in fixed point."""
    edge = (2 * code + 1) << (_BITS - 1)
    at = (edge << _BITS) // _scale(index)
    narrow, wide = (_tail(at * 64 // width) for width in (form.narrow, form.wide))
    return (form.share * narrow + (64 - form.share) * wide) // 64


@lru_cache(maxsize=4096)
def _tail(x: int) -> int:
    """P(|z| > x) of a standard Gaussian, in fixed point: 1 - sqrt(2 / pi) (x - x^3 / 6 + x^5 / 40 - ...)."""
    if x >= _REACH:
        return 0
    half_square = (x * x) >> (_BITS + 1)
    power = total = x  # x^(2n + 1) / (2^n n!)
    n = 0
    while power:
        n += 1
        power = ((power * half_square) >> _BITS) // n
        total += power // (2 * n + 1) * (-1 if n % 2 else 1)
    root = isqrt((2 << (2 * _BITS)) * _ONE // _pi())  # sqrt(2 / pi)
    return max(0, _ONE - ((total * root) >> _BITS))


@lru_cache(maxsize=1)
def _pi() -> int:
    """Machin's formula, in fixed point."""

    def arctangent(inverse: int) -> int:
        term = total = (_ONE << 32) // inverse
        n = 1
        while term:
            term //= -(inverse * inverse)
            n += 2
            total += term // n
        return total

    return (16 * arctangent(5) - 4 * arctangent(239)) >> 32
