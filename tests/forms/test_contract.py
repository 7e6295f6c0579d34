"""The contract that every form keeps: what it promises to cost, to round-trip, to beat, and to do on inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tersor.errors import TersorError
from tersor.forms import (
    FORMS,
    Form,
    IntForm,
    IntSetting,
    Operator,
    SparseForm,
    as_values,
    cost_of,
    form_named,
)
from tersor.metrics import Metric, Side
from tersor.metrics import metric as metric_module

SHAPE = (48, 72)
Maker = Callable[..., Metric]


def settings_of(form: Form, shape: tuple[int, int] = SHAPE) -> list[Any]:
    """The first, the middle and the last of the ladder."""
    ladder = list(form.settings(shape)) or list(form.settings((256, 512)))
    return [ladder[0], ladder[len(ladder) // 2], ladder[-1]]


def whitened_distance(metric: Metric, weight: Tensor, operator: Operator) -> float:
    """A distance; that of `int+lowrank` in float64, for its parts are rounded when they are added."""
    if operator.setting.label.startswith("int") and " + " in operator.setting.label:
        judge = metric.judged_by or metric
        return judge.scale * float(judge.whiten(weight.double() - operator.dense().double()).square().sum())
    return metric.distance(weight - operator.dense())


def plain_rounding(weight: Tensor, metric: Metric, setting: IntSetting) -> Operator:
    """Round to nearest between the extremes of every group, with the bytes of `setting`."""
    values = {**as_values(setting), "rounding": "nearest", "search": False}
    return IntForm().fit(weight, metric, IntSetting(**values))


def blind(form: str) -> Callable[[Tensor, Metric, Any], Operator]:
    """The same setting fitted to the weight itself, whatever the weight does."""
    return lambda weight, metric, setting: form_named(form).fit(weight, metric.coarsened("identity"), setting)


def blind_core(weight: Tensor, metric: Metric, setting: Any) -> Operator:
    """The best core of the shape that the fit chose, where errors are plain squares."""
    return blind("tucker")(weight, metric, form_named("tucker").fit(weight, metric, setting).setting)


def blind_ranks(weight: Tensor, metric: Metric, setting: Any) -> Operator:
    """Blocks of the ranks that the fit chose, where errors are plain squares."""
    return blind("mixed")(weight, metric, form_named("mixed").fit(weight, metric, setting).setting)


def first_term(weight: Tensor, metric: Metric, setting: Any) -> Operator:
    """What the sum is worth without its correction (in fewer bytes)."""
    return form_named("int" if isinstance(setting.first, IntSetting) else "sparse").fit(weight, metric, setting.first)


def plain_pruning(weight: Tensor, metric: Metric, setting: Any) -> Operator:
    """The largest entries as they are, or rounded to the nearest, in the same bytes."""
    return SparseForm().fit(weight, metric.coarsened("identity"), replace(setting, select="magnitude", refit=False))


def plain_integers(weight: Tensor, metric: Metric, setting: Any) -> Operator:
    """Whole rows rounded to the nearest, with as many bits as the bytes of the fit allow; else nothing at all."""
    form = next(f for f in FORMS.values() if isinstance(setting, type(settings_of(f)[0])))
    allowed = form.fit(weight, metric, setting).nbytes
    for bits in (8, 6, 5, 4, 3, 2):
        plain = IntForm().fit(weight, metric, IntSetting(bits, None, symmetric=True, rounding="nearest", search=False))
        if plain.nbytes <= allowed:
            return plain
    return form.fit(torch.zeros_like(weight), metric, setting)


def plain_floats(weight: Tensor, metric: Metric, setting: Any) -> Operator:
    """Round to nearest between the extremes of every group, with the bytes of `setting`."""
    return form_named("float").fit(weight, metric, replace(setting, rounding="nearest", search=False))


NULLS: dict[str, Callable[[Tensor, Metric, Any], Operator]] = {
    "int": plain_rounding,
    "coded": plain_integers,
    "trellis": plain_integers,
    "codebook": plain_integers,
    "lowrank": blind("lowrank"),
    "int+lowrank": first_term,
    **{name: blind(name) for name in ("kronecker", "tt", "cp")},
    "tucker": blind_core,
    "portable": plain_rounding,
    "float": plain_floats,
    "dictionary": blind("dictionary"),
    "shared": blind("shared"),
    "sparse": plain_pruning,
    "sparse+lowrank": first_term,
    "rows": blind("rows"),
    "mixed": blind_ranks,
    "hashed": blind("hashed"),
}
CASES = [pytest.param(form, s, id=f"{name}: {s.label}") for name, form in FORMS.items() for s in settings_of(form)]
each_setting = pytest.mark.parametrize(("form", "setting"), CASES)


def test_every_form_has_a_null() -> None:
    assert set(NULLS) == set(FORMS)


@each_setting
def test_bytes_are_as_promised(form: Form, setting: Any, make_metric: Maker, tmp_path: Path) -> None:
    operator = form.fit(torch.randn(SHAPE), make_metric(*SHAPE), setting)
    state, cost = operator.state_dict(), cost_of(form, SHAPE, operator.setting)
    assert cost.stored == operator.nbytes == sum(t.nbytes for t in state.values())
    assert cost.resident == operator.resident >= operator.nbytes
    save_file(state, tmp_path / "operator.safetensors")
    loaded = load_file(tmp_path / "operator.safetensors")
    assert sum(t.nbytes for t in loaded.values()) == operator.nbytes
    assert cost.flops == operator.flops


@each_setting
def test_round_trip_through_a_file(form: Form, setting: Any, make_metric: Maker, tmp_path: Path) -> None:
    operator = form.fit(torch.randn(SHAPE), make_metric(*SHAPE), setting)
    save_file(operator.state_dict(), tmp_path / "operator.safetensors")
    again = form.empty(SHAPE, form.setting(as_values(operator.setting)))
    again.load_state_dict(load_file(tmp_path / "operator.safetensors"))
    assert again.setting == setting
    assert torch.equal(again.dense(), operator.dense())


@each_setting
def test_the_same_fit_twice_is_the_same_to_the_bit(form: Form, setting: Any, make_metric: Maker) -> None:
    weight, metric = torch.randn(SHAPE), make_metric(*SHAPE)
    first, second = (form.fit(weight.clone(), metric, setting).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@each_setting
def test_a_fit_changes_neither_the_weight_nor_the_seed(form: Form, setting: Any, make_metric: Maker) -> None:
    weight = torch.randn(SHAPE)
    kept, state = weight.clone(), torch.get_rng_state()
    form.fit(weight, make_metric(*SHAPE), setting)
    assert torch.equal(weight, kept) and torch.equal(torch.get_rng_state(), state)


@each_setting
def test_it_is_no_worse_than_its_null(form: Form, setting: Any, make_metric: Maker) -> None:
    for seed in range(3):
        weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))
        metric = make_metric(*SHAPE, seed=seed)
        null = NULLS[form.name](weight, metric, setting)
        fitted = form.fit(weight, metric, setting)
        assert null.nbytes <= fitted.nbytes
        assert whitened_distance(metric, weight, fitted) <= whitened_distance(metric, weight, null)


@each_setting
def test_the_curve_predicts_the_fit(form: Form, setting: Any, make_metric: Maker) -> None:
    weight, metric = torch.randn(SHAPE), make_metric(*SHAPE)
    (candidate,) = form.curve(weight, metric, [setting])
    operator = form.fit(weight, metric, setting)
    assert candidate.form == form.name and candidate.setting == setting
    assert candidate.cost == cost_of(form, SHAPE, candidate.setting) == cost_of(form, SHAPE, operator.setting)
    assert candidate.divergence == pytest.approx(whitened_distance(metric, weight, operator), rel=1e-3)


@pytest.mark.parametrize(
    "form", [f for f in FORMS.values() if f.name in ("int", "lowrank", "int+lowrank", "float")], ids=lambda f: f.name
)
def test_a_table_is_drawn_from_some_of_its_rows(form: Form, monkeypatch: pytest.MonkeyPatch) -> None:
    """Frequencies fall off as those of words do, so that the first rows do most of the damage."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4000, 32, generator=generator)
    frequencies, mix = 1 / torch.arange(1.0, 4001.0), torch.randn(32, 40, generator=generator)
    raw = Metric("kronecker", Side(frequencies), Side(mix @ mix.T / 40))
    metric = raw.damped(0.1, 0.1)
    whole = form.curve(weight, metric)
    monkeypatch.setattr(metric_module, "SAMPLED_ROWS", 800)
    for exact, sampled in zip(whole, form.curve(weight, metric), strict=True):
        assert (sampled.setting, sampled.cost) == (exact.setting, exact.cost)
        assert sampled.divergence == pytest.approx(exact.divergence, rel=0.06)


@pytest.mark.parametrize("name", ["int", "float"])
def test_a_weight_whose_rows_all_matter_as_much_is_drawn_from_a_few(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(1500, 48, generator=generator) * (0.3 + torch.rand(1500, 1, generator=generator))
    mix = torch.randn(48, 60, generator=generator)
    metric = Metric("kronecker", Side(torch.full((1500,), 0.3)), Side(mix @ mix.T / 60)).damped(0.0, 0.1)
    whole = FORMS[name].curve(weight, metric)
    monkeypatch.setattr(metric_module, "EQUAL_ROWS", 500)
    few = FORMS[name].curve(weight, metric)
    assert any(sampled.divergence != exact.divergence for exact, sampled in zip(whole, few, strict=True))
    for exact, sampled in zip(whole, few, strict=True):
        assert (sampled.setting, sampled.cost) == (exact.setting, exact.cost)
        assert sampled.divergence == pytest.approx(exact.divergence, rel=0.06)


@each_setting
def test_forward_and_take_agree_with_dense(form: Form, setting: Any, make_metric: Maker) -> None:
    operator = form.fit(torch.randn(SHAPE), make_metric(*SHAPE), setting)
    x, index = torch.randn(2, 5, SHAPE[1]), torch.tensor([[0, 47, 3], [3, 3, 11]])
    assert torch.allclose(operator(x), x @ operator.dense().T, rtol=1e-4, atol=1e-4)
    assert torch.allclose(operator.take(index), operator.dense()[index], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("stride", [1, 2])
def test_convolve_agrees_with_dense(form: Form, stride: int, make_metric: Maker) -> None:
    operator = form.fit(torch.randn(SHAPE), make_metric(*SHAPE), settings_of(form)[1])
    x = torch.randn(2, 8, 7, 7)

    def convolution(x: Tensor, matrix: Tensor) -> Tensor:
        return torch.nn.functional.conv2d(x, matrix.reshape(-1, 8, 3, 3), stride=stride, padding=1)

    assert torch.allclose(operator.convolve(x, convolution), convolution(x, operator.dense()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs_and_casts(form: Form, dtype: torch.dtype, make_metric: Maker) -> None:
    setting = settings_of(form)[-1]
    operator = form.fit(torch.randn(SHAPE), make_metric(*SHAPE), setting)
    dense, stored = operator.dense().clone(), {k: v.clone() for k, v in operator.state_dict().items()}
    operator.to(dtype)
    assert all(torch.equal(v, stored[k]) and v.dtype == stored[k].dtype for k, v in operator.state_dict().items())
    x = torch.randn(5, SHAPE[1])
    y = operator(x.to(dtype))
    assert y.dtype == dtype
    assert (y.float() - x @ dense.T).norm() < 0.02 * (x @ dense.T).norm()
    assert operator.take(torch.tensor([1, 2]), dtype).dtype == dtype
    assert operator.dense(dtype).dtype == dtype


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_are_fitted_as_their_values(form: Form, dtype: torch.dtype, make_metric: Maker) -> None:
    weight, metric, setting = torch.randn(SHAPE).to(dtype), make_metric(*SHAPE), settings_of(form)[0]
    assert torch.equal(form.fit(weight, metric, setting).dense(), form.fit(weight.float(), metric, setting).dense())


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("weight", [torch.zeros(SHAPE), torch.full(SHAPE, 0.25), torch.eye(*SHAPE) * 1e4])
def test_degenerate_weights_give_finite_operators(form: Form, weight: Tensor, make_metric: Maker) -> None:
    for setting in settings_of(form):
        dense = form.fit(weight, make_metric(*SHAPE), setting).dense()
        assert dense.isfinite().all()
        assert dense.abs().max() <= 16 * weight.abs().max() + 1e-6


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_a_tied_operator_is_one_in_a_state(form: Form, make_metric: Maker) -> None:
    operator = form.fit(torch.randn(SHAPE), make_metric(*SHAPE), settings_of(form)[0])
    tied = torch.nn.ModuleDict({"table": operator, "head": operator})
    distinct = {id(t) for t in tied.state_dict(keep_vars=True).values()}
    assert len(distinct) == len(operator.state_dict())


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_settings_survive_json_and_fit_their_shape(form: Form) -> None:
    for shape in ((64, 64), (300, 40), (256, 512)):
        for setting in form.settings(shape):
            assert form.setting(as_values(setting)) == setting
            assert cost_of(form, shape, setting).stored < 4 * shape[0] * shape[1]


def test_an_unknown_form_offers_the_nearest() -> None:
    with pytest.raises(TersorError, match="'lowrnk'; did you mean 'lowrank'"):
        form_named("lowrnk")
