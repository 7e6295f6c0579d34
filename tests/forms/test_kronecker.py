"""Sums of Kronecker products: the closed form of Van Loan, planted sums, the cost of hypercomplex layers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tersor.errors import TersorError
from tersor.forms import KroneckerForm, KroneckerSetting, cost_of
from tersor.forms.kronecker import shapes_of
from tersor.forms.multilinear import Frame
from tersor.metrics import Metric, Side

Maker = Callable[..., Metric]
FORM = KroneckerForm()


def planted(terms: int, a: tuple[int, int] = (4, 6), b: tuple[int, int] = (5, 3)) -> Tensor:
    pairs = [(torch.randn(a, dtype=torch.float64), torch.randn(b, dtype=torch.float64)) for _ in range(terms)]
    return sum((torch.kron(*pair) for pair in pairs), torch.zeros(a[0] * b[0], a[1] * b[1], dtype=torch.float64))


def plain_error(weight: Tensor, setting: KroneckerSetting) -> Tensor:
    network = FORM.network((weight.shape[0], weight.shape[1]), setting)
    return weight - network.matrix(FORM.decompose(FORM.prepare(network.tensor(weight)), network))


def rearranged(weight: Tensor, rows: int, columns: int) -> Tensor:
    """A row for every block, written out."""
    blocks = [block.flatten() for strip in weight.chunk(rows, 0) for block in strip.chunk(columns, 1)]
    return torch.stack(blocks)


@pytest.mark.parametrize("terms", [1, 2, 5, 15])
def test_the_best_sum_leaves_the_discarded_singular_values(terms: int) -> None:
    weight = torch.randn(20, 18, dtype=torch.float64)
    values = torch.linalg.svdvals(rearranged(weight, 4, 6))
    left = plain_error(weight, KroneckerSetting(4, 6, terms)).square().sum()
    assert float(left) == pytest.approx(float(values[terms:].square().sum()), rel=1e-8, abs=1e-16)


def test_a_planted_sum_is_found() -> None:
    weight = planted(3)
    assert plain_error(weight, KroneckerSetting(4, 6, 3)).norm() < 1e-8 * weight.norm()
    assert plain_error(weight, KroneckerSetting(4, 6, 2)).norm() > 0.1 * weight.norm()


def test_a_planted_sum_is_found_under_a_metric(make_moment: Callable[..., Tensor]) -> None:
    weight = planted(3).float()
    metric = Metric("kronecker", Side(make_moment(20, spread=0.5)), Side(make_moment(18, seed=1, spread=0.5)))
    fitted = FORM.fit(weight, metric, KroneckerSetting(4, 6, 3))
    assert (weight - fitted.dense()).norm() < 4e-3 * weight.norm()
    assert metric.distance(weight - fitted.dense()) < 1e-5 * metric.distance(weight)


def test_under_product_moments_no_sum_does_better(make_moment: Callable[..., Tensor]) -> None:
    """There the whitened weight is rearranged, and its discarded singular values are the error."""
    rows = torch.kron(make_moment(4, spread=0.5), make_moment(5, seed=2, spread=0.5))
    columns = torch.kron(make_moment(6, seed=3, spread=0.5), make_moment(3, seed=4, spread=0.5))
    metric, weight = Metric("kronecker", Side(rows), Side(columns)), torch.randn(20, 18, dtype=torch.float64)
    network = FORM.network((20, 18), KroneckerSetting(4, 6, 4))
    frame = Frame.of(network, metric)
    factors = FORM.decompose(FORM.prepare(frame.whiten(network.tensor(weight), network.modes)), network)
    turned = [frame.unwhiten(f, letters) for f, letters in zip(factors, network.operands, strict=True)]
    error = weight - network.matrix(turned)
    found = float(torch.trace(rows @ error @ columns @ error.T))
    white = metric.whiten(weight)
    assert found == pytest.approx(float(torch.linalg.svdvals(rearranged(white, 4, 6))[4:].square().sum()), rel=1e-8)


def test_moments_that_are_no_products_are_felt_all_the_same(make_metric: Maker) -> None:
    """Better than whitening the modes alone, which is better than not looking."""
    weight, metric, setting = torch.randn(48, 72), make_metric(48, 72, seed=5), KroneckerSetting(8, 9, 6)
    plain = FORM.fit(weight, metric.coarsened("identity"), setting)
    network = FORM.network((48, 72), setting)
    frame = Frame.of(network, metric)
    factors = FORM.decompose(FORM.prepare(frame.whiten(network.tensor(weight), network.modes)), network)
    turned = [frame.unwhiten(f, letters) for f, letters in zip(factors, network.operands, strict=True)]
    whitened = metric.distance(weight - network.matrix(turned))
    fitted = metric.distance(weight - FORM.fit(weight, metric, setting).dense())
    assert fitted < 0.9 * whitened < 0.9 * metric.distance(weight - plain.dense())


@pytest.mark.parametrize("n", [2, 4, 8])
def test_a_hypercomplex_layer_takes_about_one_part_in_n(n: int) -> None:
    cost = cost_of(FORM, (64, 128), KroneckerSetting(n, n, n))
    assert cost.stored == 2 * (n**3 + 64 * 128 // n)


@pytest.mark.parametrize("bits", [8, 4])
def test_integer_factors_take_less_and_lose_little(bits: int, make_metric: Maker) -> None:
    weight, metric = torch.randn(48, 72), make_metric(48, 72, "diagonal")
    half, whole = (FORM.fit(weight, metric, KroneckerSetting(8, 9, 8, b)) for b in (None, bits))
    assert whole.nbytes < bits / 14 * half.nbytes
    left = [metric.distance(weight - o.dense()) / metric.distance(weight) for o in (half, whole)]
    assert left[1] < left[0] + (0.05 if bits == 4 else 1e-3)


def test_more_terms_than_there_are_change_nothing() -> None:
    weight, metric = torch.randn(6, 8), Metric("identity", Side(torch.ones(6)), Side(torch.ones(8)))
    assert torch.allclose(FORM.fit(weight, metric, KroneckerSetting(2, 2, 9)).dense(), weight, atol=5e-3)


def test_shapes_are_divisors_and_no_ranks() -> None:
    for shape in ((48, 72), (384, 1536), (1000, 30), (7, 64)):
        for rows, columns in shapes_of(shape):
            assert shape[0] % rows == 0 == shape[1] % columns
            assert (rows, columns) not in ((shape[0], 1), (1, shape[1]))
    assert shapes_of((7, 7)) == [] or all(r * c > 1 for r, c in shapes_of((7, 7)))


def test_a_shape_that_does_not_divide_takes_what_is_common() -> None:
    network = FORM.network((30, 20), KroneckerSetting(4, 8, 2))
    assert network.shapes == [(2, 2, 4), (2, 15, 5)]


@pytest.mark.parametrize("name", ["rows", "columns", "terms"])
def test_settings_are_positive(name: str) -> None:
    with pytest.raises(TersorError, match=f"kronecker: {name} is 0"):
        KroneckerSetting(**{"rows": 2, "columns": 2, "terms": 2, name: 0})
