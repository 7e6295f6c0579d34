"""Fixed tables: their published values, exact stored bits, blocks by their specification, and searched scales."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tersor.errors import TersorError
from tersor.forms import FloatForm, FloatSetting, cost_of
from tersor.forms.floats import FloatOperator, Scales, levels_of, search_scales, table_of
from tersor.forms.kernels import best_scales
from tersor.forms.packing import pack
from tersor.forms.rounding import Levels
from tersor.metrics import Metric, Side

FORM = FloatForm()
OPEN = ["e2m0", "e2m1", "e1m2", "e3m0", "nf4", "e2m2", "e2m3", "e3m2", "e2m5", "e4m3", "e5m2", "dynamic8"]
BLOCKED = ["mxfp4", "mxfp6", "mxfp8", "nvfp4"]
# Appendix E of arXiv:2305.14314 QLoRA.
QLORA = (-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0)
QLORA += (0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0)
# The concrete formats of the OCP Microscaling Formats (MX) specification 1.0, without the sign.
OCP = {
    "e2m1": [0, 0.5, 1, 1.5, 2, 3, 4, 6],
    "e2m3": [k / 8 for k in range(16)] + [2 + k / 4 for k in range(8)] + [4 + k / 2 for k in range(8)],
    "e3m2": [k / 16 for k in range(8)] + [2.0**e * (1 + k / 4) for e in range(-1, 5) for k in range(4)],
}
Maker = Callable[..., Metric]


def plain(name: str, size: int | None = None, scale_bits: int = 8) -> FloatSetting:
    """Rounded to the nearest between the extremes."""
    return FloatSetting(name, size, scale_bits, "nearest", search=False)


@pytest.mark.parametrize(("name", "dtype"), [("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)])
def test_fp8_is_that_of_torch_to_the_bit(name: str, dtype: torch.dtype, make_metric: Maker) -> None:
    exact = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    assert torch.equal(torch.tensor(table_of(name)).nan_to_num(nan=1e9), exact.nan_to_num(nan=1e9))
    top = float(torch.finfo(dtype).max)
    weight = (torch.randn(8, 500) * top / 8).clamp(-top, top)
    weight[:, 0] = top
    operator = FORM.fit(weight, make_metric(8, 500), plain(name, None, 16))
    assert torch.equal(operator.codes.view(dtype).float(), weight.to(dtype).float())
    assert torch.equal(operator.dense(), weight.to(dtype).float())


@pytest.mark.parametrize("name", OCP)
def test_fp4_and_fp6_are_those_of_the_specification(name: str) -> None:
    assert table_of(name) == (*OCP[name], *(-size for size in OCP[name]))


def test_splits_of_four_bits() -> None:
    assert table_of("e3m0")[:8] == (0, 0.25, 0.5, 1, 2, 4, 8, 16)
    assert table_of("e1m2")[:8] == (0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5)


def test_normal_floats_are_those_published() -> None:
    assert table_of("nf4") == pytest.approx(QLORA, abs=2e-7)


def test_the_dynamic_tree() -> None:
    """A sign, zeros for powers of ten, a flag, and a fraction in what is left."""
    table = table_of("dynamic8")
    assert len(set(table)) == 256
    assert (table[0b0_0000000], table[0b1_0000000]) == (0.0, 1.0)
    assert table[0b0_1_111111] == pytest.approx(1 - 0.9 / 128)
    assert table[0b1_1_000000] == pytest.approx(-0.1 - 0.9 / 128)
    assert table[0b0_001_0101] == pytest.approx(0.01 * (0.1 + 0.9 * 5.5 / 16))
    assert table[0b1_0000001] == pytest.approx(-0.55e-6)


@pytest.mark.parametrize("name", ["mxfp4", "mxfp6", "mxfp8"])
def test_blocks_are_converted_as_the_specification_says(name: str, make_metric: Maker) -> None:
    """A power of two a block, that of its largest magnitude less that of the largest element; elements saturate."""
    weight = torch.randn(3, 80) * torch.logspace(-9, 3, 80)
    weight[1, 32:64] = 0
    operator = FORM.fit(weight, make_metric(3, 80), plain(name))
    magnitudes = [level for level in levels_of(operator.setting.element) if level >= 0]
    dense = operator.dense()
    for row, block in itertools.product(range(3), range(3)):
        at = slice(32 * block, min(32 * block + 32, 80))
        largest = float(weight[row, at].abs().max())
        if largest == 0:
            assert not dense[row, at].any()
            continue
        exponent = math.floor(math.log2(largest)) - math.floor(math.log2(magnitudes[-1]))
        assert int(operator.scale[row, block]) == exponent + 127
        for value, found in zip(weight[row, at].tolist(), dense[row, at].tolist(), strict=True):
            nearest = min(magnitudes, key=lambda size: abs(abs(value) * 2.0**-exponent - size))
            assert found == math.copysign(nearest * 2.0**exponent, value) or found == nearest == 0


def test_stored_blocks_are_read_bit_by_bit() -> None:
    """The first code of a byte is in its low half; a scale of one byte is a power of two, less 127."""
    operator = FORM.empty((1, 4), FloatSetting("mxfp4"))
    operator.codes = torch.tensor([[0b1111_0001, 0b0100_1000]], dtype=torch.uint8)
    operator.scale = torch.tensor([[130]], dtype=torch.uint8)
    assert operator.dense().tolist() == [[8 * 0.5, 8 * -6.0, 0.0, 8 * 2.0]]
    every = Scales("e8m0", 6.0).values(torch.arange(255, dtype=torch.uint8))
    assert every.tolist() == [2.0 ** (k - 127) for k in range(255)]
    operator = FORM.empty((1, 4), FloatSetting("nvfp4"))
    operator.codes = torch.tensor([[0b1111_0001, 0b0100_1000]], dtype=torch.uint8)
    operator.scale = torch.tensor([[0b0_0111_100]], dtype=torch.uint8)  # 1.5
    operator.whole = torch.tensor([0.25]).view(torch.int32)
    assert operator.dense().tolist() == [[0.375 * 0.5, 0.375 * -6.0, 0.0, 0.375 * 2.0]]


def test_the_largest_block_of_nvfp4_takes_the_largest_scale(make_metric: Maker) -> None:
    weight = torch.randn(16, 64)
    operator = FORM.fit(weight, make_metric(16, 64), plain("nvfp4"))
    assert int(operator.scale.max()) == 0b0_1111_110  # 448
    assert float(operator.whole.view(torch.float32)) == pytest.approx(float(weight.abs().max()) / (448 * 6))
    assert (weight - operator.dense()).norm() < 0.12 * weight.norm()


@pytest.mark.parametrize("name", [*OPEN, *BLOCKED])
def test_a_code_takes_its_bits_and_a_group_its_scale(name: str) -> None:
    rows, columns = 64, 256
    for setting in [FloatSetting(name)] + ([FloatSetting(name, 64, 16)] if name in OPEN else []):
        groups = columns // setting.size((rows, columns))
        scales = rows * groups * setting.scale_bits // 8 + 4 * {"log": 2, "e4m3": 1}.get(setting.scales, 0)
        assert cost_of(FORM, (rows, columns), setting).stored == rows * columns * setting.bits // 8 + scales


@pytest.mark.parametrize("name", [*OPEN, *BLOCKED])
@pytest.mark.parametrize("rounding", ["nearest", "two-sided"])
def test_a_weight_of_the_table_is_kept(name: str, rounding: str, make_metric: Maker) -> None:
    setting = FloatSetting(name, None, 8 if name in BLOCKED else 16, rounding)
    levels = torch.tensor(list(levels_of(setting.element)))
    weight = levels[torch.randint(0, len(levels), (12, 64))]
    weight[:, ::16] = levels[-1]
    weight *= 0.25 / (levels[-1] if setting.scales == "half" else 1.0)
    operator = FORM.fit(weight, make_metric(12, 64), setting)
    assert torch.allclose(operator.dense(), weight, rtol=2e-3, atol=0)


@pytest.mark.parametrize("name", [*OPEN, *BLOCKED])
def test_searched_scales_beat_the_extremes(name: str, make_metric: Maker) -> None:
    weight, metric = torch.randn(32, 130), make_metric(32, 130, "diagonal")
    weight[:, 5] *= 8
    searched = FloatSetting(name, rounding="nearest")
    found, extremes = (FORM.fit(weight, metric, s) for s in (searched, plain(name)))
    assert metric.distance(weight - found.dense()) < metric.distance(weight - extremes.dense())


@pytest.mark.parametrize(("name", "slack"), [("e2m1", 0.03), ("nf4", 0.03), ("e3m0", 0.03), ("e3m4", 0.15)])
def test_no_range_is_much_better_than_the_one_found(name: str, slack: float) -> None:
    """A fine search of the clipping range of every row; chance favours some of 200 where steps are small."""
    weight, importance = torch.randn(6, 2048), torch.rand(6, 2048) + 0.1
    levels = torch.tensor(list(levels_of(name)))

    def errors(scale: torch.Tensor) -> torch.Tensor:
        return (importance * (weight - Levels(scale, levels).nearest(weight)).square()).sum(-1)

    _, scale = search_scales(weight, importance, FloatSetting(name))
    extremes = weight.abs().amax(-1, keepdim=True) / levels[-1]
    best = torch.stack([errors(share * extremes) for share in torch.linspace(0.2, 1.5, 200).tolist()]).amin(0)
    assert (errors(scale) <= (1 + slack) * best).all()


def test_the_scale_of_a_block_is_the_best_power_of_two() -> None:
    weight, importance = torch.randn(4, 64), torch.rand(4, 64) + 0.1
    w, h = weight.reshape(4, 2, 32), importance.reshape(4, 2, 32)
    _, scale = search_scales(weight, importance, FloatSetting("mxfp4"))
    powers = 2.0 ** torch.arange(-6, 4).reshape(-1, 1, 1, 1)
    rounded = Levels(powers, torch.tensor(list(levels_of("e2m1")))).nearest(w)
    best = (h * (w - rounded).square()).sum(-1).argmin(0)
    assert torch.equal(scale, powers.flatten()[best])


def test_the_best_scale_and_its_least_squares() -> None:
    w, h = torch.randn(2, 3, 20, dtype=torch.float64), torch.rand(2, 3, 20, dtype=torch.float64)
    trials, levels = torch.rand(2, 3, 7, dtype=torch.float64) + 0.05, torch.tensor(QLORA, dtype=torch.float64)
    best, fit = torch.empty(2, 2, 3, dtype=torch.float64)
    bounds = Levels(trials, levels).bounds
    best_scales(*(t.numpy() for t in (w, h, trials, levels, bounds, best, fit)))  # type: ignore[arg-type]
    taken = levels[(w[..., None] / trials[..., None, :] - levels.reshape(-1, 1, 1, 1, 1)).abs().argmin(0)]
    errors = (h[..., None] * (w[..., None] - taken * trials[..., None, :]).square()).sum(-2)
    assert torch.equal(best, trials.gather(-1, errors.argmin(-1, keepdim=True)).squeeze(-1))
    level = taken.gather(-1, errors.argmin(-1)[..., None, None].expand(-1, -1, 20, 1)).squeeze(-1)
    assert torch.allclose(fit, (h * level * w).sum(-1) / (h * level.square()).sum(-1))


@pytest.mark.parametrize("rounding", ["nearest", "feedback", "two-sided"])
def test_a_metric_never_makes_a_fit_worse(rounding: str, make_metric: Maker) -> None:
    for seed, name in itertools.product(range(4), ("e2m1", "mxfp4", "e4m3")):
        weight, metric = torch.randn(24, 40), make_metric(24, 40, seed=seed)
        fitted = FORM.fit(weight, metric, FloatSetting(name, rounding=rounding))
        plainly = FORM.fit(weight, metric.coarsened("identity"), FloatSetting(name, rounding=rounding))
        assert metric.distance(weight - fitted.dense()) <= metric.distance(weight - plainly.dense())


def test_feedback_from_both_sides_beats_one_beats_none() -> None:
    mixes = [torch.randn(64, 80, dtype=torch.float64) for _ in range(2)]
    metric = Metric("kronecker", *(Side(m @ m.T / 80 + 0.3 * torch.ones(64, 64)) for m in mixes))
    weight, found = torch.randn(64, 64), {}
    for rounding in ("two-sided", "feedback", "nearest"):
        found[rounding] = metric.distance(
            weight - FORM.fit(weight, metric, FloatSetting("nf4", 32, 8, rounding)).dense()
        )
    assert found["two-sided"] < found["feedback"] < found["nearest"]


@pytest.mark.parametrize("setting", [*map(FloatSetting, [*OPEN, *BLOCKED]), FloatSetting("nf4", 16, 16)], ids=str)
def test_compiled_decoding_is_that_of_plain_operations(setting: FloatSetting, monkeypatch: pytest.MonkeyPatch) -> None:
    shape, levels = (20, 37), levels_of(setting.element)
    operator = FloatOperator(shape, setting)
    codes = torch.tensor(list(levels.values()))[torch.randint(0, len(levels), shape)]
    operator.codes = pack(codes, setting.bits)
    scale = torch.rand(operator.scale.shape) + 0.1
    operator.set_scales(operator.scales.over(scale), scale)
    index = torch.tensor([[19, 0], [7, 7]])
    found = operator.decode(), operator.take(index)
    assert torch.equal(found[0][index], found[1])
    monkeypatch.setattr("tersor.forms.floats.in_reach", lambda tensor: False)
    assert torch.equal(operator.decode(), found[0]) and torch.equal(operator.take(index), found[1])


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"format": "e4m4"}, "format is 'e4m4'"),
        ({"format": 4}, "format is 4"),
        ({"format": "e2m1", "group_size": 0}, "group_size is 0"),
        ({"format": "e2m1", "rounding": "random"}, "rounding is 'random'"),
        ({"format": "e2m1", "scale_bits": 4}, "scale_bits is 4"),
        ({"format": "mxfp4", "group_size": 64}, "mxfp4 has blocks of 32"),
        ({"format": "nvfp4", "scale_bits": 16}, "nvfp4 has blocks of 16"),
        ({"bits": 4}, r"not \['bits'\]"),
    ],
)
def test_a_bad_setting_is_named(values: dict[str, Any], named: str) -> None:
    with pytest.raises(TersorError, match=named):
        FORM.setting(values)
