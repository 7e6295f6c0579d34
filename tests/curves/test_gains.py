"""Scouts measure a probe of every form, other sites one; what these borrow is what scouts say of the difference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tersor.curves.scouts import scouts_of
from tersor.steps import Study, study

BLOCKS = 9


class Deep(nn.Module):
    """Nine layers of one shape: two of them are scouts."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(BLOCKS))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x


def studied(run: Path, forms: tuple[str, ...], **options: Any) -> Study:
    torch.manual_seed(0)
    net, generator = Deep(), torch.Generator().manual_seed(0)
    batches = [torch.randn(40, 64, generator=generator) for _ in range(4)]
    damping = {"inputs": 0.03, "gradients": 0.3, "frequencies": 0.3}
    return study(net, batches, run, forms=forms, divergence="mse", damping=damping, workers=1, **options)


def gains(opened: Study, name: str) -> dict[str, Any]:
    found: dict[str, Any] = opened.run.get(f"gain/{name}")
    return found


def test_sites_that_are_no_scouts_measure_one_probe_and_borrow_the_others(tmp_path: Path) -> None:
    opened = studied(tmp_path / "run", ("int", "coded", "lowrank"))
    scouts = [site.name for site in scouts_of(opened.sites)]
    assert len(scouts) == 2 and len(opened.sites) == BLOCKS
    measured = {site.name: gains(opened, site.name)["by_form"] for site in opened.sites}
    for site in opened.sites:
        assert measured[site.name].keys() == ({"int", "coded", "lowrank"} if site.name in scouts else {"coded"})
        if site.name in scouts:
            continue
        for form in ("int", "lowrank"):
            ratios = [measured[scout][form] / measured[scout]["coded"] for scout in scouts]
            expected = measured[site.name]["coded"] * np.sqrt(np.prod(ratios))
            assert opened.run.gain(site.name, form) == pytest.approx(expected)
        assert opened.run.gain(site.name, "a form without a probe") == opened.run.gain(site.name, "int")


def test_a_form_that_comes_later_is_measured_at_scouts_alone_unless_it_leads(tmp_path: Path) -> None:
    studied(tmp_path / "run", ("lowrank",)).run.close()
    opened = studied(tmp_path / "run", ("lowrank", "int"))
    other = next(site.name for site in opened.sites if site not in scouts_of(opened.sites))
    assert gains(opened, other)["by_form"].keys() == {"lowrank", "int"}  # of the two that of integers leads
    before = gains(opened, other)["by_form"]["int"]
    opened.run.close()
    opened = studied(tmp_path / "run", ("lowrank", "int", "trellis"))
    assert gains(opened, other)["by_form"].keys() == {"lowrank", "int"}
    assert gains(opened, other)["borrowed"].keys() == {"trellis"}
    assert opened.run.gain(other, "int") == before
