"""Fitted weights that are not shrunk: what is lost in the weight's own direction is given back, and why that pays."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tersor.coding.trellis import Trellis
from tersor.forms import FORMS, IntSetting, TrellisSetting
from tersor.metrics import Metric, Side

Maker = Callable[..., Metric]
SETTINGS = (
    ("int", IntSetting(2, 32, enlarged=True)),
    ("int", IntSetting(2, None, symmetric=True, enlarged=True)),
    ("int", IntSetting(2, 32, scale_bits=16, enlarged=True)),
    ("int", IntSetting(2, 32, axis="rows", enlarged=True)),
    ("int", IntSetting(2, 32, axis="rows", scale_bits=16, enlarged=True)),
    ("portable", IntSetting(2, 32, "columns", False, 16, zeros="whole", enlarged=True)),
    ("trellis", TrellisSetting(1.5)),
)
each = pytest.mark.parametrize(("name", "setting"), SETTINGS, ids=lambda v: v if isinstance(v, str) else v.label)


def weight_of(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@each
@pytest.mark.parametrize("kind", ["input", "kronecker"])
def test_an_error_is_orthogonal_to_the_weight(name: str, setting: Any, kind: str, make_metric: Maker) -> None:
    """To what the precision of scales allows; and the error is hardly larger than the least."""
    weight, metric = weight_of(96, 64), make_metric(96, 64, kind).damped(0.1, 0.1)
    operator = FORMS[name].fit(weight, metric, setting)
    shrunk = FORMS[name].fit(weight, metric, replace(setting, enlarged=False))
    lost = [1 - float(metric.kept(weight, o.dense()).parts.sum()) for o in (operator, shrunk)]
    assert abs(lost[0]) < max(1e-3, 0.3 * abs(lost[1]))
    assert metric.distance(weight - operator.dense()) < 1.1 * metric.distance(weight - shrunk.dense())
    assert operator.nbytes == shrunk.nbytes


def test_every_row_is_enlarged_by_itself(make_metric: Maker) -> None:
    weight, metric = weight_of(64, 96), make_metric(64, 96, "input").damped(0.1, 0.1)
    operator = FORMS["int"].fit(weight, metric, IntSetting(2, 32, scale_bits=16, enlarged=True))
    rows = metric.kept(weight, operator.dense()).of_rows
    assert float((rows - 1).abs().median()) < 5e-3


@pytest.mark.parametrize(
    ("name", "setting"), [("int", IntSetting(2, 32, enlarged=True)), ("trellis", TrellisSetting(1.5))]
)
def test_what_many_layers_lose_alike_adds_up(name: str, setting: Any) -> None:
    """Layers side by side that have something in common: with shrunken weights their sum is smaller too."""
    common = weight_of(64, 64)
    layers = [common + weight_of(64, 64, seed=k) for k in range(1, 17)]
    metric = Metric("kronecker", Side(torch.ones(64)), Side(torch.ones(64)))

    def error(setting: Any) -> tuple[float, float]:
        """The squared error of the sum, and what the layers' own add up to."""
        errors = [layer - FORMS[name].fit(layer, metric, setting).dense() for layer in layers]
        return float(torch.stack(errors).sum(0).square().sum()), sum(float(e.square().sum()) for e in errors)

    whole, alone = error(setting)
    assert whole < 1.35 * alone  # as errors that have nothing to do with one another
    shrunk, alone = error(replace(setting, enlarged=False))
    assert shrunk > 1.5 * alone and whole < 0.8 * shrunk


def test_a_stream_without_a_factor_has_none(make_metric: Maker) -> None:
    operator = FORMS["trellis"].fit(weight_of(8, 12), make_metric(8, 12), TrellisSetting(2.0))
    trellis = Trellis.from_bytes(operator.stream.numpy().tobytes(), (8, 12))
    plain = replace(trellis, enlarged=0)
    assert plain.factor == 1 and Trellis.from_bytes(plain.to_bytes(), (8, 12)).factor == 1
    for factor in (0.9, 1.0, 1.2, 3.0, 100.0):
        larger = Trellis.from_bytes(plain.enlarged_by(factor).to_bytes(), (8, 12))
        assert larger.factor == pytest.approx(min(max(factor, 1), 1 + 65535 / 16384), abs=1e-4)
