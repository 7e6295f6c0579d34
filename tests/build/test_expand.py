"""Plain weights in the place of operators: same outputs, same layers, same names, ties kept, nothing of Tersor left."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tersor
from tersor.build import operators_of
from tersor.build.layers import ApproximateLayer, StandIn
from tersor.errors import TersorError
from tersor.steps import compress

Maker = Callable[..., Path]


def outputs(module: nn.Module, batch: Any) -> Tensor:
    with torch.no_grad():
        result = module(**batch) if isinstance(batch, dict) else module(batch)
    found: Tensor = (
        result if isinstance(result, Tensor) else result[0] if not hasattr(result, "logits") else result.logits
    )
    return found


def kinds(module: nn.Module) -> dict[str, type]:
    return {name: type(child) for name, child in module.named_modules()}


def shapes(module: nn.Module) -> dict[str, tuple[Any, torch.dtype]]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize("form", ["int", "coded"])
@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "t5", "bert", "gemma", "opt", "mixtral"])
def test_a_dense_model_is_the_original_but_for_its_values(
    name: str, form: str, make_checkpoint: Maker, tokens: Callable[..., Any], quick: dict[str, Any], tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    source = make_checkpoint(name)
    result = compress(source, tokens(name), "5bits", tmp_path / "out", **{**quick, "forms": (form,)})
    batch = tokens(name)[0]
    small, dense = tersor.load(tmp_path / "out"), tersor.load(tmp_path / "out", mode="dense")
    original = type(result.study.model.module).from_pretrained(source).eval()
    assert kinds(dense) == kinds(original) and shapes(dense) == shapes(original)
    assert not operators_of(dense) and not dense.training
    assert torch.allclose(outputs(dense, batch), outputs(small, batch), rtol=1e-5, atol=1e-6)
    assert len({id(p) for p in dense.parameters()}) == len({id(p) for p in original.parameters()})
    again = type(dense).from_pretrained(tmp_path / "out").dequantize()
    assert torch.equal(outputs(again, batch), outputs(dense, batch))
    again.save_pretrained(tmp_path / "plain")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "plain")
    assert not hasattr(config, "quantization_config")
    assert torch.equal(outputs(type(dense).from_pretrained(tmp_path / "plain"), batch), outputs(dense, batch))


@pytest.mark.parametrize("form", ["int", "lowrank"])
def test_a_module(
    form: str, conv_net: Any, images: Callable[..., list[Any]], quick: dict[str, Any], tmp_path: Path
) -> None:
    options = {**quick, "forms": (form,)} | ({"settings": {"lowrank": [{"rank": 8}]}} if form == "lowrank" else {})
    batches = images()
    compress(conv_net(), batches, "30%", tmp_path / "out", **options)
    small = tersor.load(tmp_path / "out", model=conv_net)
    dense = tersor.load(tmp_path / "out", model=conv_net, mode="dense")
    assert kinds(dense) == kinds(conv_net()) and shapes(dense) == shapes(conv_net())
    assert not any(isinstance(m, ApproximateLayer | StandIn) for m in dense.modules())
    assert torch.allclose(outputs(dense, batches[0]), outputs(small, batches[0]), rtol=1e-4, atol=1e-5)
    copied = copy.deepcopy(small)
    half = tersor.load(tmp_path / "out", model=conv_net, mode="dense", dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert torch.equal(outputs(copied, batches[0]), outputs(small, batches[0]))


def test_an_unknown_mode_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TersorError, match="in mode small or dense, not 'fast'"):
        tersor.load(tmp_path, mode="fast")
