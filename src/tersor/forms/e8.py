"""The points of the lattice E8 that are nearest to zero, in a fixed order, as the codebooks that need not be stored.

E8 is all vectors of eight integers, or of eight integers and a half, whose sum is even: the densest packing of spheres
in eight dimensions. A codebook of `b` bits holds whole shells of it, those with the most bits that `b` bits can number.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
DIMENSIONS = 8
RADII = {8: 2, 12: 4, 14: 6, 16: 10}  # the largest squared norm among the points of a codebook, by its bits
_DIGIT = 16  # doubled coordinates lie between -7 and 7


@cache
def points(bits: int) -> Array:
    """Doubled points (n, 8), int8, of a codebook with numbers of `bits` bits, by norm and then by coordinates."""
    limit = RADII[bits]
    found = np.concatenate([_ball(limit, 0), _ball(limit, 1)])
    found = found[(found.astype(np.int32).sum(1) // 2) % 2 == 0]  # the sum of the point itself is even
    norms = found.astype(np.int32) ** 2
    ordered: Array = found[np.lexsort((*found.T[::-1], norms.sum(1)))]
    return ordered


def _ball(limit: int, offset: int) -> Array:
    """All doubled vectors (n, 8) with coordinates of one parity and a squared norm of at most `limit` undoubled."""
    reach = int(np.sqrt(4 * limit))
    values = np.array([v for v in range(-reach, reach + 1) if v % 2 == offset], np.int8)
    found = np.zeros((1, 0), np.int8)
    norms = np.zeros(1, np.int32)
    for _ in range(DIMENSIONS):
        found = np.concatenate([np.repeat(found, len(values), 0), np.tile(values, len(found))[:, None]], 1)
        norms = (norms[:, None] + values.astype(np.int32) ** 2).reshape(-1)
        found, norms = found[norms <= 4 * limit], norms[norms <= 4 * limit]
    return found


@cache
def keys(bits: int) -> tuple[Array, Array]:
    """The keys of the points, sorted, and the number of the point of each: what finds the number of a point."""
    numbers = key_of(points(bits))
    order = np.argsort(numbers)
    return numbers[order], order.astype(np.int32)


def key_of(doubled: Array) -> Array:
    """One whole number for a doubled point (..., 8)."""
    places = _DIGIT ** np.arange(DIMENSIONS, dtype=np.int64)
    found: Array = ((doubled.astype(np.int64) + _DIGIT // 2) * places).sum(-1)
    return found


@cache
def roots() -> Array:
    """The doubled origin and the 240 points next to it (241, 8)."""
    return points(8)
