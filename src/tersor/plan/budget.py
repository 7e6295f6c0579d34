"""Budgets as users write them: `35%`, `120MB`, `4.25bits`, and limits on memory, FLOPs and divergence beside them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from tersor.errors import TersorError

_UNITS = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12, "kib": 2**10, "mib": 2**20, "gib": 2**30}


@dataclass(frozen=True)
class Limits:
    """What a plan may cost; None is no limit. `stored` and `resident` in bytes, `divergence` in the model's unit.

    `bits` speaks of the approximated weights alone, `stored` and `resident` of the whole model.
    """

    stored: int | None = None
    resident: int | None = None
    flops: int | None = None
    divergence: float | None = None
    bits: float | None = None


def parse_limits(
    budget: str | None = None,
    *,
    whole_bytes: int,
    whole_flops: int,
    memory_budget: str | None = None,
    flops_budget: str | None = None,
    divergence: float | None = None,
) -> Limits:
    """Read budgets as given on the command line; shares are of the whole original model.

    Raises TersorError for what cannot be read and where no limit is given at all.
    """
    if budget is None and memory_budget is None and flops_budget is None and divergence is None:
        raise TersorError(
            "Give a limit: --budget 35%, 120MB or 4.25bits, --memory-budget, --flops-budget or --divergence."
        )
    if divergence is not None and not 0 < divergence < float("inf"):
        raise TersorError(f"--divergence is {divergence}, but must be above zero.")
    bits = None
    stored = None
    if budget is not None:
        if budget.strip().lower().endswith("bits"):
            bits = _number(budget.strip()[:-4], budget)
        else:
            stored = parse_bytes(budget, whole_bytes)
    resident = None if memory_budget is None else parse_bytes(memory_budget, whole_bytes)
    return Limits(
        stored, resident, None if flops_budget is None else _flops(flops_budget, whole_flops), divergence, bits
    )


def parse_bytes(text: str, whole: int) -> int:
    """`35%` of `whole`, or a number of bytes with a unit."""
    text = text.strip()
    if text.endswith("%"):
        return int(whole * _number(text[:-1], text) / 100)
    found = re.fullmatch(r"([0-9.]+)\s*([a-zA-Z]*)", text)
    unit = (found.group(2) or "b").lower() if found else ""
    if not found or unit not in _UNITS:
        raise TersorError(f"The budget {text!r} is not understood; write it as 35%, 120MB or 4.25bits.")
    value = _number(found.group(1), text)
    if not found.group(2) and value < 1000:
        raise TersorError(f"The budget {text!r} has no unit; write it as {text}%, {text}MB or {text}bits.")
    return int(value * _UNITS[unit])


def _flops(text: str, whole: int) -> int:
    if text.strip().endswith("%"):
        return int(whole * _number(text.strip()[:-1], text) / 100)
    return int(_number(text, text))


def _number(text: str, whole_text: str) -> float:
    try:
        value = float(text)
    except ValueError as error:
        raise TersorError(
            f"The budget {whole_text!r} is not understood; write it as 35%, 120MB or 4.25bits."
        ) from error
    if not 0 < value < float("inf"):
        raise TersorError(f"The budget {whole_text!r} must be above zero.")
    return value
