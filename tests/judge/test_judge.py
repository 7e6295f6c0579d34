"""A model judged against itself loses nothing; against another, what brute force says."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tersor.data import Data
from tersor.judge import judge
from tersor.judge.costs import peak_bytes, resident_bytes
from tersor.models import Model, open_model
from tersor.models.module import ModuleModel
from tersor.steps import build_plan, judge_artifact, study


def batches_of(model: Model, items: list[Any]) -> list[Any]:
    return list(model.batches(Data("test", batches=items), None, 0, 0))


@pytest.mark.parametrize("name", ["llama-tied", "bert", "bert-classifier", "bert-masked", "t5"])
def test_a_model_against_itself(name: str, make_checkpoint: Callable[..., Path], tokens: Callable[..., Any]) -> None:
    model = open_model(make_checkpoint(name))
    items = tokens(name)
    if name == "bert-masked":
        items = [{**b, "attention_mask": torch.ones_like(b["input_ids"]), "labels": b["input_ids"]} for b in items]
    if name == "bert-classifier":
        items = [{**b, "labels": torch.tensor([0, 1, 2])} for b in items]
    found = judge(model, model, batches_of(model, items), stored=(10, 10), flops=(5, 5))
    assert (found.divergence.value, found.divergence.low, found.divergence.high) == pytest.approx((0, 0, 0), abs=1e-6)
    scores = {s.name: s for s in found.scores}
    names = {
        "bert": set(),
        "bert-classifier": {"accuracy"},
        "llama-tied": {"perplexity"},
        "bert-masked": {"perplexity"},
    }
    assert scores.keys() - {"agreement of top-1"} == names.get(name, set())
    for score in scores.values():
        if score.difference is None:
            assert score.new.value == 1.0
        else:
            assert score.difference.value == score.difference.low == score.difference.high == 0.0
    assert found.original == found.new
    assert found.samples == 9


def test_the_divergence_of_another_model(images: Callable[..., list[Any]], conv_net: Callable[[], nn.Module]) -> None:
    module = conv_net()
    other = copy.deepcopy(module)
    with torch.no_grad():
        other.head.weight.add_(0.05 * torch.randn_like(other.head.weight))  # type: ignore[union-attr, operator]
    original, new = open_model(module), open_model(other)
    items = images(labels=True)
    found = judge(original, new, batches_of(original, items), stored=(10, 5), flops=(4, 2), predicted=0.25)
    with torch.no_grad():
        p, q = (torch.cat([m.module(x) for x, _ in items]).double().log_softmax(-1) for m in (original, new))
    assert found.divergence.value == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)
    assert found.divergence.low < found.divergence.value < found.divergence.high
    scores = {s.name: s for s in found.scores}
    right = [float((t.argmax(-1) == torch.cat([y for _, y in items])).double().mean()) for t in (p, q)]
    assert [scores["accuracy"].original.value, scores["accuracy"].new.value] == pytest.approx(right)
    assert (found.samples, found.predictions, found.predicted, found.unit) == (30, 30, 0.25, "nats")
    assert (found.original.stored, found.new.stored, found.original.flops, found.new.flops) == (10, 5, 4, 2)


def test_causal_perplexity_is_that_of_the_next_tokens(
    make_checkpoint: Callable[..., Path], tokens: Callable[..., list[dict[str, Tensor]]]
) -> None:
    model = open_model(make_checkpoint("llama-tied"))
    items = tokens()
    found = judge(model, model, batches_of(model, items), stored=(1, 1), flops=(1, 1))
    (perplexity,) = [s for s in found.scores if s.name == "perplexity"]
    with torch.no_grad():
        loss = [model.module(**b, labels=b["input_ids"]).loss for b in items]
    assert perplexity.original.value == pytest.approx(float(torch.stack(loss).mean().exp()), rel=1e-5)


def test_bytes_of_tensors() -> None:
    module = nn.Sequential(nn.Linear(10, 20), nn.Linear(20, 10, bias=False))
    assert resident_bytes(module) == 4 * (200 + 20 + 200)
    module[1].weight = nn.Parameter(module[0].weight.data.T.clone())
    tied = nn.ModuleList([module[0], module[0]])
    assert resident_bytes(tied) == 4 * 220

    def run() -> Tensor:
        first = torch.ones(1000)
        second = first + 1
        del first
        return second * 2

    peak = peak_bytes(run, module, torch.device("cpu")) - resident_bytes(module)
    assert peak == 8000


def test_a_module_of_16_bits_is_judged_in_them(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(*[nn.Linear(64, 64) for _ in range(4)]).bfloat16()
    original = ModuleModel(copy.deepcopy(module), "mse")
    batches = [torch.randn(8, 64).bfloat16() for _ in range(5)]
    opened = study(ModuleModel(module, "mse"), batches, tmp_path / "run", forms=("int",), workers=1)
    build_plan(opened, opened.plan("40%"), tmp_path / "out", workers=1)
    assert judge_artifact(original, tmp_path / "out", batches[:2]).divergence.value > 0
