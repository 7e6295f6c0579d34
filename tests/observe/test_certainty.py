"""A model that is too sure of its calibration data is asked at a higher temperature."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from tersor.models.divergence import DIVERGENCES, softened
from tersor.models.module import Example, ModuleModel
from tersor.observe.certainty import Certainty, certainty, mean_entropy


def model_of(weight: torch.Tensor) -> ModuleModel:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.data = weight
    return ModuleModel(layer)


def batch(scale: float, seed: int = 0) -> Example:
    return Example((scale * torch.randn(256, 6, generator=torch.Generator().manual_seed(seed)),))


def test_the_entropy_of_a_guess_and_of_a_certainty() -> None:
    assert mean_entropy(torch.zeros(3, 8), 1.0) == pytest.approx(math.log(8))
    assert mean_entropy(1000 * torch.eye(4), 1.0) == pytest.approx(0, abs=1e-6)
    assert mean_entropy(1000 * torch.eye(4), 1e6) == pytest.approx(math.log(4), rel=1e-3)


def test_the_temperature_undoes_a_scale_of_the_logits() -> None:
    model = model_of(torch.randn(5, 6))
    found = certainty(model, [batch(8.0)], [batch(2.0)])
    assert found.temperature == pytest.approx(4.0, rel=0.01)
    assert found.fitted < found.checked and found.classes == 5
    assert certainty(model, [batch(2.0)], [batch(2.0)]).temperature == 1
    assert certainty(model, [batch(2.0)], [batch(8.0)]).temperature == 1


def test_certainty_is_told_from_doubt() -> None:
    assert Certainty(0.001, 0.002, 10, 1.0).is_certain
    assert not Certainty(0.001, 0.2, 10, 3.0).is_certain


def test_the_softened_probe_has_the_softened_covariance() -> None:
    """`E[g g^T]` is `diag(p) - p p^T` with the probabilities at the temperature."""
    logits, temperature = torch.tensor([4.0, 0.0, -2.0]), 3.0
    output = logits.repeat(40_000, 1).requires_grad_()
    probe = softened(DIVERGENCES["kl"], temperature).probe
    (gradients,) = torch.autograd.grad(probe(output, torch.Generator().manual_seed(0)), output)
    p = (logits / temperature).softmax(-1)
    assert torch.allclose(gradients.T @ gradients / len(output), p.diag() - p.outer(p), atol=0.01)
    assert softened(DIVERGENCES["kl"], 1.0) is DIVERGENCES["kl"]
