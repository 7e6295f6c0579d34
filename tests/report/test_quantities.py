"""Quantities as people read them."""

from __future__ import annotations

import math

import pytest

from tersor.report import quantities as q


@pytest.mark.parametrize(
    ("count", "text"),
    [(999, "999 B"), (1_312_768, "1.31 MB"), (90_900_000, "90.9 MB"), (5.2e9, "5.2 GB"), (2e15, "2,000,000 GB")],
)
def test_bytes_are_decimal(count: float, text: str) -> None:
    assert q.bytes_text(count) == text


@pytest.mark.parametrize(("seconds", "text"), [(0.0123, "12.3 ms"), (1.4, "1.4 s"), (200, "3 min 20 s")])
def test_seconds(seconds: float, text: str) -> None:
    assert q.seconds_text(seconds) == text


@pytest.mark.parametrize(
    ("ratio", "text"), [(6.843, "6.84"), (41.2, "41.2"), (1766.4, "1,766"), (3.19e7, "3.2e+07"), (None, "-")]
)
def test_times(ratio: float | None, text: str) -> None:
    assert q.times_text(ratio) == text


def test_digits_follow_the_interval() -> None:
    assert q.estimate_text({"value": 2.39104, "low": 2.3661, "high": 2.4142}) == "2.391 [2.366, 2.414]"
    assert q.estimate_text({"value": 0.8203, "low": 0.8, "high": 0.84}, percent=True) == "82.0 % [80.0, 84.0]"
    assert q.estimate_text({"value": 0.5, "low": 0.5, "high": 0.5}) == "0.500 [0.500, 0.500]"
    assert q.estimate_text({"value": 3.1e-8, "low": 3.0e-8, "high": 3.2e-8}) == "3.1e-08 [3e-08, 3.2e-08]"
    assert q.estimate_text({"value": -0.012, "low": -0.02, "high": 0.004}, signed=True).startswith("-0.012 [-0.020, +")


def test_what_is_not_known_is_a_dash_or_nothing() -> None:
    assert q.estimate_text(None) == ""
    assert q.estimate_text({"value": None, "low": None, "high": None}) == "-"
    assert q.estimate_text({"value": math.nan, "low": math.nan, "high": math.nan}) == "-"
    assert q.number_text(math.nan) == "-"
