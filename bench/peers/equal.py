"""Comparing at equal bytes: what a file takes, what a tool does at a size between its own, which tool is best there."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

Curve = Sequence[tuple[float, float]]  # (bytes of the whole file, divergence)
FOUR_BITS = 5.1  # bits a weight as stored, up to which codes of 4 bits come with their scales


def whole_bytes(file_bytes: int, touched_bytes: int, stored: int) -> int:
    """The file with the touched parameters as the peer stores them and all else as it was."""
    return file_bytes - touched_bytes + stored


def interpolated(curve: Curve, size: float) -> float | None:
    """The divergence that a tool has at a size: between its own sizes on a line in both logarithms.

    A file smaller than the size is one that fits, so no larger one of a greater divergence counts, and above its
    largest the tool stays at its best. None below its smallest.
    """
    useful: list[tuple[float, float]] = []
    for at, divergence in sorted(curve):
        if not useful or divergence < useful[-1][1]:
            useful.append((at, divergence))
    before = [point for point in useful if point[0] <= size]
    after = [point for point in useful if point[0] > size]
    if not before:
        return None
    if not after or min(before[-1][1], after[0][1]) <= 0:
        return before[-1][1]
    (low, first), (high, last) = before[-1], after[0]
    share = math.log(size / low) / math.log(high / low)
    return math.exp((1 - share) * math.log(first) + share * math.log(last))


def best_at(rows: Iterable[dict[str, Any]], size: float) -> tuple[str, float]:
    """The tool of the least divergence at a size, and that divergence, each tool interpolated on its own curve."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if "failed" not in row:
            curves.setdefault(row["tool"], []).append((row["bytes"], row["divergence"]["value"]))
    found = {tool: interpolated(curve, size) for tool, curve in curves.items()}
    return min(((tool, value) for tool, value in found.items() if value is not None), key=lambda pair: pair[1])


def bits_of(row: dict[str, Any]) -> float:
    """Bits that a peer stores for each weight that it touched, scales and all else included."""
    return 32 * row["stored"] / row["touched_bytes"]
