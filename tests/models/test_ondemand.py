"""Weights on demand: the outputs of the whole model, with one block of it in memory."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tersor import TersorError
from tersor.models import open_model, walk
from tersor.models.compare import substituted
from tersor.models.ondemand import held, values_of
from tiny_models import draw_model, token_batches

ARCHITECTURES = ("llama-tied", "gpt2", "opt", "t5", "bert", "bert-masked", "roberta", "qwen3")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_outputs_are_those_of_the_whole_model_to_the_bit(name: str, make_checkpoint: Callable[..., Path]) -> None:
    folder = make_checkpoint(name, torch.bfloat16)
    whole, model = open_model(folder), open_model(folder, on_demand=True)
    for given in token_batches(name):
        (batch,) = whole.batches(_data(given), None, 8, 3)
        with torch.no_grad():
            assert torch.equal(model.outputs(batch), whole.outputs(batch))
    assert all(parameter.is_meta for parameter in model.module.parameters())


def _data(batch: dict[str, torch.Tensor]) -> object:
    from tersor.data import Data

    return Data("tokens", batches=[batch])


def test_one_block_is_in_memory_at_a_time(tmp_path: Path) -> None:
    draw_model("llama-tied", layers=4).save_pretrained(tmp_path)
    model = open_model(tmp_path, on_demand=True)
    layers = model.module.model.layers
    seen = []

    def look(*_: object) -> None:
        seen.append([any(not p.is_meta for p in layer.parameters()) for layer in layers])

    for layer in layers:
        layer.mlp.register_forward_hook(look)
    with torch.no_grad():
        model.module(**token_batches()[0])
    assert seen == [[number == other for other in range(4)] for number in range(4)]


def test_sites_and_their_weights_are_those_of_the_whole_model(make_checkpoint: Callable[..., Path]) -> None:
    folder = make_checkpoint("llama-tied")
    whole, model = open_model(folder), open_model(folder, on_demand=True)
    assert walk(model.module) == walk(whole.module)
    for site in walk(whole.module).sites:
        assert torch.equal(site.matrices(model.module), site.matrices(whole.module))


def test_another_weight_may_stand_in(make_checkpoint: Callable[..., Path]) -> None:
    folder = make_checkpoint("llama-tied")
    batch = token_batches()[0]
    found = []
    for model in (open_model(folder), open_model(folder, on_demand=True)):
        site = next(s for s in walk(model.module).sites if s.name.endswith("gate_proj"))
        with torch.no_grad():
            before = model.outputs(batch)
            with substituted(model, site, torch.zeros(1, *site.shape)):
                found.append(model.outputs(batch))
            assert torch.equal(before, model.outputs(batch)) and not torch.equal(before, found[-1])
    assert torch.equal(*found)


def test_a_tied_weight_is_read_once_while_it_is_held(make_checkpoint: Callable[..., Path]) -> None:
    module = open_model(make_checkpoint("llama-tied"), on_demand=True).module
    with held(module):
        assert module.lm_head.weight is module.model.embed_tokens.weight
        assert not module.lm_head.weight.is_meta
        with held(module.lm_head):
            assert not module.lm_head.weight.is_meta
        assert not module.lm_head.weight.is_meta
    assert module.lm_head.weight.is_meta


def test_a_copy_reads_for_itself(make_checkpoint: Callable[..., Path]) -> None:
    module = open_model(make_checkpoint("gpt2"), on_demand=True).module
    twin = copy.deepcopy(module)
    with held(twin):
        assert not any(p.is_meta for p in twin.parameters())
        assert all(p.is_meta for p in module.parameters())
    with torch.no_grad():
        assert torch.equal(twin(**token_batches()[0]).logits, module(**token_batches()[0]).logits)


FACTORY = """
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU()) for _ in range(3)])
"""


def test_a_module_of_its_own_with_buffers_that_are_kept(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(FACTORY)
    namespace: dict[str, Callable[[], nn.Module]] = {}
    exec(FACTORY, namespace)
    module = namespace["net"]()
    module.train()(torch.randn(32, 64))
    save_file(module.state_dict(), tmp_path / "net.safetensors")
    spec, weights = f"{tmp_path / 'net.py'}:net", tmp_path / "net.safetensors"
    whole, model = (open_model(spec, weights=weights, on_demand=lazy) for lazy in (False, True))
    assert model.identity == whole.identity
    x = torch.randn(4, 64)
    with torch.no_grad():
        assert torch.equal(model.module(x), whole.module(x))


def test_a_weight_under_another_name_is_refused(make_checkpoint: Callable[..., Path]) -> None:
    folder = make_checkpoint("llama-tied")
    tensors = load_file(folder / "model.safetensors")
    tensors["strange"] = tensors.pop("model.norm.weight")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(TersorError, match=r"model\.norm\.weight under that name"):
        open_model(folder, on_demand=True)


def test_a_weight_of_another_shape_is_refused(make_checkpoint: Callable[..., Path]) -> None:
    folder = make_checkpoint("llama-tied")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(63)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(TersorError, match=r"model\.norm\.weight has shape \(63,\)"):
        open_model(folder, on_demand=True)


def test_values_of_a_parameter_in_memory_are_its_own() -> None:
    parameter = nn.Parameter(torch.ones(3))
    assert values_of(parameter).data_ptr() == parameter.data_ptr()
