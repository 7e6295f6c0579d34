"""Tied entries: planted ties, closed forms, no loss at no compression, transforms, and the hash as it is written."""

from __future__ import annotations

from collections.abc import Callable
from math import gcd

import pytest
import torch

from tersor.errors import TersorError
from tersor.forms import SharedForm, SharedSetting, cost_of
from tersor.forms.shared import SharedOperator, Tie, least_squares, mixed, places
from tersor.metrics import Metric

Maker = Callable[..., Metric]
FORM = SharedForm()
SHAPE = (20, 33)
SETTINGS = [SharedSetting(0.25), SharedSetting(0.07, seed=5), SharedSetting(block=4), SharedSetting(block=7)]
each = pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: s.label)


def tie_of(shape: tuple[int, int], setting: SharedSetting) -> Tie:
    return Tie(*places(shape, setting, torch.arange(shape[0])), setting.size(shape))


@each
@pytest.mark.parametrize("kind", ["identity", "diagonal", "input", "kronecker"])
def test_planted_ties_are_found(setting: SharedSetting, kind: str, make_metric: Maker) -> None:
    planted = torch.randn(setting.size(SHAPE))
    weight = tie_of(SHAPE, setting).spread(planted)
    operator = FORM.fit(weight, make_metric(*SHAPE, kind), setting)
    used = tie_of(SHAPE, setting).gathered(
        torch.ones(SHAPE).mul(tie_of(SHAPE, setting).spread(torch.ones_like(planted)))
    )
    assert torch.equal(operator.dense(), weight.half().float())
    assert torch.equal(operator.array.dense()[0][used > 0], planted.half().float()[used > 0])


@each
@pytest.mark.parametrize("kind", ["identity", "diagonal", "input", "output", "kronecker"])
def test_values_are_those_of_a_dense_solve(
    setting: SharedSetting, kind: str, make_metric: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tersor.forms.shared.STEPS", 2000)
    monkeypatch.setattr("tersor.forms.conjugate.ENOUGH", 1e-28)
    metric = make_metric(*SHAPE, kind).damped(0.1, 0.1)
    weight, tie = torch.randn(SHAPE, dtype=torch.float64), tie_of(SHAPE, setting)
    rows, columns = (s.moment.diag() if s.is_diagonal else s.moment for s in (metric.rows, metric.columns))
    root = torch.kron(torch.linalg.cholesky(rows).T.contiguous(), torch.linalg.cholesky(columns).T.contiguous())
    basis = torch.stack([tie.spread(e).flatten() for e in torch.eye(tie.size, dtype=torch.float64)], 1)
    used = basis.any(0)
    exact = torch.linalg.lstsq(root @ basis[:, used], root @ weight.flatten()).solution
    assert torch.allclose(least_squares(weight, metric, tie)[used], exact, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("kind", ["identity", "diagonal", "kronecker"])
@pytest.mark.parametrize("setting", [SharedSetting(1.0), SharedSetting(1.0, seed=3), SharedSetting(block=1)])
def test_an_array_as_large_as_the_weight_loses_nothing(setting: SharedSetting, kind: str, make_metric: Maker) -> None:
    weight = torch.randn(SHAPE).half().float()
    assert torch.equal(FORM.fit(weight, make_metric(*SHAPE, kind), setting).dense(), weight)


@pytest.mark.parametrize("share", [0.5, 0.3, 0.01])
def test_partitions_use_every_value_once(share: float) -> None:
    setting = SharedSetting(share)
    size, place = setting.size(SHAPE), tie_of(SHAPE, setting).place.flatten()
    for part in place.split(size):
        assert len(part.unique()) == len(part) and int(part.min()) >= 0 and int(part.max()) < size


def test_the_hash_is_as_written() -> None:
    """Word by word in plain integers, with its values at a few places, which no version may change."""

    def h(x: int) -> int:
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
            x = (x ^ (x >> shift)) * factor % 2**32
        return x ^ (x >> 16)

    words = [0, 1, 2, 12345, 2**31, 2**32 - 1]
    assert mixed(torch.tensor(words)).tolist() == [h(x) for x in words]
    assert h(1) == 0x514E28B7 and h(2**32 - 1) == 0x81F16F39
    place, sign = places((4, 5), SharedSetting(0.35, seed=1), torch.arange(4))
    assert sign is not None
    for p in range(20):
        t, q = divmod(p, 7)
        a, c = h(2 * t ^ h(1)) % 7, h((2 * t + 1) ^ h(1)) % 7
        while gcd(a, 7) != 1:
            a += 1
        assert place[p // 5, p % 5] == (a * q + c) % 7
        assert sign[p // 5, p % 5] == (-1 if h(h(p ^ h(1)) ^ 0x9E3779B9) & 1 else 1)


def test_signs_and_places_are_balanced_and_seeds_differ() -> None:
    one, two = (places((64, 64), SharedSetting(0.1, seed=s), torch.arange(64)) for s in (0, 1))
    assert one[1] is not None and abs(float(one[1].float().mean())) < 0.05
    assert float((one[0] == two[0]).float().mean()) < 0.05


def test_cyclic_blocks_are_cyclic_and_their_values_the_means_along_the_diagonals(make_metric: Maker) -> None:
    weight, b = torch.randn(8, 12), 4
    dense = FORM.fit(weight, make_metric(8, 12, "identity"), SharedSetting(block=b)).dense()
    for i in range(0, 8, b):
        for j in range(0, 12, b):
            block, exact = dense[i : i + b, j : j + b], weight[i : i + b, j : j + b]
            assert torch.equal(block.roll((1, 1), (0, 1)), block)
            for k in range(b):
                mean = sum(float(exact[(k + m) % b, m]) for m in range(b)) / b
                assert float(block[k, 0]) == pytest.approx(mean, abs=1e-3)


@pytest.mark.parametrize(("shape", "block"), [((32, 64), 16), ((40, 70), 32), ((16, 16), 16), ((65, 31), 31)])
def test_transforms_agree_with_the_matrix_and_take_fewer_operations(shape: tuple[int, int], block: int) -> None:
    operator = SharedOperator(shape, SharedSetting(block=block))
    operator.array.values = torch.randn(1, operator.array.shape[1]).half().view(torch.int16)
    x = torch.randn(3, 5, shape[1])
    assert operator.flops < 2 * shape[0] * shape[1]
    assert torch.allclose(operator(x), x @ operator.dense().T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["identity", "diagonal", "kronecker"])
def test_finer_cyclic_blocks_do_better(kind: str, make_metric: Maker) -> None:
    """A cyclic block is cyclic in halves as well, so that each is a special case of the next."""
    weight, metric = torch.randn(32, 48), make_metric(32, 48, kind).damped(0.1, 0.1)
    divergences = [c.divergence for c in FORM.curve(weight, metric, [SharedSetting(block=b) for b in (16, 8, 4, 2, 1)])]
    assert divergences == sorted(divergences, reverse=True)


@pytest.mark.parametrize(("value_bits", "stored"), [(16, 2 * 165), (8, 165 + 3 + 8), (4, 83 + 3 + 8)])
def test_the_array_alone_is_stored(value_bits: int, stored: int) -> None:
    """Values; for integers a byte of scale for 64 and the two ends of the scales."""
    assert cost_of(FORM, SHAPE, SharedSetting(0.25, value_bits=value_bits)).stored == stored


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "needs one of share"),
        ({"share": 0.5, "block": 4}, "needs one of share"),
        ({"share": 0.0}, "share is 0.0"),
        ({"share": 1.5}, "share is 1.5"),
        ({"block": 0}, "block is 0"),
        ({"share": 0.5, "value_bits": 5}, "value_bits is 5"),
    ],
)
def test_a_bad_setting_is_named(values: dict[str, object], message: str) -> None:
    with pytest.raises(TersorError, match=message):
        FORM.setting(values)
