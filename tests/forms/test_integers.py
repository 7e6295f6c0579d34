"""Integer grids: every layout of groups, the stored precision of scales, and bad settings."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tersor.errors import TersorError
from tersor.forms import IntForm, IntSetting, cost_of
from tersor.forms.int_scales import search_grid
from tersor.metrics import Metric

LAYOUTS = [
    IntSetting(bits, group, axis, symmetric, scale_bits)
    for bits, group, axis, symmetric, scale_bits in itertools.product(
        (2, 3, 8), (16, None), ("columns", "rows"), (True, False), (8, 16)
    )
]


@pytest.mark.parametrize("setting", LAYOUTS, ids=lambda s: f"{s.label} s{s.scale_bits}")
def test_every_layout_of_groups(setting: IntSetting, make_metric: Callable[..., Metric]) -> None:
    shape = (20, 37)
    weight, metric = torch.randn(shape), make_metric(*shape, "diagonal")
    operator = IntForm().fit(weight, metric, setting)
    assert cost_of(IntForm(), shape, setting).stored == operator.nbytes
    index = torch.tensor([19, 0, 7])
    assert torch.equal(operator.take(index), operator.dense()[index])
    step = operator.grid()[0].max()
    nearest = IntForm().fit(weight, metric.coarsened("identity"), IntSetting(8, setting.group_size, setting.axis))
    assert (weight - nearest.dense()).norm() < 0.02 * weight.norm()
    assert (weight - operator.dense()).abs().max() < 2**setting.bits * step


def test_three_bits_take_three_bits() -> None:
    for bits in (2, 3, 4, 5, 6, 8):
        setting = IntSetting(bits, 64, symmetric=True)
        codes = 256 * 512 * bits // 8
        assert cost_of(IntForm(), (256, 512), setting).stored == codes + 256 * 512 // 64 + 8


def test_a_weight_on_the_grid_is_kept(make_metric: Callable[..., Metric]) -> None:
    codes = torch.randint(0, 16, (12, 64)).float()
    codes[:, 0], codes[:, 1] = 0, 15
    weight = (codes - 7.5) * 0.125
    operator = IntForm().fit(weight, make_metric(12, 64), IntSetting(4, None, symmetric=True, scale_bits=16))
    assert torch.allclose(operator.dense(), weight, atol=1e-3)


@pytest.mark.parametrize("rounding", ["nearest", "feedback", "two-sided"])
def test_searched_scales_beat_the_extremes(rounding: str, make_metric: Callable[..., Metric]) -> None:
    weight, metric = torch.randn(32, 128), make_metric(32, 128, "diagonal")
    weight[:, 5] *= 8
    found, extremes = (
        IntForm().fit(weight, metric, IntSetting(3, 64, rounding=rounding, search=search)) for search in (True, False)
    )
    assert metric.distance(weight - found.dense()) < metric.distance(weight - extremes.dense())


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"bits": 7}, "bits is 7"),
        ({"bits": 1}, "bits is 1"),
        ({"bits": 4, "group_size": 0}, "group_size is 0"),
        ({"bits": 4, "axis": "blocks"}, "axis is 'blocks'"),
        ({"bits": 4, "rounding": "random"}, "rounding is 'random'"),
        ({"bits": 4, "scale_bits": 4}, "scale_bits is 4"),
    ],
)
def test_a_bad_setting_is_named(values: dict[str, Any], named: str) -> None:
    with pytest.raises(TersorError, match=named):
        IntForm().setting(values)


@pytest.mark.parametrize("axis", ["columns", "rows"])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("zeros", ["fine", "whole"])
def test_the_search_finds_nearly_the_best_grid_of_a_group(axis: str, symmetric: bool, zeros: str) -> None:
    """Beside all of 200 scales and 60 zeros; the last group is short and on one side of zero, which no zero suits."""
    setting = IntSetting(3, 32, axis, symmetric, zeros=zeros)
    weight, importance = torch.randn(1, 70), torch.rand(1, 70)
    weight[0, 64:] = weight[0, 64:].abs() + 1

    def error(part: slice, scale: Tensor, zero: Tensor) -> Tensor:
        codes = (weight[0, part] / scale + zero).round().clamp(0, 7)
        return (importance[0, part] * (weight[0, part] - (codes - zero) * scale).square()).sum(-1)

    both = (weight, importance) if axis == "columns" else (weight.T, importance.T)
    scale, zero = (found.reshape(-1) for found in search_grid(*both, setting))
    assert len(scale) == 3
    tried = torch.linspace(0, 7, 60) if zeros == "fine" else torch.arange(1, 8).float()
    tried = torch.tensor([setting.half]) if symmetric else tried
    for number, part in enumerate((slice(0, 32), slice(32, 64), slice(64, 70))):
        scales = weight[0, part].abs().max() * torch.linspace(0.02, 1, 200)
        best = error(part, scales[:, None, None], tried[:, None]).min()
        assert error(part, scale[number], zero[number]) <= (1.15 if number < 2 else 3) * best + 1e-6
