"""Sites are found by walking modules; everything else is listed, and nothing is counted twice."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from tersor.models import open_model, walk
from tersor.models.files import file_bytes
from tersor.models.module import ModuleModel
from tiny_models import configurations

KINDS = {
    "gpt2": {"table", "transposed"},
    "mixtral": {"table", "linear", "experts"},
    "qwen2-moe": {"table", "linear", "experts"},
    "qwen3-moe": {"table", "linear", "experts"},
}


@pytest.mark.parametrize("name", configurations())
def test_every_weight_is_a_site_or_listed(name: str) -> None:
    module = configurations()[name]()
    found = walk(module)
    assert {s.kind for s in found.sites} == KINDS.get(name, {"table", "linear"})
    total = sum(p.numel() for p in module.parameters())  # tied weights once
    assert sum(s.parameters for s in found.sites) + sum(n for _, n, _, _ in found.untouched) == total
    assert all(s.parameters >= 4096 for s in found.sites)
    small = [p.numel() for p in module.parameters() if p.dim() > 1 and p.numel() >= 4096]
    assert len(found.sites) == len(small)


@pytest.mark.parametrize("name", ["gpt2", "mixtral", "llama-tied"])
def test_matrices_and_parameters_are_inverse(name: str) -> None:
    module = configurations()[name]()
    for site in walk(module).sites:
        matrices = site.matrices(module)
        assert matrices.shape == (site.stack, *site.shape)
        assert torch.equal(site.to_parameter(matrices), site.parameter(module))


def test_convolutions_are_unfolded() -> None:
    module = nn.Sequential(nn.Conv2d(16, 64, 3, groups=2), nn.Conv1d(64, 64, 2), nn.ConvTranspose2d(64, 64, 2))
    found = walk(module)
    assert [(s.kind, s.shape) for s in found.sites] == [("convolution", (64, 72)), ("convolution", (64, 128))]
    assert ("2.weight", 64 * 64 * 4, 64 * 64 * 16, "not a weight of a known kind") in found.untouched


def test_tied_weights_are_one_site_with_all_their_places() -> None:
    module = configurations()["llama-tied"]()
    table = next(s for s in walk(module).sites if s.kind == "table")
    assert table.places == (("model.embed_tokens", "weight"), ("lm_head", "weight"))


def test_the_size_of_a_file_is_known_before_it_is_written(
    make_checkpoint: Callable[..., Path],
) -> None:
    folder = make_checkpoint("mixtral", torch.bfloat16)
    size = (folder / "model.safetensors").stat().st_size
    model = open_model(folder)
    assert model.identity.stored_bytes == size
    entries = model.checkpoint.entries  # type: ignore[attr-defined]
    assert file_bytes((name, shape, dtype) for name, (_, shape, dtype) in entries.items()) == size


def test_a_module_is_told_from_another_by_its_values() -> None:
    net = nn.Linear(64, 64)
    first = ModuleModel(net).identity.fingerprint
    assert ModuleModel(net).identity.fingerprint == first
    with torch.no_grad():
        net.weight[0, 0] += 1
    assert ModuleModel(net).identity.fingerprint != first
