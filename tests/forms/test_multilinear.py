"""Networks of factors: contractions, whitening mode by mode, and least squares for one factor given the others."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from tersor.forms.multilinear import Frame, improve, marginals, solve
from tersor.forms.network import Network, _pairs, contract
from tersor.forms.tensor_train import chain
from tersor.metrics import Metric, Side

Maker = Callable[..., Metric]
NETWORKS = {
    "kronecker": Network(("kac", "kbd"), "ab", "cd", {"a": 4, "b": 3, "c": 5, "d": 2, "k": 3}),
    "tt": chain((2, 2, 3), (2, 5, 1), 4),
    "tucker": Network(("rst", "ar", "bs", "ct"), "a", "bc", {"a": 12, "b": 5, "c": 2, "r": 4, "s": 3, "t": 1}),
    "cp": Network(("ar", "br", "cr"), "a", "bc", {"a": 12, "b": 5, "c": 2, "r": 3}),
}
each_network = pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)


def factors_of(network: Network) -> list[Tensor]:
    return [torch.randn(shape, dtype=torch.float64) for shape in network.shapes]


def products(dims: tuple[int, ...], make_moment: Callable[..., Tensor]) -> tuple[Tensor, list[Tensor]]:
    parts = [make_moment(n, seed=n, spread=0.5) for n in dims]
    whole = parts[0]
    for part in parts[1:]:
        whole = torch.kron(whole, part)
    return whole, parts


@each_network
def test_contractions_two_at_a_time_are_those_of_einsum(network: Network) -> None:
    factors = factors_of(network)
    tensor = torch.einsum(f"{','.join(network.operands)}->{network.modes}", *factors)
    assert torch.allclose(network.contract(factors), tensor, rtol=1e-10)
    assert torch.allclose(network.apply(torch.eye(10, dtype=torch.float64), factors).T, network.matrix(factors))
    index = torch.tensor([3, 0, 11, 3])
    assert torch.allclose(network.take(index, factors), network.matrix(factors)[index])


def test_a_contraction_takes_the_cheap_way() -> None:
    """Left to right this is a product of 2000 x 2000 x 2000; the cheap way goes through vectors."""
    thin, wide = torch.randn(2000, 1), torch.randn(1, 2000)
    sizes = (("a", 2000), ("b", 1), ("c", 2000), ("d", 1))
    assert _pairs(("ab", "bc", "cd"), "ad", sizes)[0] == 2 * 2000 + 2 * 2000
    assert torch.allclose(contract(["ab", "bc", "cd"], [thin, wide, thin], "ad"), thin * (wide @ thin), rtol=1e-3)


@each_network
def test_the_adjoint_is_the_gradient(network: Network) -> None:
    factors, tensor = factors_of(network), torch.randn([network.sizes[c] for c in network.modes], dtype=torch.float64)
    for i, factor in enumerate(factors):
        leaf = factor.clone().requires_grad_()
        (network.contract([*factors[:i], leaf, *factors[i + 1 :]]) * tensor).sum().backward()
        assert torch.allclose(network.adjoint(tensor, factors, i), leaf.grad)


@pytest.mark.parametrize("dims", [(6,), (2, 5), (3, 2, 4)])
@pytest.mark.parametrize("diagonal", [False, True])
def test_the_marginals_of_a_product_are_its_factors(
    dims: tuple[int, ...], diagonal: bool, make_moment: Callable[..., Tensor]
) -> None:
    whole, parts = products(dims, make_moment)
    if diagonal:
        whole = whole.diagonal()
    found = [m.moment for m in marginals(Side(whole), dims)]
    for part, mine in zip(parts, found, strict=True):
        like = part.diagonal() if diagonal else part
        assert torch.allclose(mine / mine.norm(), like / like.norm(), rtol=1e-9, atol=1e-12)
    product = found[0]
    for part in found[1:]:
        product = torch.kron(product, part)
    assert torch.allclose(product, whole, rtol=1e-9, atol=1e-12)


@each_network
def test_a_frame_whitens_product_moments_wholly(network: Network, make_moment: Callable[..., Tensor]) -> None:
    dims = (tuple(network.sizes[c] for c in letters) for letters in (network.rows, network.columns))
    rows, columns = (products(of_side, make_moment)[0] for of_side in dims)
    metric, factors = Metric("kronecker", Side(rows), Side(columns), 0.5), factors_of(network)
    frame, error = Frame.of(network, metric), network.matrix(factors)
    white = frame.whiten(network.tensor(error), network.modes)
    whole = 0.5 * float(torch.trace(rows @ error @ columns @ error.T))
    assert 0.5 * float(white.square().sum()) == pytest.approx(whole, rel=1e-9)
    for side in (frame.metric.rows, frame.metric.columns):
        moment = torch.diag(side.moment) if side.is_diagonal else side.moment
        assert torch.allclose(moment, torch.eye(side.size, dtype=torch.float64), atol=1e-8)
    whitened = [frame.whiten(f, letters) for f, letters in zip(factors, network.operands, strict=True)]
    assert torch.allclose(network.contract(whitened), white, rtol=1e-8, atol=1e-10)
    back = [frame.unwhiten(f, letters) for f, letters in zip(whitened, network.operands, strict=True)]
    assert all(torch.allclose(b, f, atol=1e-8) for b, f in zip(back, factors, strict=True))


@each_network
@pytest.mark.parametrize("kind", ["diagonal", "kronecker"])
def test_a_frame_leaves_of_a_metric_what_errors_see_in_it(network: Network, kind: str, make_metric: Maker) -> None:
    metric, error = make_metric(12, 10, kind), network.matrix(factors_of(network))
    frame = Frame.of(network, metric)
    white = frame.whiten(network.tensor(error), network.modes).reshape(12, 10)
    assert frame.metric.distance(white) == pytest.approx(metric.distance(error), rel=1e-4)


@each_network
def test_conjugate_gradients_solve_for_one_factor(network: Network, make_moment: Callable[..., Tensor]) -> None:
    """Against the normal equations, written out."""
    metric = Metric("kronecker", Side(make_moment(12, spread=0.3)), Side(make_moment(10, seed=1, spread=0.3)))
    weight = torch.randn(12, 10, dtype=torch.float64)
    for i, shape in enumerate(network.shapes):
        factors = factors_of(network)
        units = torch.eye(factors[i].numel(), dtype=torch.float64).reshape(-1, *shape)
        design = torch.stack(
            [metric.whiten(network.matrix([*factors[:i], u, *factors[i + 1 :]])).flatten() for u in units]
        )
        best = torch.linalg.lstsq(design.T, metric.whiten(weight).flatten(), driver="gelsd").solution
        least = (metric.whiten(weight).flatten() - best @ design).square().sum()
        residual = metric.columns.felt(metric.rows.apply(weight - network.matrix(factors)))
        solve(network, residual, metric, factors, i, steps=200)
        found = metric.whiten(weight - network.matrix(factors)).square().sum()
        assert float(found) == pytest.approx(float(least), rel=1e-8)


@each_network
def test_one_step_is_enough_where_errors_are_plain_squares(network: Network) -> None:
    plain = Metric("identity", Side(torch.ones(12, dtype=torch.float64)), Side(torch.ones(10, dtype=torch.float64)))
    weight = torch.randn(12, 10, dtype=torch.float64)
    for i in range(len(network.operands)):
        factors = factors_of(network)
        residual = solve(network, weight - network.matrix(factors), plain, factors, i, steps=1)
        assert network.adjoint(network.tensor(residual), factors, i).norm() < 1e-6 * weight.norm()


@each_network
def test_alternation_never_raises_the_error(network: Network, make_metric: Maker) -> None:
    for seed in range(3):
        metric, weight, factors = make_metric(12, 10, seed=seed), torch.randn(12, 10), factors_of(network)
        frame = Frame.of(network, metric)
        white = frame.whiten(network.tensor(weight), network.modes).reshape(12, 10)
        errors = []
        for _ in range(4):
            errors.append(frame.metric.distance(white - network.matrix(factors)))
            factors = improve(frame, white, factors)
        assert errors[0] > errors[-1] and all(b <= a * (1 + 1e-5) for a, b in pairwise(errors))
