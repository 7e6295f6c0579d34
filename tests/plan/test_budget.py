"""Budgets as users write them, and the sentences for those that cannot be read."""

from __future__ import annotations

from typing import Any

import pytest

from tersor.errors import TersorError
from tersor.plan import Limits, parse_bytes, parse_limits

WHOLE = {"whole_bytes": 1000, "whole_flops": 500}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("35%", 350),
        (" 12.5 % ", 125),
        ("120MB", 120_000_000),
        ("1.5 GB", 1_500_000_000),
        ("4KiB", 4096),
        ("2mib", 2 << 20),
        ("1777", 1777),
        ("777B", 777),
    ],
)
def test_bytes(text: str, expected: int) -> None:
    assert parse_bytes(text, 1000) == expected


@pytest.mark.parametrize(
    "text", ["", "much", "12XB", "%", "1.2.3MB", "-5MB", "0%", "-3%", "nan%", "inf%", "4 bit", "35"]
)
def test_what_cannot_be_read_is_quoted(text: str) -> None:
    with pytest.raises(TersorError, match="The budget"):
        parse_bytes(text, 1000)


def test_limits() -> None:
    assert parse_limits("35%", **WHOLE) == Limits(stored=350)
    assert parse_limits("4.25bits", **WHOLE) == Limits(bits=4.25)
    assert parse_limits("4 Bits", **WHOLE) == Limits(bits=4.0)
    every = parse_limits("1KB", memory_budget="50%", flops_budget="20%", divergence=0.1, **WHOLE)
    assert every == Limits(1000, 500, 100, 0.1)
    assert parse_limits(flops_budget="250", **WHOLE) == Limits(flops=250)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("40ms", 0.04), ("0.5 s", 0.5), ("2x-faster", 1.5), ("2X", 1.5), ("3ms", 0.003)],
)
def test_a_time_is_a_budget(text: str, seconds: float) -> None:
    for given in ({"budget": text}, {"latency_budget": text}):
        assert parse_limits(**given, whole_latency=3.0, **WHOLE) == Limits(latency=pytest.approx(seconds))
    assert parse_limits("35%", latency_budget=text, whole_latency=3.0, **WHOLE).stored == 350


def test_times_that_cannot_be() -> None:
    for text, message in (("0ms", "above zero"), ("40", "not understood"), ("fast", "not understood")):
        with pytest.raises(TersorError, match=message):
            parse_limits(latency_budget=text, whole_latency=1.0, **WHOLE)
    with pytest.raises(TersorError, match="Two limits"):
        parse_limits("40ms", latency_budget="2x", whole_latency=1.0, **WHOLE)
    with pytest.raises(TersorError, match="--latency"):
        parse_limits("40ms", **WHOLE)


@pytest.mark.parametrize(
    ("budget", "others", "named"),
    [
        (None, {}, "Give a limit"),
        ("xbits", {}, "xbits"),
        ("0bits", {}, "above zero"),
        (None, {"divergence": 0.0}, "--divergence is 0.0"),
        (None, {"divergence": float("nan")}, "--divergence is nan"),
        (None, {"flops_budget": "lots"}, "lots"),
        (None, {"memory_budget": "some"}, "some"),
    ],
)
def test_bad_limits_are_named(budget: str | None, others: dict[str, Any], named: str) -> None:
    with pytest.raises(TersorError, match=named):
        parse_limits(budget, **others, **WHOLE)
