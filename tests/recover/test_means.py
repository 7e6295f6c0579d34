"""Shifted biases: the means of the original on the batch that they were shifted on, and not a byte more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tersor
from tersor import TersorError
from tersor.recover import means_of, shift_biases
from tersor.steps import build_plan, compress, study
from tiny_models import ConvNet, draw_model, image_batches, small_net, token_batches, vector_batches


def _spoilt(module: nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() > 1:
                parameter.copy_((parameter * 4).round() / 4)


@pytest.mark.parametrize("name", ["linear", "images", "bert"])
def test_every_layer_gives_its_old_means(name: str) -> None:
    torch.manual_seed(0)
    module = {"linear": small_net, "images": ConvNet, "bert": lambda: draw_model("bert", layers=3)}[name]().eval()
    batch = {"linear": vector_batches(1)[0], "images": image_batches(1)[0], "bert": token_batches(rows=6)[0]}[name]
    batch = dict(batch) if isinstance(batch, dict) else {"input" if name == "linear" else "x": batch}

    def run() -> Any:
        return module(**batch)

    expected = means_of(module, run)
    assert len(expected) >= 3
    _spoilt(module)
    before = means_of(module, run)
    shift_biases(module, run, expected)
    after = means_of(module, run)
    for layer, mean in expected.items():
        assert torch.allclose(after[layer], mean, atol=1e-5), layer
    assert any(not torch.allclose(before[layer], mean, atol=1e-3) for layer, mean in expected.items())


def test_padding_does_not_count() -> None:
    module = draw_model("bert", layers=2)
    (batch,) = token_batches(count=1, rows=4)
    mask = torch.ones_like(batch["input_ids"])
    mask[:, 5:] = 0
    short = {"input_ids": batch["input_ids"][:, :5]}
    padded = {"input_ids": batch["input_ids"], "attention_mask": mask}
    with_padding = means_of(module, lambda: module(**padded), [mask])
    without = means_of(module, lambda: module(**short))
    layer = "encoder.layer.0.output.LayerNorm"
    assert torch.allclose(with_padding[layer], without[layer], atol=1e-5)
    assert not torch.allclose(means_of(module, lambda: module(**padded))[layer], without[layer], atol=1e-3)


def test_a_layer_that_runs_twice_is_left_alone() -> None:
    shared = nn.Linear(8, 8)
    module = nn.Sequential(shared, nn.ReLU(), shared, nn.Linear(8, 8))
    assert set(means_of(module, lambda: module(torch.randn(16, 8)))) == {"3"}


def test_an_artifact_keeps_its_shifted_biases_and_its_size(quick: dict[str, Any], tmp_path: Path) -> None:
    sizes, off = [], []
    batches = vector_batches(6)
    with torch.no_grad():
        expected = small_net()(batches[0]).mean(0)
    for recover in (False, True):
        out = tmp_path / f"{recover}"
        result = compress(
            small_net(),
            batches,
            "12%",
            out,
            run=tmp_path / f"run-{recover}",
            divergence="mse",
            recover=recover,
            **quick,
        )
        sizes.append(result.weights_bytes)
        with torch.no_grad():
            off.append(float((tersor.load(out, small_net())(batches[0]).mean(0) - expected).norm()))
    assert sizes[0] == sizes[1]
    assert off[1] < 1e-5 < off[0]


def test_a_model_without_biases_is_refused(quick: dict[str, Any], tmp_path: Path) -> None:
    draw_model("llama-tied").save_pretrained(tmp_path / "model")
    opened = study(tmp_path / "model", token_batches(count=5), tmp_path / "run", **quick)
    with pytest.raises(TersorError, match="no layer with a bias"):
        build_plan(opened, opened.plan("30%"), tmp_path / "out", recover=token_batches()[0], workers=1)
    assert not (tmp_path / "out").exists()
