"""Measuring from a site on gives what measuring all of the model gives, and runs less of it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tersor.data import read_data
from tersor.models import open_model
from tersor.models.compare import FEWEST, Reference, substituted
from tersor.models.sites import walk
from tiny_models import draw_model, token_batches


class Block(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(size, size), nn.ReLU(inplace=True), nn.Linear(size, size))
        self.runs = 0

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        return torch.relu_(x + self.inner(x))


class Chain(nn.Module):
    """Blocks one after another; with `skips`, the last also reads what the first gave."""

    def __init__(self, skips: bool = False, twice: bool = False) -> None:
        super().__init__()
        self.skips, self.twice = skips, twice
        self.first = nn.Linear(12, 32)
        self.blocks = nn.ModuleList(Block(32) for _ in range(4))
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        given = []
        for block in (*self.blocks, *(self.blocks[:1] if self.twice else ())):
            x = block(x)
            given.append(x.clone())
        return self.head(x + given[0] if self.skips else x)


class Stages(nn.Sequential):
    """Convolutions whose blocks give other shapes."""

    def __init__(self) -> None:
        stages: list[nn.Module] = [
            nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), nn.BatchNorm2d(b), nn.ReLU(inplace=True))
            for a, b in ((3, 16), (16, 24), (24, 32))
        ]
        super().__init__(*stages, nn.Flatten(), nn.Linear(128, 4))


class Logits(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.model = draw_model(name, layers=3)

    def forward(self, **inputs: Tensor) -> Tensor:
        found = self.model(**inputs)
        return (found.logits if hasattr(found, "logits") else found.last_hidden_state).mean(1)


def reference_of(module: nn.Module, batches: list[Any]) -> Reference:
    model = open_model(module.eval(), divergence="kl")
    return Reference(model, model.batches(read_data(batches), None, 1, 6))


def images(*shape: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(6, *shape, generator=generator) for _ in range(3)]


CASES: dict[str, Callable[[], tuple[nn.Module, list[Any]]]] = {
    "chain": lambda: (Chain(), images(12)),
    "skips": lambda: (Chain(skips=True), images(12)),
    "twice": lambda: (Chain(twice=True), images(12)),
    "stages": lambda: (Stages(), images(3, 16, 16)),
    **{
        name: partial(lambda name: (Logits(name), token_batches(name)), name)
        for name in ("llama-tied", "gpt2", "t5", "bert", "mixtral", "qwen2-moe")
    },
}


@pytest.mark.parametrize("name", CASES)
def test_a_divergence_is_the_same_from_a_site_on(name: str) -> None:
    module, batches = CASES[name]()
    reference = reference_of(module, batches)
    sites = walk(module, minimum=1).sites
    skipped = 0
    for site in (*sites, *sites[::-3]):
        new = 0.8 * site.matrices(module)
        with substituted(reference.model, site, new):
            whole = reference.divergences()
        with reference.starting_at(site), substituted(reference.model, site, new):
            part = reference.divergences()
            skipped += sum("forward" in m.__dict__ for m in module.modules())
        assert part == pytest.approx(whole, rel=1e-4, abs=1e-9), site.name
    assert skipped > 0
    assert reference.divergences() == pytest.approx(0, abs=1e-9)
    assert not any("forward" in m.__dict__ for m in module.modules())


def test_blocks_before_the_site_do_not_run() -> None:
    module = Chain()
    reference = reference_of(module, images(12))
    site = next(s for s in walk(module, minimum=1).sites if s.name == "blocks.2.inner.0")
    with reference.starting_at(site):
        before = [block.runs for block in module.blocks]  # type: ignore[union-attr]
        reference.divergence()
        after = [block.runs for block in module.blocks]  # type: ignore[union-attr]
    assert [b - a for a, b in zip(before, after, strict=True)] == [0, 0, 3, 3]


def test_a_probe_is_told_by_as_many_samples_as_it_takes() -> None:
    module, many = Chain(), torch.randn(2400, 12, generator=torch.Generator().manual_seed(0))
    reference = reference_of(module, list(many.split(6)))
    site = walk(module, minimum=1).sites[0]
    with substituted(reference.model, site, 0.8 * site.matrices(module)):
        whole = reference.divergence()
        counts = []
        for within in (0.2, 0.05, 1e-6):
            value, batches = reference.told(within)
            assert len(set(batches)) == len(batches) and value == pytest.approx(reference.divergence(batches))
            assert abs(value / whole - 1) < 4 * within + 1e-6
            counts.append(len(batches))
    assert FEWEST / 6 <= counts[0] < counts[1] < counts[2] == 400
    assert reference.told(0.05)[0] == pytest.approx(0, abs=1e-9)  # nothing was seen, so all were asked
