"""Half the squared norm of a divergence's probe predicts the divergence of a small change of the output."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tersor.errors import TersorError
from tersor.models import DIVERGENCES, Divergence, custom_divergence
from tersor.models.divergence import divergence_named


def squared_euclid(original: Tensor, new: Tensor) -> Tensor:
    weights = torch.arange(1.0, original[0].numel() + 1)
    return ((new - original).flatten(1).square() * weights).sum(1)


def soft_kl(original: Tensor, new: Tensor) -> Tensor:
    p, q = original.log_softmax(-1), new.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


CASES: list[tuple[Divergence, tuple[int, ...]]] = [
    (DIVERGENCES["kl"], (6, 5)),
    (DIVERGENCES["kl"], (3, 2, 5)),
    (DIVERGENCES["cosine"], (6, 5)),
    (DIVERGENCES["mse"], (6, 5)),
    (DIVERGENCES["mse"], (6,)),
    (DIVERGENCES["bce"], (6,)),
    (DIVERGENCES["bce"], (6, 2)),
    (custom_divergence(squared_euclid), (6, 5)),
    (custom_divergence(soft_kl), (6, 5)),
]
each_case = pytest.mark.parametrize(("divergence", "shape"), CASES, ids=lambda c: getattr(c, "name", str(c)))


def predicted_and_measured(divergence: Divergence, shape: tuple[int, ...], draws: int = 4000) -> tuple[float, float]:
    """Half the mean squared product of a change with the probe's gradient, and the divergence of the change."""
    output = torch.randn(shape)
    change = 0.01 * torch.randn(shape)
    generator = torch.Generator().manual_seed(5)
    many = output[None].expand(draws, *shape).flatten(0, 1).clone().requires_grad_()
    divergence.probe(many, generator).backward()
    assert many.grad is not None
    products = (many.grad.view(draws, shape[0], -1) * change.reshape(1, shape[0], -1)).sum(2)
    measured = divergence.compare(output.double(), output.double() + change.double())
    return float(0.5 * products.square().mean(0).sum()), float(measured.sum())


@each_case
def test_the_probe_has_the_hessian_as_covariance(divergence: Divergence, shape: tuple[int, ...]) -> None:
    predicted, measured = predicted_and_measured(divergence, shape)
    assert predicted == pytest.approx(measured, rel=0.08)


@each_case
def test_it_is_zero_at_zero_and_one_value_a_prediction(divergence: Divergence, shape: tuple[int, ...]) -> None:
    output = torch.randn(shape)
    same, other = divergence.compare(output, output.clone()), divergence.compare(output, output + torch.randn(shape))
    assert same.shape == other.shape == (shape[0],)
    assert same.abs().max() < 1e-6 and other.min() > 0


@each_case
def test_a_probe_follows_its_generator(divergence: Divergence, shape: tuple[int, ...]) -> None:
    output = torch.randn(shape)
    first, second, third = (divergence.probe(output, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert first == second and first != third


def test_known_values() -> None:
    even, sure = torch.zeros(1, 2), torch.tensor([[40.0, 0.0]])
    assert DIVERGENCES["kl"].compare(sure, even).item() == pytest.approx(0.6931472, rel=1e-6)
    east, north = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 3.0]])
    assert DIVERGENCES["cosine"].compare(east, north).item() == pytest.approx(1.0)
    assert DIVERGENCES["mse"].compare(east, north).item() == pytest.approx((4 + 9) / 2)
    assert DIVERGENCES["bce"].compare(torch.tensor([40.0]), torch.tensor([0.0])).item() == pytest.approx(0.6931472)


def test_a_divergence_of_ones_own_is_refused_for_too_many_outputs() -> None:
    with pytest.raises(TersorError, match="at most 512 outputs"):
        custom_divergence(squared_euclid).probe(torch.zeros(2, 513), torch.Generator())


def test_an_unknown_divergence_offers_the_nearest() -> None:
    with pytest.raises(TersorError, match="did you mean 'cosine'"):
        divergence_named("cosin")
