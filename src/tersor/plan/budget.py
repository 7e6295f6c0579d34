"""Budgets as users write them: `35%`, `120MB`, `4.25bits`, `40ms`, `2x-faster`, and other limits beside them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from tersor.errors import TersorError

_TIME = r"([0-9.]+)\s*(ms|s|x|x-faster)"
_UNITS = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12, "kib": 2**10, "mib": 2**20, "gib": 2**30}


@dataclass(frozen=True)
class Limits:
    """What a plan may cost; None is no limit. `stored` and `resident` in bytes, `divergence` in the model's unit,
    `latency` in seconds of one sample.

    `bits` speaks of the approximated weights alone, `stored` and `resident` of the whole model.
    """

    stored: int | None = None
    resident: int | None = None
    flops: int | None = None
    divergence: float | None = None
    bits: float | None = None
    latency: float | None = None

    @property
    def of_bytes(self) -> tuple[str, ...] | None:
        """The sizes that are limited, of `stored` and `resident`, or None where something beside sizes is.

        Under a limit on the divergence alone the stored size is what is made small.
        """
        if self.flops is not None or self.latency is not None:
            return None
        on_disk = self.stored is not None or self.bits is not None or self.resident is None
        return (("stored",) if on_disk else ()) + (("resident",) if self.resident is not None else ())


def parse_limits(
    budget: str | None = None,
    *,
    whole_bytes: int,
    whole_flops: int,
    memory_budget: str | None = None,
    flops_budget: str | None = None,
    latency_budget: str | None = None,
    divergence: float | None = None,
    whole_latency: float | None = None,
) -> Limits:
    """Read budgets as given on the command line; shares are of the whole original model.

    A `budget` that is a time is one of latency. `whole_latency` are the seconds of the original, None where they were
    not measured. Raises TersorError for what cannot be read and where no limit is given at all.
    """
    if all(limit is None for limit in (budget, memory_budget, flops_budget, latency_budget, divergence)):
        raise TersorError(
            "Give a limit: --budget 35%, 120MB, 4.25bits, 40ms or 2x-faster, --memory-budget, --flops-budget, "
            "--latency-budget or --divergence."
        )
    if budget is not None and is_latency(budget):
        if latency_budget is not None:
            raise TersorError(f"Two limits on latency were given: --budget {budget} and --latency-budget.")
        budget, latency_budget = None, budget
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
    flops = None if flops_budget is None else _flops(flops_budget, whole_flops)
    latency = None if latency_budget is None else parse_latency(latency_budget, whole_latency)
    return Limits(stored, resident, flops, divergence, bits, latency)


def is_latency(budget: str) -> bool:
    """Whether a budget is one of time: `40ms`, `0.2s`, `2x-faster`."""
    return re.fullmatch(_TIME, budget.strip().lower()) is not None


def parse_latency(text: str, whole: float | None) -> float:
    """Seconds of `40ms`, `0.2s`, or, of `whole` seconds, of `2x-faster` and `70%`."""
    plain = text.strip().lower()
    if whole is None:
        raise TersorError(
            f"For a limit on latency ({text}) sites must have been timed: study again, on the machine that the model "
            "is for, with --latency."
        )
    if plain.endswith("%"):
        return whole * _number(plain[:-1], text) / 100
    found = re.fullmatch(_TIME, plain)
    if found is None:
        raise TersorError(f"The latency budget {text!r} is not understood; write it as 40ms, 0.2s, 2x-faster or 70%.")
    value = _number(found.group(1), text)
    return whole / value if found.group(2).startswith("x") else value * (1e-3 if found.group(2) == "ms" else 1.0)


def parse_bytes(text: str, whole: int) -> int:
    """`35%` of `whole`, or a number of bytes with a unit."""
    text = text.strip()
    if text.endswith("%"):
        return int(whole * _number(text[:-1], text) / 100)
    found = re.fullmatch(r"([0-9.]+)\s*([a-zA-Z]*)", text)
    unit = (found.group(2) or "b").lower() if found else ""
    if not found or unit not in _UNITS:
        raise TersorError(_unclear(text))
    value = _number(found.group(1), text)
    if not found.group(2) and value < 1000:
        raise TersorError(f"The budget {text!r} has no unit; write it as {text}%, {text}MB or {text}bits.")
    return int(value * _UNITS[unit])


def parse_size(text: str, what: str) -> int:
    """A number of bytes with a unit; raises TersorError for anything else, a share included, since it is of nothing."""
    try:
        if not text.strip().endswith("%"):
            return parse_bytes(text, 0)
    except TersorError:
        pass
    raise TersorError(f"The {what} {text!r} is no number of bytes; write it as 6GB or 500MB.")


def parse_shard_size(text: str | None) -> int | None:
    """The most bytes of a weights file, of a size such as `2GB`; None where none is given."""
    return None if text is None else parse_size(text, "shard size")


def _flops(text: str, whole: int) -> int:
    if text.strip().endswith("%"):
        return int(whole * _number(text.strip()[:-1], text) / 100)
    return int(_number(text, text))


def _unclear(budget: str) -> str:
    return f"The budget {budget!r} is not understood; write it as 35%, 120MB, 4.25bits, 40ms or 2x-faster."


def _number(text: str, whole_text: str) -> float:
    try:
        value = float(text)
    except ValueError as error:
        raise TersorError(_unclear(whole_text)) from error
    if not 0 < value < float("inf"):
        raise TersorError(f"The budget {whole_text!r} must be above zero.")
    return value
