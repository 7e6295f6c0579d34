"""Modules of one's own: a small convolutional net, built, saved, loaded by its factory, compiled, cast."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import tersor
from tersor.errors import TersorError
from tersor.steps import compress, open_study, study

FACTORY = """
from torch import nn

MEAN, STD = (0.5, 0.5, 0.5), (0.2, 0.2, 0.2)


def net():
    return nn.Sequential(nn.Conv2d(3, 48, 3, padding=1), nn.ReLU(), nn.Conv2d(48, 48, 3, groups=3), nn.ReLU(),
                         nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(768, 10))


def broken():
    raise ValueError("no such thing")


def number():
    return 7
"""
Images = Callable[..., list[Any]]
Nets = Callable[[], nn.Module]


def outputs(module: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = module(x)
    return found


@pytest.mark.parametrize("form", ["int", "coded", "trellis", "lowrank"])
def test_round_trip(form: str, conv_net: Nets, images: Images, quick: dict[str, Any], tmp_path: Path) -> None:
    options = {**quick, "forms": (form,)} | ({"settings": {"lowrank": [{"rank": 8}]}} if form == "lowrank" else {})
    module, batches = conv_net(), images()
    for child in module.modules():
        if isinstance(child, nn.BatchNorm2d):
            child.running_mean.normal_()  # type: ignore[union-attr]
    original = copy.deepcopy(module).eval()
    result = compress(module, batches, "30%", tmp_path / "out", **options)
    path = tmp_path / "out" / "model.safetensors"
    assert result.plan.stored == path.stat().st_size <= 0.3 * result.study.stored_bytes
    assert {c.site for c in result.plan.choices if c.form == form} >= {"grouped", "circular"}
    expected = outputs(module, batches[0])
    for source in (conv_net, conv_net()):
        assert torch.equal(outputs(tersor.load(tmp_path / "out", model=source), batches[0]), expected)
    assert (expected - outputs(original, batches[0])).abs().max() > 0
    moved = copy.deepcopy(tersor.load(tmp_path / "out", model=conv_net)).to(torch.bfloat16)
    found = outputs(moved, batches[0].bfloat16())
    assert found.dtype == torch.bfloat16 and (found.float() - expected).norm() < 0.1 * expected.norm()


def test_from_a_file_with_its_weights(images: Images, quick: dict[str, Any], tmp_path: Path) -> None:
    file, weights = tmp_path / "nets.py", tmp_path / "net.safetensors"
    file.write_text(FACTORY)
    spec = f"{file}:net"
    namespace: dict[str, Any] = {}
    exec(FACTORY, namespace)
    net = namespace["net"]().eval()
    save_file(net.state_dict(), weights, {"format": "pt"})
    arrays = torch.randint(0, 255, (20, 8, 8, 3), dtype=torch.uint8).numpy()
    import numpy as np

    np.savez(tmp_path / "images.npz", x=arrays, y=np.arange(20) % 10)
    result = compress(
        spec, tmp_path / "images.npz", "40%", tmp_path / "out", weights=weights, held_out=tmp_path / "images.npz",
        batch_size=4, **quick,
    )  # fmt: skip
    assert result.study.stored_bytes == weights.stat().st_size
    assert result.plan.stored == (tmp_path / "out" / "model.safetensors").stat().st_size
    x = (torch.tensor(arrays).permute(0, 3, 1, 2) / 255 - 0.5) / 0.2
    loaded = tersor.load(tmp_path / "out", model=spec)
    found = (outputs(net, x).log_softmax(-1), outputs(loaded, x).log_softmax(-1))
    divergence = (found[0].exp() * (found[0] - found[1])).sum(-1).mean()
    assert result.judgement is not None
    assert result.judgement.divergence.value == pytest.approx(float(divergence), rel=1e-3, abs=2e-8)
    assert "accuracy" in {s.name for s in result.judgement.scores}
    with pytest.raises(TersorError, match="was made from a module of your own"):
        tersor.load(tmp_path / "out")


@pytest.mark.parametrize(
    ("spec", "named"),
    [
        ("nets.py:broken", "failed: no such thing"),
        ("nets.py:number", "returned int"),
        ("nets.py:missing", "no function 'missing'"),
        ("gone.py:net", "gone.py .* does not exist"),
        ("no.such.package:net", "cannot be imported"),
        ("nothing", "neither a model folder nor a factory"),
    ],
)
def test_bad_factories(spec: str, named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("nets.py").write_text(FACTORY)
    with pytest.raises(TersorError, match=named):
        tersor.open_model(spec)


def test_weights_that_do_not_fit_their_factory(tmp_path: Path) -> None:
    (tmp_path / "nets.py").write_text(FACTORY)
    save_file({"0.weight": torch.zeros(48, 3, 5, 5)}, tmp_path / "w.safetensors")
    with pytest.raises(TersorError, match=r"w\.safetensors does not fit"):
        tersor.open_model(f"{tmp_path}/nets.py:net", weights=tmp_path / "w.safetensors")


class Shared(nn.Module):
    """Two layers that share one weight, and no bias anywhere: built, it has no parameter left."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh())


def test_tied_weights_are_counted_stored_and_approximated_once(quick: dict[str, Any], tmp_path: Path) -> None:
    module, batches = Shared(), [torch.randn(6, 64) for _ in range(4)]
    result = compress(module, batches, "30%", tmp_path / "out", held_out=batches, divergence="mse", **quick)
    assert [s.name for s in result.study.sites] == ["first"] and len(result.study.sites[0].places) == 2
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert all(name.startswith("first.operator.") for name in stored)
    assert result.study.stored_bytes < 4 * 64 * 64 + 500
    assert not list(module.parameters()) and result.judgement is not None
    loaded: Any = tersor.load(tmp_path / "out", model=Shared)
    assert torch.equal(outputs(loaded, batches[0]), outputs(module, batches[0]))
    assert loaded.second.weight_operator() is loaded.first.weight_operator()
    copied: Any = copy.deepcopy(loaded)
    assert copied.second.weight_operator() is copied.first.weight_operator()
    assert copied.first.weight_operator() is not loaded.first.weight_operator()


def test_a_built_model_compiles_to_machine_code(quick: dict[str, Any], tmp_path: Path) -> None:
    if not any(shutil.which(c) for c in ("g++", "clang++", "c++")):
        pytest.skip("no C++ compiler for torch.compile")
    module = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    batches = [torch.randn(6, 64) for _ in range(4)]
    compress(module, batches, "40%", tmp_path / "out", divergence="mse", **quick)
    torch.compiler.reset()
    found = outputs(torch.compile(module, fullgraph=True), batches[0])  # type: ignore[arg-type]
    assert torch.allclose(found, outputs(module, batches[0]), rtol=1e-4, atol=1e-5)


def test_a_module_of_another_shape_is_refused(
    conv_net: Nets, images: Images, quick: dict[str, Any], tmp_path: Path
) -> None:
    compress(conv_net(), images(), "60%", tmp_path / "out", **quick)
    with pytest.raises(TersorError, match=r"made from another model"):
        tersor.load(tmp_path / "out", model=nn.Sequential(nn.Linear(64, 64)))
    wider = conv_net()
    wider.head = nn.Linear(128, 12)
    with pytest.raises(TersorError, match=r"head\.bias has shape"):
        tersor.load(tmp_path / "out", model=wider)


class Positions(nn.Module):
    """A table added to the input, shaped like one expert: used, but not by a product that can be watched."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.randn(1, 64, 64))
        self.layer = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x + self.positions).mean(1)


def test_a_weight_that_cannot_be_watched_stays_as_it_is(quick: dict[str, Any], tmp_path: Path) -> None:
    module, batches = Positions(), [torch.randn(6, 64, 64) for _ in range(3)]
    kept = module.positions.detach().clone()
    opened = study(module, batches, tmp_path / "run", divergence="mse", **quick)
    assert opened.run.get("unseen_sites") == ["positions"]
    result = compress(module, batches, "70%", tmp_path / "out", run=tmp_path / "run", divergence="mse", **quick)
    assert {c.site: c.form for c in result.plan.choices} == {"positions": "untouched", "layer": "int"}
    assert torch.equal(module.positions, kept)


def test_include_and_exclude(conv_net: Nets, tmp_path: Path) -> None:
    def names(**patterns: Any) -> list[str]:
        folder = tmp_path / str(patterns).translate({ord(c): "_" for c in "*[]{}' :,"})
        return [s.name for s in open_study(conv_net(), folder, **patterns).sites]

    assert names() == ["grouped", "circular", "point"]
    assert names(include=["*o*"]) == ["grouped", "point"]
    assert names(exclude=["gr*", "point"]) == ["circular"]
    for patterns in ({"include": ["conv*"]}, {"exclude": ["point", "typo*"]}):
        with pytest.raises(TersorError, match="matches no site; site names look like grouped"):
            names(**patterns)


def test_a_model_that_is_one_layer(tmp_path: Path, quick: dict[str, Any]) -> None:
    made, original = (nn.Linear(64, 64) for _ in range(2))
    original.load_state_dict(made.state_dict())
    found = compress(made, [torch.randn(16, 64) for _ in range(4)], "30%", tmp_path / "out", **quick)
    inputs = torch.randn(3, 64)
    outputs = tersor.load(tmp_path / "out", copy.deepcopy(original))(inputs).detach()
    assert torch.equal(outputs, found.study.model.module(inputs))
    assert (outputs - original(inputs)).norm() < 0.15 * original(inputs).norm()
