"""Rounded inputs: the values of the formats, exact shifts, dither that goes away, choices by measure, round trips."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tersor
from tersor.build import activations
from tersor.build.activations import Activations, InputRounding, nearest, power_of_two
from tersor.build.calibrate import fit_rounding
from tersor.build.layers import ApproximateConvolution, ApproximateLinear
from tersor.errors import TersorError
from tersor.forms import Operator
from tersor.forms.floats import levels_of
from tersor.judge.artifact import judge_sites
from tersor.metrics import Side
from tersor.models import open_model
from tersor.steps import build_plan, compress


class Whole(Operator):
    """The matrix as it is."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__((weight.shape[0], weight.shape[1]), None)  # type: ignore[arg-type]
        self.matrix = weight

    def decode(self) -> Tensor:
        return self.matrix


def linear(outputs: int, inputs: int) -> ApproximateLinear:
    return ApproximateLinear(Whole(torch.randn(outputs, inputs)), torch.randn(outputs), False)


def rounding_of(text: str, channels: int, outputs: int = 4) -> InputRounding:
    return InputRounding(Activations.of(text), channels, outputs)


@pytest.mark.parametrize("name", ["e2m1", "e1m2", "e3m0", "e2m3", "e3m2", "e4m3", "e5m2", "int2", "int4", "int8"])
def test_values_are_the_nearest_of_the_format(name: str) -> None:
    setting = Activations(name)
    if setting.integer_bits is None:
        levels = torch.tensor(list(levels_of(name)))
    else:
        levels = torch.arange(-setting.top, setting.top + 1)
    values = torch.cat([levels, torch.randn(2000) * setting.top / 3, torch.randn(500) * float(levels[levels > 0][0])])
    found = nearest(values, setting)
    assert torch.isin(found, levels).all()
    gap = (values[:, None] - levels).abs().amin(1)
    assert torch.equal((values - found).abs(), gap)
    assert torch.equal(found[: len(levels)], levels)


@pytest.mark.parametrize(("name", "dtype"), [("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)])
def test_eight_bit_floats_are_those_of_torch(name: str, dtype: torch.dtype) -> None:
    """Ties included; torch has no number for what is beyond the largest, which here is the largest."""
    setting = Activations(name, "tensor")
    levels = torch.tensor(list(levels_of(name)))
    spread = torch.randn(4000) * torch.exp2(torch.randint(-18, 8, (4000,)).float())
    x = torch.cat([(levels[1:] + levels[:-1]) / 2, levels, spread]).clamp(-setting.top, setting.top)
    expected = x.to(dtype).float()
    assert torch.equal(nearest(x, setting), expected)
    rounding = InputRounding(setting, 1, 1)  # with the scale of 1 that it is made with
    assert torch.equal(rounding(x[:, None])[:, 0], expected)


@pytest.mark.parametrize("text", ["int8", "int4", "fp8", "fp4", "int8,tensor", "fp4,tensor"])
def test_values_on_the_grid_stay_as_they_are(text: str) -> None:
    rounding = rounding_of(text, 16)
    top = rounding.setting.top
    levels = nearest(torch.randn(32, 16) * top, rounding.setting)
    levels[:, 3] = top
    scales = torch.exp2(torch.randint(-6, 6, (32, 1)).float()) if rounding.setting.scale == "token" else 0.25
    if rounding.setting.scale == "tensor":
        rounding.set_scale(0.25)
    assert torch.equal(rounding(levels * scales), levels * scales)


def test_a_token_has_a_scale_of_its_own_and_an_image_too() -> None:
    x = torch.randn(5, 8)
    rounding = rounding_of("int4", 8)
    assert torch.equal(rounding(x)[2], rounding(x[2:3])[0])
    assert torch.allclose(rounding(100 * x), 100 * rounding(x))
    image = InputRounding(Activations("int4"), 3, 0, spatial=2)
    x = torch.randn(4, 3, 5, 5)
    assert torch.equal(image(x)[1], image(x[1:2])[0])


def test_a_shift_is_a_power_of_two_in_the_exponents_of_the_weight() -> None:
    """`W Q(x)` with the factors at the inputs is `(W 2^k) Q'(2^-k x)` bit for bit, and exact where Q' is."""
    layer, k = linear(6, 12), torch.arange(-6, 6)
    rounding = rounding_of("fp8,shift", 12, 6)
    rounding.shift = k.to(torch.int8)
    x = torch.randn(20, 12)
    plain = rounding_of("fp8", 12)
    folded = nn.functional.linear(plain(x * power_of_two(-k)), layer.weight * power_of_two(k))
    assert torch.equal(layer.product(rounding(x)), folded)
    on_grid = nearest(torch.randn(20, 12), Activations("e4m3"))
    on_grid[:, 0] = 448.0
    assert torch.equal(layer.product(rounding(on_grid * power_of_two(k))), layer.product(on_grid * power_of_two(k)))


def test_no_channel_is_rounded_worse_for_a_shift() -> None:
    """Channels of all sizes that matter alike."""
    layer, sizes = linear(8, 32), torch.logspace(-3, 2, 32)
    layer.weight_operator().matrix /= sizes  # type: ignore[operator]
    x = torch.randn(64, 32) * sizes
    found, _, tests = fit_rounding(layer, x, Activations.of("int4,tensor,shift"), Side(torch.eye(8)), 1.0)
    assert found.setting.shift and tests["shift"] < tests["plain"]
    largest = (x[0::2] / power_of_two(found.shift)).abs().amax(0)
    assert (largest <= x[0::2].abs().max()).all() and (largest > 0.49 * x[0::2].abs().max()).all()


def test_dither_is_taken_away_exactly_but_for_the_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were there no rounding at all, the layer would do what it did; the constant is kept in half precision."""
    monkeypatch.setattr(activations, "nearest", lambda values, setting: values)
    layer = linear(6, 32)
    x = torch.randn(40, 32)
    expected = layer(x)
    rounding = rounding_of("int8,tensor,dither", 32, 6)
    rounding.set_scale(0.02)
    rounding.set_noise(torch.rand(32) - 0.5)
    rounding.take_away(layer.product)
    layer.rounding = rounding
    assert torch.allclose(rounding.seen(x), x, atol=1e-6)
    assert not torch.allclose(layer.product(rounding(x)) + layer.bias, expected, atol=1e-3)
    assert torch.allclose(layer(x), expected, atol=1e-4)


def test_dither_is_right_in_the_mean_over_noises() -> None:
    x = torch.full((4000, 1), 0.3)
    rounding = rounding_of("int4,tensor,dither", 4000)
    rounding.set_scale(1.0)
    rounding.set_noise(torch.arange(4000) / 4000 - 0.5)
    assert float(rounding.seen(x.T).mean()) == pytest.approx(0.3, abs=5e-3)  # noise has 128 steps
    assert float(rounding_of("int4,tensor", 4000)(x.T).mean()) == 0.0


def planted(bulk: Tensor) -> tuple[ApproximateLinear, Tensor]:
    """Inputs whose scale is held at 1 by a channel at 3 that matters most, as integers of 3 bits reach."""
    layer = linear(8, 64)
    operator = layer.weight_operator()
    operator.matrix[:, 0] *= 100  # type: ignore[operator]
    return layer, torch.cat([torch.full((len(bulk), 1), 3.0), bulk], 1)


def test_dither_is_chosen_where_it_was_measured_to_help_and_nowhere_else() -> None:
    asked, gradients = Activations.of("int3,tensor,dither"), Side(torch.eye(8))
    signs = torch.randint(0, 2, (256, 63)) * 2 - 1
    near_edges = planted((0.4 + 0.1 * torch.rand(256, 63)) * signs)
    found, damage, tests = fit_rounding(*near_edges, asked, gradients, 1.0)
    assert found.setting.dither and damage == tests["dither"] < 0.8 * tests["plain"]

    on_grid = planted(torch.randint(-3, 4, (256, 63)).float())
    found, damage, tests = fit_rounding(*on_grid, asked, gradients, 1.0)
    assert not found.setting.dither and damage == tests["plain"] == pytest.approx(0, abs=1e-6) and tests["dither"] > 0.1


def test_the_prediction_is_the_error_carried_through_the_layer() -> None:
    layer, x = linear(5, 16), torch.randn(100, 16)
    root = torch.randn(5, 5)
    moment = root @ root.T
    found, damage, _ = fit_rounding(layer, x, Activations.of("int4"), Side(moment), 0.5)
    error = (found(x[1::2]) - x[1::2]) @ layer.weight.T
    assert damage == pytest.approx(0.5 * float(torch.einsum("na,ab,nb->n", error, moment, error).mean()), rel=1e-4)


def test_a_convolution_is_rounded_without_dither() -> None:
    plain = nn.Conv2d(3, 8, 3, padding=1)
    layer = ApproximateConvolution(Whole(plain.weight.detach().reshape(8, -1)), plain, False)
    x = torch.randn(6, 3, 8, 8) * torch.tensor([0.01, 1, 30]).view(3, 1, 1)
    found, damage, tests = fit_rounding(
        layer, x, Activations.of("int4,tensor,shift,dither"), Side(torch.eye(8)), 1.0
    )  # fmt: skip
    assert found.setting == Activations("int4", "tensor", shift=True) and damage < tests["plain"]
    layer.rounding = found
    assert torch.allclose(layer(x), plain(found(x)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("int9", "'int9' is no format"),
        ("fp16", "'fp16' is no format"),
        ("int8,row", "cannot be read at 'row'"),
        ("int8,token,tensor", "cannot be read at 'token'"),
        ("int8,dither", "needs integers with a scale of the whole tensor"),
        ("fp8,tensor,dither", "needs integers with a scale of the whole tensor"),
    ],
)
def test_what_cannot_be_rounded_is_refused(text: str, named: str, tmp_path: Path) -> None:
    with pytest.raises(TersorError, match=named):
        compress(nn.Linear(4, 4), [torch.zeros(1, 4)], "50%", tmp_path / "out", activations=text)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.run").exists()


WAYS = ["int8", "fp8,tensor", "int4,tensor,shift,dither", "fp4,shift"]


@pytest.mark.parametrize("way", WAYS)
def test_round_trip_of_a_module(
    way: str, conv_net: Callable[[], nn.Module], images: Callable[..., Any], quick: dict[str, Any], tmp_path: Path
) -> None:
    module, batches = conv_net(), images()
    result = compress(module, batches, "30%", tmp_path / "out", activations=way, held_out=batches, **quick)
    path = tmp_path / "out" / "model.safetensors"
    assert result.plan.stored == path.stat().st_size <= 0.3 * result.study.stored_bytes
    record = json.loads((tmp_path / "out" / "tersor.json").read_text())["activations"]
    assert set(record["layers"]) == {"grouped", "point"}  # `circular` has a forward of its own, the others are small
    assert result.plan.divergence > sum(c.divergence for c in result.plan.choices)
    assert f"activations={way}" in result.plan.name and result.judgement.predicted == result.plan.divergence
    with torch.no_grad():
        expected = module(batches[0])
        loaded = tersor.load(tmp_path / "out", model=conv_net)
        assert torch.equal(loaded(batches[0]), expected)
        moved = copy.deepcopy(loaded).to(torch.bfloat16)
        found = moved(batches[0].bfloat16())
        assert found.dtype == torch.bfloat16 and (found.float() - expected).norm() < 0.2 * expected.norm()
        for old, new in zip(loaded.buffers(), moved.buffers(), strict=True):
            assert old.is_floating_point() or torch.equal(old, new)
        dense = tersor.load(tmp_path / "out", model=conv_net, mode="dense")
        assert (dense(batches[0]) - expected).abs().max() > 0


@pytest.mark.parametrize(("name", "way"), [("bert", WAYS[2]), ("gpt2", WAYS[2]), ("llama-tied", WAYS[0])])
def test_round_trip_of_a_checkpoint(
    name: str, way: str, make_checkpoint: Callable[..., Path], tokens: Callable[..., Any], quick: dict[str, Any],
    tmp_path: Path,
) -> None:  # fmt: skip
    transformers = pytest.importorskip("transformers")
    folder, out = make_checkpoint(name), tmp_path / "out"
    result = compress(folder, tokens(), "60%", out, activations=way, **quick)
    assert result.plan.stored == (out / "model.safetensors").stat().st_size <= 0.6 * result.study.stored_bytes
    places = json.loads((out / "tersor.json").read_text())["activations"]["layers"]
    assert places and not any("embed" in place or "head" in place or "wte" in place for place in places)
    batch = tokens()[0]

    def outputs(module: nn.Module) -> Tensor:
        with torch.no_grad():
            found = module(**batch)
        kept: Tensor = found[0]
        return kept

    expected = outputs(result.study.model.module)
    auto = transformers.AutoModel if name == "bert" else transformers.AutoModelForCausalLM
    loaded = auto.from_pretrained(out)
    assert torch.equal(outputs(loaded), expected) and torch.equal(outputs(tersor.load(out)), expected)
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(outputs(auto.from_pretrained(tmp_path / "again")), expected)
    half = tersor.load(out, dtype=torch.bfloat16)
    stored = {k: v for k, v in loaded.state_dict().items() if ".rounding." in k}
    assert all(torch.equal(half.state_dict()[k], v) for k, v in stored.items())
    torch.compiler.reset()
    compiled: Any = torch.compile(loaded, backend="aot_eager", fullgraph=True)
    assert torch.allclose(outputs(compiled), expected, rtol=1e-3, atol=1e-2)

    ledger = judge_sites(open_model(folder), out, tokens(), run=result.study.run)
    assert {f"{place} (inputs)" for place in places} <= set(ledger)
    predicted, measured = ledger[f"{next(iter(places))} (inputs)"]
    assert predicted > 0 and measured.value > 0
    assert {site for _, site, *_ in result.study.run.ledger()} >= set(ledger)


def test_data_are_wanted_and_a_damaged_setting_is_named(
    conv_net: Callable[[], nn.Module], images: Callable[..., Any], quick: dict[str, Any], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    result = compress(conv_net(), images(), "45%", out, activations="int8", **quick)
    with pytest.raises(TersorError, match="give calibration data"):
        build_plan(result.study, result.plan, tmp_path / "other", activations="int8")
    record = json.loads((out / "tersor.json").read_text())
    record["sites"]["point"]["activations"]["point"]["format"] = "int99"
    (out / "tersor.json").write_text(json.dumps(record))
    with pytest.raises(TersorError, match=r"inputs of point cannot be rounded.*'int99' is no format"):
        tersor.load(out, model=conv_net)
