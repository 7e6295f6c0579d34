"""Mixed dimensions: planted ranks by block, the best allocation by trial of all, dominance over fewer choices."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor

from tersor.errors import TersorError
from tersor.forms import LowRankForm, LowRankSetting, MixedForm, MixedSetting, cost_of
from tersor.forms.mixed import Block, ranks_within
from tersor.metrics import Metric, Side

Maker = Callable[..., Metric]
FORM = MixedForm()


def of_table(rows: int, moment: Tensor, seed: int | None = None) -> Metric:
    """The metric of a table whose rows are looked up as words are, in any order."""
    order = torch.arange(rows) if seed is None else torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    return Metric("kronecker", Side(1 / (1.0 + order)), Side(moment))


def planted(metric: Metric, setting: MixedSetting, columns: int, ranks: tuple[int, ...]) -> Tensor:
    """A table whose blocks have these ranks, every direction of one size."""
    order = metric.rows.diagonal.argsort(descending=True, stable=True)
    weight = torch.zeros(len(order), columns)
    for part, rank in zip(order.split(setting.sizes(len(order))), ranks, strict=True):
        weight[part] = torch.randn(len(part), rank) @ torch.randn(rank, columns)
    return weight


@pytest.mark.parametrize("ranks", [(16, 12, 6, 2), (4, 4, 4, 4), (16, 3, 0, 0), (8, 0, 1, 5)])
def test_planted_ranks_are_found_and_lose_nothing(ranks: tuple[int, ...], make_moment: Callable[..., Tensor]) -> None:
    """At the size that they take; what is left is the rounding to 16 bits."""
    metric, shape = of_table(850, make_moment(16, spread=0.3), seed=1), (850, 16)
    sizes = MixedSetting(1.0).sizes(850)
    entries = sum(min(r * (n + 16), n * 16) for n, r in zip(sizes, ranks, strict=True))
    weight = planted(metric, MixedSetting(1.0), 16, ranks)
    operator = FORM.fit(weight, metric, MixedSetting(entries / (850 * 16)))
    stored_whole = tuple(16 if r * (n + 16) >= n * 16 else r for n, r in zip(sizes, ranks, strict=True))
    assert operator.setting.ranks == stored_whole
    assert metric.distance(weight - operator.dense()) < 1e-5 * metric.distance(weight)
    assert cost_of(FORM, shape, operator.setting).stored == 2 * entries + -(-850 * 2 // 8)


def test_blocks_are_those_of_the_row_weights_wherever_the_rows_stand(make_moment: Callable[..., Tensor]) -> None:
    moment = make_moment(12, spread=0.3)
    weight, order = torch.randn(340, 12), torch.randperm(340)
    metric = of_table(340, moment)
    moved = Metric("kronecker", metric.rows.permuted(order), metric.columns)
    one, two = FORM.fit(weight, metric, MixedSetting(0.3)), FORM.fit(weight[order], moved, MixedSetting(0.3))
    assert one.setting.ranks == two.setting.ranks
    assert torch.allclose(one.dense()[order], two.dense(), atol=5e-3)


def test_sizes_grow_fourfold_and_add_up() -> None:
    assert MixedSetting(0.5).sizes(850) == [10, 40, 160, 640]
    for rows in (1, 3, 48, 1001):
        for blocks in (2, 3, 4, 7):
            sizes = MixedSetting(0.5, blocks=blocks).sizes(rows)
            assert sum(sizes) == rows and min(sizes) >= 0 and len(sizes) == blocks


def blocks_of(weight: Tensor, metric: Metric, setting: MixedSetting) -> list[Block]:
    parts = metric.rows.diagonal.argsort(descending=True, stable=True).split(setting.sizes(len(weight)))
    return [Block.of(weight, metric, part) for part in parts]


def test_ranks_are_the_best_of_their_size_by_trial_of_all(make_moment: Callable[..., Tensor]) -> None:
    """Given just the entries that they take, no other ranks leave less."""
    weight, metric, setting = torch.randn(63, 6), of_table(63, make_moment(6, spread=0.3)), MixedSetting(0.5, blocks=3)
    blocks = blocks_of(weight, metric, setting)
    menus = [
        [(r, r * (n + 6), b.found.tail(r)) for r in range(6) if r * (n + 6) < 6 * n] + [(6, 6 * n, 0.0)]
        for b, n in zip(blocks, setting.sizes(63), strict=True)
    ]
    all_of_it = [(sum(e for _, e, _ in trial), sum(t for _, _, t in trial)) for trial in product(*menus)]
    for share in (0.2, 0.4, 0.6, 0.8, 1.0):
        ranks = ranks_within(blocks, int(share * 63 * 6))
        chosen = [next(p for p in menu if p[0] == rank) for menu, rank in zip(menus, ranks, strict=True)]
        entries, left = sum(e for _, e, _ in chosen), sum(t for _, _, t in chosen)
        within = min(t for e, t in all_of_it if e <= share * 63 * 6)
        assert entries <= share * 63 * 6
        assert within <= left + 1e-9 and left <= 1.3 * within + 1e-9  # a step that did not fit is all that is lost


def test_whole_blocks_lose_nothing() -> None:
    weight = torch.randn(85, 8).half().float()
    operator = FORM.fit(weight, of_table(85, torch.ones(8)), MixedSetting(1.0))
    assert operator.setting.ranks == (8, 8, 8, 8) and torch.equal(operator.dense(), weight)


def test_it_beats_one_dimension_for_all_where_rare_rows_need_few(make_moment: Callable[..., Tensor]) -> None:
    """At the same bytes or fewer: frequent rows of full rank, rare ones of small rank."""
    metric = of_table(850, make_moment(16, spread=0.3), seed=3)
    weight = planted(metric, MixedSetting(0.5), 16, (16, 16, 8, 2)) + 0.01 * torch.randn(850, 16)
    uniform = LowRankForm().fit(weight, metric, LowRankSetting(8))
    share = (uniform.nbytes - 300) / 2 / weight.numel()
    mixed = FORM.fit(weight, metric, MixedSetting(share))
    assert mixed.nbytes <= uniform.nbytes
    assert metric.distance(weight - mixed.dense()) < 0.3 * metric.distance(weight - uniform.dense())


@pytest.mark.parametrize("bits", [None, 4, 8])
def test_a_complete_setting_keeps_its_ranks(bits: int | None, make_metric: Maker) -> None:
    ranks = (5, 3, 0, 2)
    operator = FORM.fit(torch.randn(48, 10), make_metric(48, 10), MixedSetting(0.5, bits, ranks=ranks))
    assert operator.setting.ranks == ranks


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"share": 0.0}, "share is 0.0"),
        ({"share": 0.5, "bits": 7}, "bits is 7"),
        ({"share": 0.5, "blocks": 1}, "blocks is 1"),
        ({"share": 0.5, "ranks": [1, 2]}, r"ranks is \(1, 2\)"),
    ],
)
def test_a_bad_setting_is_named(values: dict[str, object], message: str) -> None:
    with pytest.raises(TersorError, match=message):
        FORM.setting(values)
