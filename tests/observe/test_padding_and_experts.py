"""Padding never enters a statistic, and every fused expert sees the positions routed to it, no more."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tersor.data import Data
from tersor.models import open_model, walk
from tersor.observe import Collector, collect

Maker = Callable[..., Path]
SENTENCES = [[5, 9, 17, 33], [8, 4, 60], [90, 12, 45, 7, 33, 21]]


def padded(length: int, decoder: int | None = None) -> dict[str, Tensor]:
    def rows(texts: list[list[int]], to: int) -> tuple[Tensor, Tensor]:
        ids = torch.tensor([t + [1] * (to - len(t)) for t in texts])
        return ids, torch.tensor([[1] * len(t) + [0] * (to - len(t)) for t in texts])

    ids, mask = rows(SENTENCES, length)
    if decoder is None:
        return {"input_ids": ids, "attention_mask": mask}
    answers, of_answers = rows([t[:2] for t in SENTENCES], decoder)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "decoder_input_ids": answers,
        "decoder_attention_mask": of_answers,
    }


def observed(
    folder: Path, batches: list[dict[str, Tensor]], gradients: bool, divergence: str | None = None
) -> Collector:
    model = open_model(folder, divergence=divergence)
    sites = walk(model.module, minimum=0).sites
    return collect(model, sites, model.batches(Data("test", batches=batches), None, 0, 0), gradients=gradients, seed=0)


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("name", ["bert", "distilbert", "llama-tied", "gpt2", "mixtral", "qwen3-moe", "t5"])
def test_more_padding_changes_no_summary(name: str, gradients: bool, make_checkpoint: Maker) -> None:
    folder = make_checkpoint(name)
    few, many = ((6, 6), (9, 8)) if name == "t5" else ((6,), (9,))
    first, second = (observed(folder, [padded(*lengths)], gradients) for lengths in (few, many))
    assert first.predictions == second.predictions
    assert first.summaries.keys() == second.summaries.keys()
    for key, summary in first.summaries.items():
        if "relative_attention_bias" in key[0]:
            continue  # counts pairs of positions, not positions; far too small to be a site
        other = second.summaries[key]
        assert summary.positions == other.positions, key
        for field in ("inputs", "input_sum", "weighted_inputs", "weighted_gradients"):
            a, b = (getattr(s, field).double() for s in (summary, other))
            assert torch.allclose(a, b, rtol=1e-2, atol=1e-5 * float(a.abs().max()) + 1e-12), (key, field)


def test_an_encoder_and_a_decoder_of_one_length_keep_their_own_masks(make_checkpoint: Maker) -> None:
    found = observed(make_checkpoint("t5"), [padded(6, 6)], False)
    real, of_answers = sum(len(t) for t in SENTENCES), 2 * len(SENTENCES)
    positions = {key[0]: s.positions for key, s in found.summaries.items()}
    assert positions["encoder.block.0.layer.0.SelfAttention.q"] == real
    assert positions["decoder.block.0.layer.0.SelfAttention.q"] == of_answers
    assert positions["decoder.block.0.layer.1.EncDecAttention.k"] == real


@pytest.mark.parametrize("pad", [False, True])
@pytest.mark.parametrize("name", ["mixtral", "qwen2-moe", "qwen3-moe"])
def test_each_expert_sees_what_was_routed_to_it(name: str, pad: bool, make_checkpoint: Maker) -> None:
    folder = make_checkpoint(name)
    batch = padded(7) if pad else {"input_ids": torch.randint(3, 128, (4, 8))}
    collector = observed(folder, [batch], True)
    model: Any = open_model(folder)
    experts = next(m for n, m in model.module.named_modules() if n.endswith("experts"))
    routed: list[Tensor] = []
    experts.register_forward_pre_hook(lambda _, inputs: routed.append(inputs[1]))
    with torch.no_grad():
        model.outputs(batch)
    chosen = routed[0].view(-1, 2)
    if pad:
        chosen = chosen[batch["attention_mask"].flatten().bool()]
    for parameter in ("gate_up_proj", "down_proj"):
        site = f"model.layers.0.mlp.experts.{parameter}"
        counts = [collector.summaries[site, k, "linear"].positions if (site, k, "linear") in collector.summaries else 0
                  for k in range(4)]  # fmt: skip
        assert counts == [int((chosen == k).sum()) for k in range(4)]
        assert sum(counts) == chosen.numel()


class Batched(torch.nn.Module):
    """Experts as one batched product over all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = torch.nn.Parameter(torch.randn(3, 6, 5))

    def forward(self, x: Tensor) -> Tensor:
        return torch.bmm(x.expand(3, *x.shape), self.weights).sum(0)


@pytest.mark.parametrize("gradients", [True, False])
def test_a_batched_product_is_seen_expert_by_expert(gradients: bool) -> None:
    model, x = open_model(Batched(), divergence="mse"), torch.randn(7, 6)
    sites = walk(model.module, minimum=0).sites
    found = collect(model, sites, model.batches(Data("x", batches=[x]), None, 0, 0), gradients=gradients, seed=0)
    assert sites[0].kind == "experts" and sites[0].stack == 3
    for k in range(3):
        summary = found.summaries["weights", k, "linear"]
        assert summary.positions == 7 and found.rows_are_inputs["weights", k, "linear"]
        assert torch.allclose(summary.inputs.double(), (x.T @ x).double(), rtol=1e-4)
        assert summary.has_gradients == gradients
