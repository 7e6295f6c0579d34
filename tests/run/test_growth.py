"""A gain is that of the probe, and grows with the damage where a site was measured at more of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tersor.run import Gains, Run

PROBED = {"by_form": {"coded": 1.5}, "borrowed": {"trellis": 2.0}, "gain": 1.2, "predicted": 0.01}


def test_a_form_without_a_probe_has_the_gain_of_integers() -> None:
    gains = Gains(PROBED)
    assert [gains.of(form) for form in ("coded", "trellis", "lowrank")] == [1.5, 2.0, 1.2]
    assert Gains({}).of("int", 5.0) == 1.0


def test_a_gain_grows_between_the_probe_and_what_was_measured_beyond_it() -> None:
    gains = Gains({**PROBED, "growth": [[0.005, 9.0], [0.04, 1.4], [0.16, 2.0]]})  # the first is below the probe
    expected = {0.0: 1.0, 0.001: 1.0, 0.01: 1.0, 0.02: 1.2, 0.04: 1.4, 0.08: 1.7, 0.16: 2.0, 5.0: 2.0}
    for divergence, growth in expected.items():
        assert gains.of("coded", divergence) == pytest.approx(1.5 * growth)
    assert gains.of("trellis", 0.08) == pytest.approx(2.0 * 1.7)


def test_facts_that_belong_together_are_all_kept_or_none(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        Run(tmp_path / "run", create=True).put_all({"gain/a": {"gain": 2.0}, "interaction": object()})
    opened = Run(tmp_path / "run")
    assert opened.get("gain/a") is None
    opened.put_all({"gain/a": {"gain": 2.0}, "interaction": [[1.0, 2.0]]})
    assert opened.gain("a", "int") == 2.0 and opened.get("interaction") == [[1.0, 2.0]]
