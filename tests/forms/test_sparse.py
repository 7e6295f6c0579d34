"""Supports to the byte; refits and removals by closed forms; planted supports; what must not do worse than what."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tersor.errors import TersorError
from tersor.forms import LowRankSetting, SparseForm, SparseSetting, SumSetting, form_named
from tersor.forms.recoding import recoded
from tersor.forms.sparse import refit
from tersor.forms.supports import Bitmask, Groups, Positions, Support
from tersor.metrics import Metric, Side
from tersor.metrics import metric as metric_module

Maker = Callable[..., Metric]
SELECTS = ("second-order", "wanda", "sampled", "magnitude")


def fit(weight: Tensor, metric: Metric, *values: object, **more: object) -> Tensor:
    return SparseForm().fit(weight, metric, SparseSetting(*values, **more)).dense()  # type: ignore[arg-type]


def random_mask(code: Support) -> Tensor:
    """A mask with as many entries as the code keeps, of every group of a pattern."""
    sizes = (code.count, code.m) if isinstance(code, Groups) else (1, math.prod(code.shape))
    chosen = torch.rand(sizes).topk(code.kept // sizes[0]).indices
    return torch.zeros(sizes, dtype=torch.bool).scatter_(1, chosen, True).reshape(code.shape)


def damped(make_metric: Maker, rows: int, columns: int, kind: str, seed: int = 0) -> Metric:
    """A metric as a fit gets it."""
    return make_metric(rows, columns, kind, seed).damped(0.1, 0.03)


@pytest.mark.parametrize(
    ("code", "nbytes"),
    [
        (Bitmask((7, 9), 20), 8),  # 63 bits
        (Positions((40, 50), 100), 13 + 13 * 4 + 16),  # 4 low bits each in planes; 100 + 1999 // 16 + 1 high bits
        (Positions((3, 5), 15), 4),  # no low bits; 15 + 15 high bits
        (Positions((1, 1), 1), 1),
        (Groups((6, 12), 2, 4), 5 + 3),  # 18 groups of 3 bits: a plane of 2, one of 1
        (Groups((6, 10), 1, 4), 5),  # rows filled up to 12: 18 groups of 2 bits
        (Groups((5, 16), 4, 8), 5 + 5),  # 10 groups of 7 bits: planes of 4, 2 and 1
        (Groups((4, 32), 8, 16), 8 + 4 + 2),  # 8 groups of 14 bits
        (Groups((2, 3), 1, 2), 1),
    ],
)
def test_a_support_takes_the_bytes_it_says_and_comes_back(code: Support, nbytes: int) -> None:
    for _ in range(3):
        mask = random_mask(code)
        stored = code.encode(mask)
        assert stored.dtype == torch.uint8 and stored.numel() == code.nbytes == nbytes
        assert torch.equal(code.decode(stored), mask)


def test_the_first_and_the_last_positions_come_back() -> None:
    code = Positions((10, 30), 5)
    for chosen in (range(5), range(295, 300)):
        mask = torch.zeros(300, dtype=torch.bool)
        mask[list(chosen)] = True
        assert torch.equal(code.decode(code.encode(mask.reshape(10, 30))), mask.reshape(10, 30))


@pytest.mark.parametrize("density", [0.5, 0.2, 0.1, 0.01])
def test_the_smaller_code_is_near_to_the_entropy(density: float) -> None:
    code = SparseSetting(density).support((400, 500))
    entropy = -density * math.log2(density) - (1 - density) * math.log2(1 - density)
    assert isinstance(code, Bitmask if density == 0.5 else Positions)
    assert entropy <= 8 * code.nbytes / 200_000 <= entropy + 0.7 * density + 1e-3


def test_a_refit_of_single_rows_is_the_exact_one(make_moment: Callable[..., Tensor]) -> None:
    weight, support = torch.randn(9, 24, dtype=torch.float64), torch.rand(9, 24) < 0.5
    moment, frequencies = make_moment(24, spread=0.5), torch.rand(9, dtype=torch.float64) + 0.1
    metric = Metric("kronecker", Side(frequencies), Side(moment))
    exact = torch.zeros_like(weight)
    for row, (w, kept) in enumerate(zip(weight, support, strict=True)):
        exact[row, kept] = torch.linalg.solve(moment[kept][:, kept], moment[kept] @ w)
    values = refit(weight, weight, support, metric, 60)

    def damage(values: Tensor) -> float:
        error = weight - values
        return float((frequencies[:, None] * error * (error @ moment)).sum())

    assert damage(values) == pytest.approx(damage(exact), rel=1e-8)
    assert not values[~support].any()


@pytest.mark.parametrize("kind", ["kronecker", "output"])
def test_a_refit_is_the_least_squares_solution(kind: str, make_moment: Callable[..., Tensor]) -> None:
    weight, support = torch.randn(7, 10, dtype=torch.float64), torch.rand(7, 10) < 0.4
    rows, columns = make_moment(7, spread=0.4), make_moment(10, 1, spread=0.4)
    columns = columns.diagonal().diag() if kind == "output" else columns
    hessian, kept = torch.kron(rows, columns), support.reshape(-1)
    exact = torch.zeros(70, dtype=torch.float64)
    exact[kept] = torch.linalg.solve(hessian[kept][:, kept], hessian[kept] @ weight.reshape(-1))
    side = Side(columns.diagonal()) if kind == "output" else Side(columns)
    values = refit(weight, torch.zeros_like(weight), support, Metric(kind, Side(rows), side), 200)
    assert torch.allclose(values.reshape(-1), exact, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("kind", ["kronecker", "input", "output"])
def test_recoded_values_cannot_be_bettered_by_one_code_or_the_scales(
    kind: str, make_metric: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tersor.forms.recoding.ROUNDS", 30)
    monkeypatch.setattr("tersor.forms.recoding.TILE", 4)
    weight, support, metric = torch.randn(9, 12), torch.rand(9, 12) < 0.5, damped(make_metric, 9, 12, kind)
    given, scale = ((2 * weight).floor().clamp(-4, 3) + 0.5) * support, torch.full((9,), 0.5)
    codes, steps = recoded(weight, given, support, scale, metric)

    def left(codes: Tensor, steps: Tensor) -> float:
        return Metric(metric.kind, metric.rows, metric.columns).distance(weight - steps[:, None] * codes)

    least = left(codes, steps)
    assert least < left(given, scale) and not codes[~support].any()
    assert set(codes[support].abs().tolist()) <= {0.5, 1.5, 2.5, 3.5}
    for row, column in support.nonzero().tolist():
        for change in (-1, 1):
            other = codes.clone()
            other[row, column] += change
            assert abs(other[row, column]) > 3.5 or left(other, steps) > 0.99999 * least
    for row in range(9):
        for factor in (0.99, 1.01):
            assert left(codes, torch.where(torch.arange(9) == row, factor * steps, steps)) > 0.99999 * least


def test_codes_of_kept_entries_that_know_of_each_other_pay(make_metric: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(48, 64, generator=torch.Generator().manual_seed(0))
    for metric in (make_metric(48, 64), damped(make_metric, 48, 64, "kronecker"), damped(make_metric, 48, 64, "input")):
        after = metric.distance(weight - fit(weight, metric, 0.5, bits=3))
        with monkeypatch.context() as patch:
            patch.setattr("tersor.forms.sparse.recoded", lambda weight, codes, support, scale, metric: (codes, scale))
            assert after < 0.99 * metric.distance(weight - fit(weight, metric, 0.5, bits=3))


def test_removing_an_entry_costs_what_both_factors_say(make_moment: Callable[..., Tensor]) -> None:
    """`w_ij^2 / ([R^-1]_ii [C^-1]_jj)`, where all other entries are refitted."""
    weight, rows, columns = torch.randn(5, 6, dtype=torch.float64), make_moment(5, 0, 0.4), make_moment(6, 1, 0.4)
    support = torch.ones(5, 6, dtype=torch.bool)
    support[2, 3] = False
    error = weight - refit(weight, weight, support, Metric("kronecker", Side(rows), Side(columns)), 200)
    cost = weight[2, 3] ** 2 / (rows.inverse()[2, 2] * columns.inverse()[3, 3])
    assert float((rows @ error @ columns * error).sum()) == pytest.approx(float(cost), rel=1e-8)


def test_the_best_single_removal_is_found(make_moment: Callable[..., Tensor]) -> None:
    for seed in range(5):
        weight, moment = torch.randn(1, 12), make_moment(12, seed, spread=0.4)
        found = fit(weight, Metric("input", Side(torch.ones(1)), Side(moment)), 11 / 12)
        costs = weight[0].double().square() / moment.inverse().diagonal()
        assert (found == 0).nonzero()[:, 1].tolist() == [int(costs.argmin())]


@pytest.mark.parametrize("kind", ["identity", "input", "kronecker"])
@pytest.mark.parametrize("density", [0.25, 0.05, "2:4", "1:4", "4:8"])
def test_a_planted_support_is_found_and_nothing_is_lost(kind: str, density: float | str, make_metric: Maker) -> None:
    code = SparseSetting(density).support((40, 80))
    weight = torch.randn(40, 80).half().float() * random_mask(code)
    assert torch.equal(fit(weight, make_metric(40, 80, kind), density), weight)


def test_planted_integers_are_found(make_metric: Maker) -> None:
    codes = torch.randint(0, 16, (40, 80)) - 7.5
    codes[:, :4] = 7.5  # of which every row keeps two, so that its extremes are those of the grid
    weight = codes * (0.05 + torch.rand(40, 1)).half().float() * random_mask(Groups((40, 80), 2, 4))
    metric = make_metric(40, 80)
    assert metric.distance(weight - fit(weight, metric, "2:4", bits=4)) < 1e-5 * metric.distance(weight)


@pytest.mark.parametrize("select", SELECTS)
def test_all_entries_kept_change_nothing(select: str, make_metric: Maker) -> None:
    weight = torch.randn(20, 30).half().float()
    assert torch.equal(fit(weight, make_metric(20, 30), 1.0, select), weight)


@pytest.mark.parametrize("kind", ["diagonal", "input", "output", "kronecker"])
@pytest.mark.parametrize("density", [0.5, 0.25, "2:4"])
def test_what_knows_more_does_not_do_worse(kind: str, density: float | str, make_metric: Maker) -> None:
    for seed in range(3):
        weight, metric = torch.randn(40, 48), damped(make_metric, 40, 48, kind, seed)
        second, wanda, plain, magnitude = (
            metric.distance(weight - fit(weight, metric, density, select, refitted))
            for select, refitted in (("second-order", True), ("wanda", True), ("wanda", False), ("magnitude", False))
        )
        assert second <= wanda * (1 + 1e-6) and wanda <= plain and second <= magnitude


def test_of_uncorrelated_inputs_wanda_keeps_the_largest_products_of_a_row() -> None:
    weight, moment = torch.randn(20, 40), torch.logspace(-2, 2, 40)[torch.randperm(40)]
    found = fit(weight, Metric("input-diagonal", Side(torch.ones(20)), Side(moment)), 0.25, "wanda", False)
    kept = (weight.abs() * moment.sqrt()).topk(10).indices
    assert torch.equal(found != 0, torch.zeros(20, 40, dtype=torch.bool).scatter_(1, kept, True))
    assert torch.allclose(found[found != 0], weight[found != 0], rtol=1e-3)


def test_samples_follow_weight_and_input_and_their_seed() -> None:
    """Of 4,000 equal rows one entry each is kept: by the shares of `|w| sqrt(C)`."""
    weight, moment = torch.tensor([1.0, -2.0, 3.0, 1.0]), torch.tensor([1.0, 4.0, 1.0, 0.25])
    metric = Metric("input-diagonal", Side(torch.ones(4000)), Side(moment))
    found = fit(weight.expand(4000, 4).contiguous(), metric, "1:4", "sampled", False, None, 3)
    share = weight.abs() * moment.sqrt()
    assert torch.allclose((found != 0).float().mean(0), share / share.sum(), atol=0.03)
    small, full = torch.randn(16, 32), Metric("identity", Side(torch.ones(16)), Side(torch.ones(32)))
    drawn = [fit(small, full, 0.5, "sampled", False, None, seed) for seed in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_more_entries_and_more_bits_do_not_do_worse(make_metric: Maker) -> None:
    weight, metric = torch.randn(48, 64), damped(make_metric, 48, 64, "kronecker")
    ladder = [SparseSetting(density, bits=bits) for density in (0.7, 0.5, 0.3, 0.1) for bits in (None, 8, 4, 2)]
    found = torch.tensor([c.divergence for c in SparseForm().curve(weight, metric, ladder)]).reshape(4, 4)
    assert (found.diff(dim=0) > 0).all()
    assert (found.diff(dim=1)[:, 1:] > 0).all()
    assert (found[:, 1] < 1.05 * found[:, 0]).all()  # less where refitting ends before it is done


def test_a_curve_is_that_of_its_fits_in_any_order(make_metric: Maker) -> None:
    weight, metric = torch.randn(32, 48), damped(make_metric, 32, 48, "kronecker")
    ladder = [SparseSetting(d, bits=b) for d, b in ((0.25, None), (0.5, 4), ("1:4", None), ("2:4", None), (0.25, 3))]
    for candidate in SparseForm().curve(weight, metric, ladder):
        dense = SparseForm().fit(weight, metric, candidate.setting).dense()  # type: ignore[arg-type]
        assert candidate.divergence == pytest.approx(metric.distance(weight - dense), rel=1e-6)


def test_a_table_is_drawn_from_some_of_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    mix = torch.randn(32, 40)
    weight, raw = (
        torch.randn(4000, 32),
        Metric("kronecker", Side(1 / torch.arange(1.0, 4001.0)), Side(mix @ mix.T / 40)),
    )
    metric, ladder = raw.damped(0.1, 0.1), [SparseSetting(0.5), SparseSetting(0.25, bits=4), SparseSetting("2:4")]
    whole = SparseForm().curve(weight, metric, ladder)
    monkeypatch.setattr(metric_module, "SAMPLED_ROWS", 800)
    for exact, sampled in zip(whole, SparseForm().curve(weight, metric, ladder), strict=True):
        assert (sampled.setting, sampled.cost) == (exact.setting, exact.cost)
        assert sampled.divergence == pytest.approx(exact.divergence, rel=0.15)


def test_a_planted_sum_is_taken_apart() -> None:
    """A tenth of large entries on a matrix of rank 3: alternation finds both."""
    metric = Metric("identity", Side(torch.ones(60)), Side(torch.ones(80)))
    mask = random_mask(Positions((60, 80), 480))
    weight = torch.randn(60, 3) @ torch.randn(3, 80) / 3 + 8 * torch.randn(60, 80).sign() * mask
    setting = SumSetting(SparseSetting(0.1), LowRankSetting(3), 30)
    operator = form_named("sparse+lowrank").fit(weight, metric, setting)
    assert torch.equal(operator.first.dense() != 0, mask)
    assert metric.distance(weight - operator.dense()) < 1e-6 * metric.distance(weight)


def test_a_sum_does_not_do_worse_than_its_terms(make_metric: Maker) -> None:
    for seed in range(3):
        weight, metric = torch.randn(64, 96), damped(make_metric, 64, 96, "kronecker", seed)
        setting = SumSetting(SparseSetting(0.25, bits=4), LowRankSetting(6, 8))
        alone = [form_named("sparse").fit(weight, metric, setting.first)]
        alone.append(form_named("lowrank").fit(weight, metric, setting.second))
        both = form_named("sparse+lowrank").fit(weight, metric, setting)
        assert metric.distance(weight - both.dense()) <= min(metric.distance(weight - o.dense()) for o in alone)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"density": 0}, "density is 0"),
        ({"density": 1.5}, "density is 1.5"),
        ({"density": "4:2"}, "density is '4:2'"),
        ({"density": "1:32"}, "m at most 16"),
        ({"bits": 7}, "bits is 7"),
        ({"select": "largest"}, "select is 'largest'"),
    ],
)
def test_a_bad_setting_is_one_clear_sentence(values: dict[str, object], message: str) -> None:
    with pytest.raises(TersorError, match=message):
        form_named("sparse").setting(values)
