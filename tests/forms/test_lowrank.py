"""The best factors of a rank: closed forms, accuracy of the factorisation, planted ranks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tersor.errors import TersorError
from tersor.forms import IntSetting, LowRankForm, LowRankSetting, form_named
from tersor.forms.lowrank import cut, factorise, ranks_within, tails
from tersor.forms.sums import SumForm, SumSetting
from tersor.metrics import Metric, Side

Maker = Callable[..., Metric]


@pytest.mark.parametrize("shape", [(30, 50), (50, 30), (40, 40), (1, 20), (20, 1)])
def test_factorise_agrees_with_the_svd(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, dtype=torch.float64)
    found, values = factorise(matrix), torch.linalg.svdvals(matrix)
    assert torch.allclose(found.values, values, rtol=1e-9)
    assert torch.allclose((found.left * found.values) @ found.right, matrix, atol=1e-9)
    for vectors in (found.left.T @ found.left, found.right @ found.right.T):
        assert torch.allclose(vectors, torch.eye(min(shape), dtype=torch.float64), atol=1e-9)


def test_factorise_keeps_its_accuracy_over_a_wide_spectrum() -> None:
    left, _ = torch.linalg.qr(torch.randn(60, 60, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(90, 60, dtype=torch.float64))
    values = 10 ** torch.linspace(0, -7, 60, dtype=torch.float64)
    found = factorise((left * values) @ right.T)
    assert torch.allclose(found.values, values, rtol=1e-2, atol=1e-9)
    assert found.tail(20) == pytest.approx(float(values[20:].square().sum()), rel=1e-6)


@pytest.mark.parametrize("rank", [1, 7, 20, 29])
def test_under_the_input_metric_the_error_is_the_discarded_singular_values(
    rank: int, make_moment: Callable[..., Tensor]
) -> None:
    weight, moment = torch.randn(30, 40, dtype=torch.float64), make_moment(40, spread=0.5)
    metric = Metric("input", Side(torch.ones(30, dtype=torch.float64)), Side(moment))
    found = factorise(metric.whiten(weight))
    kept = (found.left[:, :rank] * found.values[:rank]) @ found.right[:rank]
    error = weight - metric.unwhiten(kept)
    values, vectors = torch.linalg.eigh(moment)
    root = (vectors * values.sqrt()) @ vectors.T
    discarded = torch.linalg.svdvals(weight @ root)[rank:].square().sum()
    assert float(torch.trace(error @ moment @ error.T)) == pytest.approx(float(discarded), rel=1e-10)
    assert found.tail(rank) == pytest.approx(float(discarded), rel=1e-10)


@pytest.mark.parametrize("kind", ["identity", "diagonal", "input", "output", "kronecker"])
def test_no_rank_does_better_under_the_metric(kind: str, make_metric: Maker) -> None:
    weight, metric, setting = torch.randn(32, 48), make_metric(32, 48, kind), LowRankSetting(6)
    fitted = metric.distance(weight - LowRankForm().fit(weight, metric, setting).dense())
    tail = metric.scale * factorise(metric.whiten(weight)).tail(6)
    assert fitted == pytest.approx(tail, rel=1e-2)  # 16-bit factors apart
    for _ in range(5):
        other = torch.randn(32, 6) @ torch.randn(6, 48)
        assert metric.distance(weight - other) > tail


@pytest.mark.parametrize(("bits", "tolerance"), [(None, 1e-3), (8, 0.02), (4, 0.2)])
def test_a_planted_rank_is_found_at_no_loss(bits: int | None, tolerance: float, make_metric: Maker) -> None:
    weight, metric = torch.randn(64, 9) @ torch.randn(9, 80), make_metric(64, 80, "diagonal")
    whole, lacking = (LowRankForm().fit(weight, metric, LowRankSetting(r, bits)).dense() for r in (9, 6))
    share = [metric.distance(weight - dense) / metric.distance(weight) for dense in (whole, lacking)]
    assert share[0] < tolerance**2 < share[1] or share[0] < 0.1 * share[1]


@pytest.mark.parametrize("extra", [0, 5])
def test_full_rank_and_more_change_nothing(extra: int, make_metric: Maker) -> None:
    weight, metric = torch.randn(12, 20), make_metric(12, 20)
    dense = LowRankForm().fit(weight, metric, LowRankSetting(12 + extra)).dense()
    assert torch.allclose(dense, weight, atol=2e-2)
    assert metric.distance(weight - dense) < 1e-4 * metric.distance(weight)


def test_more_rank_never_does_worse(make_metric: Maker) -> None:
    weight, metric = torch.randn(40, 60), make_metric(40, 60)
    curve = LowRankForm().curve(weight, metric, [LowRankSetting(r) for r in (1, 2, 4, 8, 16, 32, 40)])
    divergences = [c.divergence for c in curve]
    assert divergences == sorted(divergences, reverse=True)


def test_integer_factors_beat_16_bit_ones_at_equal_bytes(make_metric: Maker) -> None:
    weight, metric = torch.randn(96, 128) @ torch.diag(torch.arange(1, 129) ** -0.5), make_metric(96, 128, "diagonal")
    half, four = LowRankSetting(8), LowRankSetting(24, 4)
    (wide,), (thin,) = (LowRankForm().curve(weight, metric, [s]) for s in (four, half))
    assert wide.cost.stored <= thin.cost.stored and wide.divergence < thin.divergence


def test_rank_must_be_positive() -> None:
    with pytest.raises(TersorError, match="rank is 0"):
        LowRankSetting(0)


def test_alternating_never_does_worse_than_once(make_metric: Maker) -> None:
    form = form_named("int+lowrank")
    assert isinstance(form, SumForm)
    for seed in range(3):
        weight, metric = torch.randn(64, 96), make_metric(64, 96, seed=seed)
        pair = IntSetting(2, 32), LowRankSetting(4, 8)
        distances = [
            metric.distance(weight - form.fit(weight, metric, SumSetting(*pair, n)).dense()) for n in (0, 1, 3)
        ]
        assert distances == sorted(distances, reverse=True)


def test_a_correction_of_full_rank_leaves_nothing(make_metric: Maker) -> None:
    form, weight, metric = form_named("int+lowrank"), torch.randn(16, 24), make_metric(16, 24)
    operator = form.fit(weight, metric, SumSetting(IntSetting(2, 8), LowRankSetting(16)))
    assert metric.distance(weight - operator.dense()) < 1e-5 * metric.distance(weight)


def test_a_sum_needs_both_of_its_settings() -> None:
    with pytest.raises(TersorError, match="needs `first` and `second`"):
        form_named("int+lowrank").setting({"first": {"bits": 2}})


@pytest.mark.parametrize("kind", ["identity", "input", "kronecker"])
@pytest.mark.parametrize("rank", [1, 5, 12])
def test_a_fit_cut_to_a_rank_is_the_fit_of_that_rank(kind: str, rank: int, make_metric: Maker) -> None:
    weight, metric = torch.randn(32, 48), make_metric(32, 48, kind)
    operator = LowRankForm().fit(weight, metric, LowRankSetting(12))
    cut(operator, rank)
    direct = LowRankForm().fit(weight, metric, LowRankSetting(rank))
    assert operator.setting == direct.setting
    for name, tensor in direct.state_dict().items():
        assert torch.equal(operator.state_dict()[name], tensor)


@pytest.mark.parametrize(("rank", "smaller"), [(24, 7), (200, 165), (200, 128), (200, 9)])
def test_integer_factors_keep_their_first_components(rank: int, smaller: int) -> None:
    shape = (210, 220)
    metric = Metric("identity", Side(torch.ones(shape[0])), Side(torch.ones(shape[1])))
    operator = LowRankForm().fit(torch.randn(shape), metric, LowRankSetting(rank, 4))
    expected = operator.left.dense()[:, :smaller] @ operator.right.dense()[:smaller]
    cut(operator, smaller)
    assert torch.allclose(operator.dense(), expected, atol=1e-6)
    empty = LowRankForm().empty(shape, LowRankSetting(smaller, 4))
    sizes = {name: tensor.shape for name, tensor in empty.state_dict().items()}
    assert {name: tensor.shape for name, tensor in operator.state_dict().items()} == sizes


def test_integers_are_cut_only_to_ranks_whose_groups_are_theirs() -> None:
    assert ranks_within(LowRankSetting(200, 4)) == [*range(1, 129), *range(161, 201)]
    assert ranks_within(LowRankSetting(160, 4)) == ranks_within(LowRankSetting(160)) == list(range(1, 161))


@pytest.mark.parametrize("bits", [None, 4])
def test_tails_are_what_a_cut_adds(bits: int | None, make_metric: Maker) -> None:
    weight, metric = torch.randn(20, 30), make_metric(20, 30).damped(0.1, 0.1)
    operator = LowRankForm().fit(weight, metric, LowRankSetting(8, bits))
    whole, added = operator.dense(), tails(operator, metric)
    assert added.shape == (9,) and added[8] == 0
    assert float(added[0]) == pytest.approx(metric.distance(whole), rel=1e-4)
    for rank in range(7, 0, -1):
        cut(operator, rank)
        assert float(added[rank]) == pytest.approx(metric.distance(whole - operator.dense()), rel=1e-4)
