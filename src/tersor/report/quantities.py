"""Quantities as people read them: bytes, shares, seconds, and values with as many digits as their interval allows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

PERCENTAGES = ("agreement of top-1", "accuracy")


def bytes_text(count: float) -> str:
    """Bytes in decimal units, as budgets are given: `1.31 MB`."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}" if count < 1000 * size else f"{count / size:,.0f} {unit}"
    return f"{count:.0f} B"


def share_text(part: float, whole: float) -> str:
    """A share in per cent: `34.6 %`."""
    return f"{100 * part / whole:.3g} %" if whole else "-"


def number_text(value: float) -> str:
    """A value of any size with three digits."""
    return "-" if not math.isfinite(value) else "0" if value == 0 else f"{value:.3g}"


def times_text(ratio: float | None) -> str:
    """How many times one value is another: `6.84`, `1,766`, `3.2e+07`; a dash where it is not known."""
    if ratio is None:
        return "-"
    return f"{ratio:.3g}" if ratio < 1000 else f"{ratio:,.0f}" if ratio < 1e6 else f"{ratio:.1e}"


def count_text(value: float) -> str:
    """A large count: `1.87 M`."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f}"


def seconds_text(seconds: float) -> str:
    """A time: `3 min 20 s`, `1.4 s`, `12 ms`."""
    if seconds >= 60:
        return f"{int(seconds // 60)} min {int(seconds % 60)} s"
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def age_text(seconds: float) -> str:
    """How long ago something was: `3 days ago`, `just now`."""
    for unit, length in (("day", 86400), ("hour", 3600), ("minute", 60)):
        count = int(seconds // length)
        if count:
            return f"{count} {unit}{'s' if count > 1 else ''} ago"
    return "just now"


def estimate_text(
    estimate: Mapping[str, Any] | None, *, percent: bool = False, signed: bool = False, between: str = " "
) -> str:
    """A value with its 95 % interval, to two digits of the interval's width: `2.391 [2.366, 2.414]`."""
    if estimate is None:
        return ""
    scale = 100.0 if percent else 1.0
    value, low, high = (
        math.nan if estimate[k] is None else scale * estimate[k]  # JSON has no NaN
        for k in ("value", "low", "high")
    )
    if not math.isfinite(value):
        return "-"
    width = high - low if math.isfinite(high - low) else 0.0
    digits = max(0, 1 - math.floor(math.log10(width))) if width > 0 else 3
    if digits > 6:
        return f"{value:.3g}{between}[{low:.3g}, {high:.3g}]"
    sign = "+" if signed else ""
    unit = " %" if percent else ""
    return f"{value:{sign}.{digits}f}{unit}{between}[{low:{sign}.{digits}f}, {high:{sign}.{digits}f}]"
