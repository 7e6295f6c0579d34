"""Times of sites are measured once, a plan keeps to a limit on their sum, and what cannot be is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tersor.build import latency as timing
from tersor.errors import TersorError, UnreachableBudget
from tersor.plan import UNTOUCHED, Latencies
from tersor.steps import Study, compress, plan_run, study


class Net(nn.Module):
    """Three layers of one size, one of them called twice, and a table."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(300, 96)
        self.first, self.second, self.shared = (nn.Linear(96, 96) for _ in range(3))
        self.head = nn.Linear(96, 50)

    def forward(self, index: Tensor) -> Tensor:
        x = self.table(index).mean(1)
        x = self.second(self.first(x).relu()).relu()
        return self.head(self.shared(self.shared(x).relu()).relu())


def batches(count: int = 5) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 300, (8, 6 + n), generator=generator) for n in range(count)]


@pytest.fixture
def studied(tmp_path: Path) -> Study:
    torch.manual_seed(0)
    return study(Net(), batches(), tmp_path / "run", forms=("int", "coded", "lowrank"), gains=False, workers=1,
                 latency=True)  # fmt: skip


def test_every_candidate_is_timed_once(studied: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    found = Latencies.of(studied.run)
    assert found is not None and found.whole > 0
    assert found.calls["first"] == found.calls["second"] and found.calls["shared"] == 2 * found.calls["first"]
    assert found.at("shared") == 2 * (found.at("first") or 0) > 0
    assert len(found.layers) == 3
    for site in studied.sites:
        for candidate in studied.run.candidates(site.name):
            assert (found.at(site.name, candidate.form, candidate.setting) or 0) > 0
    clock = timing._Clock(studied.run, studied.model)
    clock.time(studied.sites[1], {}, {})
    assert clock.found.at(studied.sites[1].name) == 0  # with no candidates it is of the rest
    monkeypatch.setattr(timing._Clock, "time", None)
    assert timing.measure_latencies(studied.run, studied.model, studied.sites, None) == found


def test_a_plan_keeps_to_its_time(studied: Study) -> None:
    """With times made up: integers take half as long as the original, all else for ever."""
    known = Latencies.of(studied.run)
    assert known is not None
    layers = {
        layer: {key: 1.0 if key == "original" else 0.5 if key.startswith("int") else 9.0 for key in times}
        for layer, times in known.layers.items()
    }
    studied.run.put("latencies", {"machine": "m", "whole": 8.0, "calls": known.calls, "layers": layers})
    # Six calls of layers, two of them of one site, and two seconds beside them.
    for budget, seconds in (("100%", 8.0), ("6.6s", 6.6), ("5000ms", 5.0)):
        plan = plan_run(studied.run, latency_budget=budget)
        assert plan.latency is not None and plan.latency_share == plan.latency / 8
        assert plan.latency <= seconds
        assert {c.form for c in plan.choices} <= {UNTOUCHED, "int"}
    assert plan_run(studied.run, "1.23x-faster").limits == {"latency": pytest.approx(8 / 1.23)}
    assert [c.form for c in plan.choices] == ["int"] * 5
    with pytest.raises(UnreachableBudget, match="the fastest plan takes 5000 ms for one sample, of 8000 ms"):
        plan_run(studied.run, "2x-faster")
    both = plan_run(studied.run, "20%", latency_budget="6s")
    assert both.stored <= 0.2 * studied.stored_bytes and (both.latency or 9) <= 6


def test_without_times_the_option_is_named(tmp_path: Path, quick: dict[str, Any]) -> None:
    opened = study(Net(), batches(), tmp_path / "run", **quick)
    with pytest.raises(TersorError, match="--latency"):
        opened.plan("40ms")
    assert opened.plan("20%").latency is None


def test_compress_times_what_it_needs(tmp_path: Path, quick: dict[str, Any]) -> None:
    result = compress(Net(), batches(), "10s", tmp_path / "out", held_out=batches(2), **quick)
    assert result.plan.latency is not None and result.plan.latency < 10
    judged = result.judgement
    assert judged is not None and judged.latency_of_one is not None
    assert judged.predicted_speed == result.plan.latency_share
