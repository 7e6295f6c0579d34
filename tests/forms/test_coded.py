"""The form `coded`: equal slopes, the price of bits, and what lies in memory when it runs."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tersor.coding import Coded, StreamError, decode
from tersor.errors import TersorError
from tersor.forms import CodedForm, CodedSetting, IntForm, IntSetting, stacked
from tersor.forms.coded import CodedOperator, Packed
from tersor.metrics import Metric, Side
from tersor.metrics import metric as metric_module
from tersor.plan.solve import Option, solve

FORM = CodedForm()


def moments(rows: int, columns: int, seed: int = 0, scale: float = 0.5) -> Metric:
    """Two full moments with spectra that fall off, of any size."""
    generator = torch.Generator().manual_seed(seed)

    def side(size: int) -> Side:
        basis = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q
        values = torch.logspace(0, -2, size, dtype=torch.float64)
        return Side(((basis * values) @ basis.T).float())

    return Metric("kronecker", side(rows), side(columns), scale)


def gaussian(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def test_every_entry_does_the_damage_of_its_step() -> None:
    """Where steps are small the error of an entry is uniform: `step^2 / 24` nats each, whatever the metric."""
    for seed, (rows, columns) in enumerate([(96, 128), (128, 96), (64, 200)]):
        weight, metric = gaussian(rows, columns, seed), moments(rows, columns, seed, scale=3.0**seed)
        step = 0.1 * math.sqrt(metric.scale * 1e-4)
        operator = FORM.fit(weight, metric, CodedSetting(step, trade=0.0))
        assert metric.distance(weight - operator.dense()) == pytest.approx(rows * columns * step**2 / 24, rel=0.05)


def test_equal_slopes_the_planner_takes_one_step_everywhere() -> None:
    """Sites of other shapes, weights and metrics: the best plan under any budget has all within one rung of another."""
    menus, steps = [], {}
    for site, (rows, columns, size, scale) in enumerate([(64, 64, 1, 0.5), (96, 64, 5, 0.5), (64, 128, 0.3, 40.0)]):
        curve = FORM.curve(size * gaussian(rows, columns, site), moments(rows, columns, site, scale))
        menus.append([Option(n, c.cost.stored, c.cost.resident, 0, c.divergence) for n, c in enumerate(curve)])
        steps.update({(site, n): c.setting.step for n, c in enumerate(curve)})  # type: ignore[attr-defined]
    for bits in (2.5, 3.0, 4.0):
        budget = bits / 8 * (64 * 64 + 96 * 64 + 64 * 128)
        chosen = [steps[site, o.key] for site, o in enumerate(solve(menus, {"stored": budget}).chosen)]  # type: ignore[index]
        assert max(chosen) / min(chosen) <= 2**0.25 + 1e-6


def test_one_code_path_for_all_metrics() -> None:
    weight, metric = gaussian(64, 80), moments(64, 80)
    plain = FORM.fit(weight, metric.coarsened("identity"), CodedSetting(0.05, trade=0.0))
    coded = decode(plain.stream.numpy().tobytes())
    assert len({*coded.rows, *coded.columns}) <= 2  # one step for all: a uniform scalar quantiser
    assert np.array_equal(coded.codes, np.rint(weight.numpy() / 2 ** ((coded.rows[0] + coded.columns[0]) / 4)))
    better = [
        FORM.fit(weight, metric.coarsened(kind), CodedSetting(0.02)) for kind in ("identity", "input", "kronecker")
    ]
    per_bit = [metric.distance(weight - op.dense()) * 4 ** (8 * op.nbytes / weight.numel()) for op in better]
    assert per_bit[0] > per_bit[1] > per_bit[2]


def test_a_price_on_bits_buys_more_than_a_larger_step() -> None:
    """At a bit and a half, rounding that knows what codes cost has less damage at the same size."""
    weight, metric = gaussian(192, 256), moments(192, 256)
    curves = {}
    for trade in (0.0, 0.25):
        curve = FORM.curve(weight, metric, [CodedSetting(0.01 * 2 ** (k / 2), trade) for k in range(16)])
        curves[trade] = [(8 * c.cost.stored / weight.numel(), math.log(c.divergence)) for c in curve]

    def at(bits: float, trade: float) -> float:
        return float(np.interp(bits, *zip(*sorted(curves[trade]), strict=True)))

    assert at(1.5, 0.25) < at(1.5, 0.0) - 0.1


def test_it_beats_integers_in_groups_at_equal_bytes() -> None:
    weight, metric = gaussian(128, 256), moments(128, 256)
    plain = IntForm().fit(weight, metric, IntSetting(3, 64))
    coded = [c for c in FORM.curve(weight, metric) if c.cost.stored <= plain.nbytes]
    assert min(c.divergence for c in coded) < 0.7 * metric.distance(weight - plain.dense())


def test_directions_that_do_not_matter_become_zeros() -> None:
    weight = gaussian(64, 64)
    columns = torch.ones(64)
    columns[:32] = 1e-8
    metric = Metric("diagonal", Side(torch.ones(64)), Side(columns), 0.5)
    operator = FORM.fit(weight, metric, CodedSetting(0.3))
    assert (operator.dense()[:, :32] == 0).all() and (operator.dense()[:, 32:] != 0).any()
    assert 8 * operator.nbytes < 0.6 * 8 * FORM.fit(weight, metric.coarsened("identity"), CodedSetting(0.2)).nbytes


def test_escapes_come_back_in_rows_and_whole() -> None:
    generator = np.random.default_rng(0)
    codes = np.rint(generator.normal(0, 0.8, (40, 30))).astype(np.int32)
    codes[3, 7], codes[3, 8], codes[20, 0], codes[39, 29] = 1000, -500, 70, -70
    coded = Coded(codes, np.zeros(40, int), np.full(30, 4), 4)
    packed = Packed.of(coded)
    assert packed.bits < 5 and len(packed.positions) >= 4
    assert torch.equal(packed.rows(None), 2.0 * torch.from_numpy(codes).float())
    index = torch.tensor([39, 3, 0, 3, 20])
    assert torch.equal(packed.rows(index), packed.rows(None)[index])


def test_products_in_blocks_are_the_product(monkeypatch: pytest.MonkeyPatch) -> None:
    operator = FORM.fit(gaussian(50, 40), moments(50, 40), CodedSetting(0.01))
    x = torch.randn(3, 40)
    whole = operator(x)
    monkeypatch.setattr("tersor.forms.coded.BLOCK", 400)
    assert torch.allclose(operator(x), whole, rtol=1e-5, atol=1e-6)


def test_a_stream_is_decoded_once_and_again_when_it_changes() -> None:
    one, other = (FORM.fit(gaussian(20, 30, seed), moments(20, 30), CodedSetting(0.05)) for seed in (0, 1))
    empty = FORM.empty((20, 30), one.setting)
    empty.load_state_dict(one.state_dict())
    assert torch.equal(empty.dense(), one.dense()) and empty.packed() is empty.packed()
    empty.stream = other.stream.clone()
    assert torch.equal(empty.dense(), other.dense())


def test_a_damaged_stream_is_refused_when_it_is_used() -> None:
    operator = FORM.fit(gaussian(20, 30), moments(20, 30), CodedSetting(0.05))
    broken = FORM.empty((20, 30), operator.setting)
    broken.stream = operator.stream.clone()
    broken.stream[40] ^= 4
    with pytest.raises(StreamError, match="checksum"):
        broken(torch.randn(1, 30))
    turned = FORM.empty((30, 20), operator.setting)
    turned.stream = operator.stream
    with pytest.raises(TersorError, match=r"holds \(20, 30\), where \(30, 20\) is due"):
        turned.dense()


def test_moving_and_saving_keeps_the_stream() -> None:
    operator = FORM.fit(gaussian(20, 30), moments(20, 30), CodedSetting(0.05))
    module = nn.Sequential(operator)
    before = operator.stream.clone()
    module.to(torch.float16)
    module(torch.randn(2, 30).half())
    assert torch.equal(module.state_dict()["0.stream"], before)


@pytest.mark.parametrize("kind", ["kronecker", "identity"])
def test_a_promised_size_is_kept_under_another_metric(kind: str) -> None:
    weight = gaussian(60, 80)
    promised = FORM.fit(weight, moments(60, 80), CodedSetting(0.01)).setting
    other = moments(60, 80, seed=9).coarsened(kind)
    loud = Metric(kind, other.rows, other.columns, 20 * other.scale)  # in which the same step takes two more bits
    assert FORM.fit(weight, loud, CodedSetting(0.01)).nbytes > promised.stored
    assert 0.9 * promised.stored < FORM.fit(weight, loud, promised).nbytes <= promised.stored


@pytest.mark.parametrize("missed", [0.999, 0.99])
def test_a_size_nearly_met_is_not_fallen_far_below_where_rows_are_alike(missed: float) -> None:
    metric = Metric("kronecker", Side(torch.ones(3000)), moments(8, 48).columns)
    weight = gaussian(3000, 48)
    size = FORM.fit(weight, metric, CodedSetting(0.5)).nbytes
    promised = CodedSetting(0.5, stored=int(missed * size))
    assert 0.985 * missed * size < FORM.fit(weight, metric, promised).nbytes <= missed * size


def test_interpolated_candidates_are_what_fits_come_to() -> None:
    """Half of a ladder is not fitted: its sizes hold within a hundredth, its divergences within a few."""
    weight, metric = gaussian(160, 200), moments(160, 200)
    guessed = FORM.curve(weight, metric)
    exact = FORM.curve(weight, metric, [candidate.setting for candidate in guessed])
    for guess, fit in zip(guessed, exact, strict=True):
        assert guess.cost.stored == pytest.approx(fit.cost.stored, rel=0.01, abs=8)
        assert fit.cost.resident <= guess.cost.resident
        if guess.cost.stored < weight.numel() * 7 / 8:  # above, codes outgrow a byte, and memory soars
            assert 0.75 * guess.cost.resident <= fit.cost.resident
        assert guess.divergence == pytest.approx(fit.divergence, rel=0.05)
        assert FORM.fit(weight, metric, guess.setting).nbytes <= guess.cost.stored


def test_the_unit_of_the_divergence_does_not_matter() -> None:
    """Damage in pounds or in pence has the same curve, a constant apart."""
    weight, metric = gaussian(64, 48), moments(64, 48)
    for unit in (1e-12, 1.0, 1e12):
        curve = FORM.curve(weight, Metric("kronecker", metric.rows, metric.columns, unit * metric.scale))
        bits = [8 * c.cost.stored / weight.numel() for c in curve]
        assert len(bits) > 25 and bits[0] < 0.6 and bits[-1] > 7.5


def test_a_model_that_was_loaded_anew_forgets_what_it_had_decoded() -> None:
    one, other = (FORM.fit(gaussian(20, 30, seed), moments(20, 30), CodedSetting(0.05)) for seed in (0, 1))
    other = FORM.fit(gaussian(20, 30, 1), moments(20, 30), replace(one.setting, step=0.06))
    target = FORM.empty((20, 30), one.setting)
    target.load_state_dict(one.state_dict())
    compiled = torch.compile(target, backend="eager")
    target.dense()
    with torch.no_grad():
        compiled(torch.eye(30))
        target.stream.resize_(len(other.stream))
        target.load_state_dict(other.state_dict())
        target.dense()
        assert torch.allclose(compiled(torch.eye(30)).T, other.dense())


def test_a_weight_can_be_used_in_inference_mode() -> None:
    operator = FORM.fit(gaussian(20, 30), moments(20, 30), CodedSetting(0.05))
    with torch.inference_mode():
        empty = FORM.empty((20, 30), operator.setting)
        empty.load_state_dict(operator.state_dict())
        assert torch.equal(copy.deepcopy(empty)(torch.eye(30)), operator.dense().T)


@pytest.mark.parametrize(
    "values", [{"step": "a"}, {"step": 1.0, "stored": -5}, {"step": 1.0, "resident": "9"}, {"x": 1}]
)
def test_settings_of_the_wrong_kind_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(TersorError, match="coded: "):
        FORM.setting(values)
    with pytest.raises(TersorError, match="more than a matrix of 4 x 5 can take"):
        FORM.empty((4, 5), CodedSetting(1.0, stored=10**15))


def test_stacks_keep_a_size_for_every_matrix() -> None:
    fits = [FORM.fit(size * gaussian(20, 30), moments(20, 30), CodedSetting(0.05)) for size in (1.0, 8.0)]
    setting = stacked([fit.setting for fit in fits])
    assert [s.stored for s in setting.stack] == [fit.nbytes for fit in fits]
    assert setting.label == fits[0].setting.label


@pytest.mark.parametrize(
    ("values", "message"), [({"step": 0.0}, "step is 0.0"), ({"step": 1.0, "trade": 2}, "trade is 2")]
)
def test_settings_that_make_no_sense_are_refused(values: dict[str, float], message: str) -> None:
    with pytest.raises(TersorError, match=message):
        FORM.setting(values)


def test_a_table_is_drawn_from_some_of_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = gaussian(3000, 32)
    frequencies = 1 / torch.arange(1, 3001, dtype=torch.float64)
    metric = Metric("kronecker", Side(frequencies + 0.1 * frequencies.mean()), moments(8, 32).columns)
    whole = FORM.curve(weight, metric)
    monkeypatch.setattr(metric_module, "SAMPLED_ROWS", 1000)
    sampled = {c.setting: c for c in FORM.curve(weight, metric)}
    assert len(sampled) == len(whole)
    for candidate in whole:
        guess = sampled.get(candidate.setting)
        if guess is not None and 8 * candidate.cost.stored > weight.numel():
            assert guess.cost.stored == pytest.approx(candidate.cost.stored, rel=0.02)
            assert guess.divergence == pytest.approx(candidate.divergence, rel=0.02)
            assert FORM.fit(weight, metric, guess.setting).nbytes <= guess.cost.stored


def test_few_positions_out_of_reach_are_multiplied_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    operator = FORM.fit(gaussian(24, 16), moments(24, 16), CodedSetting(0.05))
    x = gaussian(1, 16, 1)
    expected = x @ operator.dense().T
    monkeypatch.setattr("tersor.forms.coded.BLOCK", 64)
    monkeypatch.setattr("tersor.forms.base.in_reach", lambda tensor: False)
    monkeypatch.setattr(CodedOperator, "decode", lambda self: pytest.fail("decoded whole"))
    assert torch.allclose(operator(x), expected, rtol=1e-4, atol=1e-5)
