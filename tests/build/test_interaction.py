"""Whole plans are measured, and what does much of one is measured there alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tersor.build.fits import load_fit
from tersor.build.interaction import PROBED_BITS
from tersor.data import read_data
from tersor.models.compare import Reference, substituted
from tersor.plan import Limits
from tersor.steps import study


class Saturating(nn.Module):
    """Two layers; the damage of the first is bounded."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first, self.second = nn.Linear(64, 128, bias=False), nn.Linear(128, 64, bias=False)
        for layer in (self.first, self.second):
            layer.weight.data = torch.randn(layer.weight.shape, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def batches(seed: int, count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(16, 64, generator=generator) for _ in range(count)]


def test_a_site_that_does_much_of_a_whole_plan_is_measured_there_alone(quick: dict[str, Any], tmp_path: Path) -> None:
    check = batches(1, 2)
    options = {**quick, "gains": True, "divergence": "mse", "check_data": check}
    opened = study(Saturating(), batches(0, 4), tmp_path / "run", **options)
    ((total, measured),) = opened.run.get("interaction")  # of the probed plans the first alone has bits enough
    plan = opened.planner().plan(Limits(bits=PROBED_BITS[0]))
    assert plan.divergence == pytest.approx(measured, rel=1e-4)
    assert sum(choice.divergence for choice in plan.choices) == pytest.approx(total, rel=1e-4)

    (bounded, choice), _ = zip(opened.sites, plan.choices, strict=True)
    reference = Reference(opened.model, list(opened.model.batches(read_data(check), None, 0, 16)))
    with substituted(opened.model, bounded, load_fit(opened.run, bounded, choice).matrices()):
        alone = reference.divergence()
    first, second = (opened.run.gains(site.name) for site in opened.sites)
    ((at, growth),) = first.fact["growth"]
    assert growth < 0.5  # the probe, of 4 bits, foretells more than twice what is done
    assert at * first.of("int") * growth == choice.divergence == pytest.approx(alone, rel=1e-4)
    assert "growth" not in second.fact  # by the probes it does a seventh of the sum
