"""Row pruning: planted equal rows, the best choice by trial of all, closed forms, nothing lost where all is kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import combinations

import pytest
import torch
from torch import Tensor

from tersor.errors import TersorError
from tersor.forms import RowsForm, RowsSetting, cost_of
from tersor.forms.rows import Pruning
from tersor.metrics import Metric, Side

Maker = Callable[..., Metric]
FORM = RowsForm()


def of_table(rows: int, columns: int, moment: Tensor, frequencies: Tensor | None = None) -> Metric:
    """The metric of a table whose rows are looked up as often as the first of n, n / 2, n / 3 ..."""
    return Metric(
        "kronecker", Side(1 / torch.arange(1.0, rows + 1) if frequencies is None else frequencies), Side(moment)
    )


@pytest.mark.parametrize("share", [0.25, 0.4])
def test_equal_rare_rows_are_recovered_exactly(share: float, make_moment: Callable[..., Tensor]) -> None:
    weight = torch.randn(80, 12).half().float()
    weight[20:] = torch.randn(12).half().float()  # all that are rare are one row
    dense = FORM.fit(weight, of_table(80, 12, make_moment(12)), RowsSetting(share)).dense()
    assert torch.equal(dense, weight)


def test_equal_rows_are_found_where_they_are_not_the_rare_ones(make_moment: Callable[..., Tensor]) -> None:
    """The rows that differ stand anywhere, but most are equal, which the median sees."""
    weight = torch.randn(12).half().float().repeat(80, 1)
    weight[torch.randperm(80)[:20]] = torch.randn(20, 12).half().float()
    dense = FORM.fit(weight, of_table(80, 12, make_moment(12)), RowsSetting(0.25)).dense()
    assert torch.equal(dense, weight)


@pytest.mark.parametrize("kind", ["identity", "diagonal", "input", "kronecker"])
def test_all_rows_kept_lose_nothing(kind: str, make_metric: Maker) -> None:
    weight = torch.randn(20, 33).half().float()
    assert torch.equal(FORM.fit(weight, make_metric(20, 33, kind), RowsSetting(1.0)).dense(), weight)


def test_the_choice_is_that_of_trying_all(make_moment: Callable[..., Tensor]) -> None:
    """For four of nine rows; the default of each choice by an ordinary weighted mean."""
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(9, 3, generator=generator, dtype=torch.float64)
        metric = of_table(9, 3, make_moment(3, seed, 0.3), torch.rand(9, generator=generator, dtype=torch.float64))

        def loss(kept: tuple[int, ...], weight: Tensor = weight, metric: Metric = metric) -> float:
            others = torch.tensor([i for i in range(9) if i not in kept])
            shares = metric.rows.moment[others]
            error = torch.zeros_like(weight)
            error[others] = weight[others] - (shares @ weight[others]) / shares.sum()
            return metric.distance(error)

        best = min(map(loss, combinations(range(9), 4)))
        mask, _ = Pruning(weight, metric).chosen(4)
        assert loss(tuple(mask.nonzero()[:, 0].tolist())) <= 1.25 * best  # the problem is not convex


def test_kept_rows_are_those_that_would_lose_most(make_moment: Callable[..., Tensor]) -> None:
    weight, metric = torch.randn(70, 5, dtype=torch.float64), of_table(70, 5, make_moment(5))
    mask, default = Pruning(weight, metric).chosen(20)
    off = weight - default
    losses = metric.rows.moment * ((off @ metric.columns.moment) * off).sum(1)
    assert int(mask.sum()) == 20 and losses[mask].min() >= losses[~mask].max()


@pytest.mark.parametrize("kind", ["diagonal", "kronecker"])
def test_the_default_row_is_the_best_for_the_rows_that_have_it(kind: str, make_metric: Maker) -> None:
    """No step from it does less damage, also where rows feel one another."""
    weight, metric = torch.randn(24, 6, dtype=torch.float64), make_metric(24, 6, kind)
    mask, default = Pruning(weight, metric).chosen(8)

    def damage(row: Tensor) -> float:
        error = torch.where(mask[:, None], torch.zeros_like(weight), weight - row)
        return float((metric.rows.apply(error) * metric.columns.felt(error)).sum())

    least = damage(default)
    for step in 1e-3 * torch.eye(6, dtype=torch.float64):
        assert damage(default + step) > least and damage(default - step) > least


def test_frequencies_decide_which_rows_are_kept() -> None:
    weight = torch.randn(60, 8)
    weight[::2] *= 3
    frequencies = torch.full((60,), 1e-4)
    frequencies[1::2] = 1.0
    support = RowsSetting(0.5).support((60, 8))
    often = FORM.fit(weight, of_table(60, 8, torch.ones(8), frequencies), RowsSetting(0.5))
    large = FORM.fit(weight, of_table(60, 8, torch.ones(8), torch.ones(60)), RowsSetting(0.5))
    assert support.decode(often.support)[0, 1::2].all()
    assert support.decode(large.support)[0, ::2].float().mean() > 0.9


def test_more_rows_and_more_bits_never_do_worse(make_moment: Callable[..., Tensor]) -> None:
    weight, metric = torch.randn(90, 16), of_table(90, 16, make_moment(16))
    for ladder in ([RowsSetting(s) for s in (0.1, 0.3, 0.5, 0.9)], [RowsSetting(0.5, b) for b in (2, 3, 4, 6, 8)]):
        damage = [c.divergence for c in FORM.curve(weight, metric, ladder)]
        assert damage == sorted(damage, reverse=True)


@pytest.mark.parametrize(("share", "support"), [(0.5, 125), (0.02, 5 * 3 + 7)])
def test_the_smaller_code_of_the_mask_is_stored(share: float, support: int) -> None:
    """A bit a row; or, for 20 in 1,000, five low bits of each and 20 + 31 + 1 bits of high parts."""
    kept = round(1000 * share)
    setting = RowsSetting(share, 4)
    assert setting.support((1000, 16)).nbytes == support
    expected = support + 2 * 16 + kept * (8 + 1) + 8
    assert cost_of(FORM, (1000, 16), setting).stored == expected
    assert cost_of(FORM, (1000, 16), replace(setting, bits=None)).stored == expected - 8 - 9 * kept + 32 * kept


@pytest.mark.parametrize(
    ("values", "message"),
    [({"share": 0.0}, "share is 0.0"), ({"share": 1.5}, "share is 1.5"), ({"share": 0.5, "bits": 7}, "bits is 7")],
)
def test_a_bad_setting_is_named(values: dict[str, float], message: str) -> None:
    with pytest.raises(TersorError, match=message):
        FORM.setting(values)


def test_a_ladder_drawn_from_one_rounding_predicts_the_fits(make_moment: Callable[..., Tensor]) -> None:
    """The scales of the kept rows alone have a range of their own, in steps of less than a hundredth."""
    weight, metric = torch.randn(300, 12), of_table(300, 12, make_moment(12)).damped(0.03, 0.03)
    for candidate in FORM.curve(weight, metric):
        exact = metric.distance(weight - FORM.fit(weight, metric, candidate.setting).dense())
        assert candidate.divergence == pytest.approx(exact, rel=0.02)
