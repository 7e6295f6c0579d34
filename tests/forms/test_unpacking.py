"""Compiled decoding gives what the plain operations give, for every layout, for whole matrices and for rows of them."""

from __future__ import annotations

import copy
import itertools
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tersor.coding import Coded
from tersor.forms import IntSetting, LowRankForm, LowRankSetting, Operator
from tersor.forms.integers import IntOperator
from tersor.forms.packed import Packed
from tersor.forms.packing import PLANES, pack
from tersor.metrics import Metric, Side

LAYOUTS = list(
    itertools.product((2, 3, 4, 5, 6, 8), (16, None), ("columns", "rows"), (True, False), (8, 16), ("fine", "whole"))
)


def out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    for place in ("integers", "packed"):
        monkeypatch.setattr(f"tersor.forms.{place}.in_reach", lambda tensor: False)


def are_near(one: Tensor, other: Tensor) -> bool:
    """Whether two sums of the same products differ by no more than the order in which they are taken."""
    return bool((one - other).abs().max() <= 1e-5 * other.abs().max() + 1e-30)


def drawn(operator: IntOperator) -> IntOperator:
    """The operator with random codes, scales and zeros."""
    top = 2**operator.setting.bits - 1
    rows, columns = operator.shape
    operator.codes = pack(torch.randint(0, top + 1, (rows, columns)), operator.setting.bits)
    groups = operator.scale.shape
    zero = torch.rand(groups) * top
    operator.set_grid(torch.rand(groups) + 0.01, zero.ceil() if operator.setting.zeros == "whole" else zero)
    return operator


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda v: "-".join(map(str, v)))
def test_integers(layout: tuple[int, int | None, str, bool, int, str], monkeypatch: pytest.MonkeyPatch) -> None:
    bits, size, axis, symmetric, scale_bits, zeros = layout
    setting = IntSetting(bits, size, axis, symmetric, scale_bits, zeros=zeros)
    operator = drawn(IntOperator((20, 37), setting))
    index = torch.tensor([[19, 0], [7, 7]])
    found = operator.decode(), operator.take(index)
    few = torch.randn(3, 37)
    product = operator.product(few.numpy())
    assert (product is None) == (axis == "rows")
    assert product is None or are_near(torch.from_numpy(product), few @ found[0].T)
    out_of_reach(monkeypatch)
    assert operator.product(few.numpy()) is None
    for one, other in zip(found, (operator.decode(), operator.take(index)), strict=True):
        assert one.shape == other.shape and torch.allclose(one, other, rtol=1e-5, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(set(PLANES) - {1})), st.integers(1, 9), st.integers(1, 70), st.integers(0, 2**31))
def test_every_width_of_a_row(bits: int, rows: int, columns: int, seed: int) -> None:
    torch.manual_seed(seed)
    codes = torch.randint(0, 2**bits, (rows, columns))
    operator = IntOperator((rows, columns), IntSetting(bits, None, symmetric=True, scale_bits=16))
    operator.codes = pack(codes, bits)
    operator.set_grid(torch.ones(rows, 1), torch.zeros(rows, 1))
    assert torch.equal(operator.decode(), codes.float() - operator.setting.half)


@pytest.mark.parametrize("spread", [1, 6, 40, 3000])
@pytest.mark.parametrize("shape", [(1, 1), (7, 33), (20, 64)])
def test_coded_integers_and_their_escapes(spread: int, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(spread)
    codes = (generator.standard_t(2, shape) * spread).clip(-60000, 60000).astype(np.int32)
    rows, columns = (generator.integers(-90, 20, n) for n in shape)
    packed = Packed.of(Coded(codes, rows, columns, 4))
    index = torch.tensor([shape[0] - 1, 0, 0, shape[0] // 2])
    found = packed.rows(None), packed.rows(index)
    few = torch.randn(2, shape[1])
    product = packed.product(few.numpy())
    assert product is not None and are_near(torch.from_numpy(product), few @ found[0].T)
    out_of_reach(monkeypatch)
    assert packed.product(few.numpy()) is None
    assert torch.allclose(found[0], packed.rows(None), rtol=1e-6)
    assert torch.allclose(found[1], packed.rows(index), rtol=1e-6)
    assert torch.equal(found[1], found[0][index])
    steps = np.exp2(rows / 4)[:, None] * np.exp2(columns / 4)
    assert torch.allclose(found[0].double(), torch.from_numpy(codes * steps), rtol=1e-5)


def test_few_positions_are_not_decoded_for_unless_they_want_a_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    operator = drawn(IntOperator((20, 37), IntSetting(4, 16)))
    x = torch.randn(2, 2, 37)
    whole = nn.functional.linear(x, operator.dense())
    wanted = x.clone().requires_grad_()
    operator(wanted).sum().backward()
    assert wanted.grad is not None and torch.allclose(wanted.grad, operator.dense().sum(0).expand_as(x), atol=1e-5)
    many = operator(torch.cat([x, x]))
    monkeypatch.setattr(IntOperator, "decode", lambda self: pytest.fail("decoded"))
    assert are_near(operator(x), whole) and operator(x).shape == (2, 2, 20)
    assert are_near(operator(x.bfloat16()).float(), whole) is False and operator(x.bfloat16()).dtype == torch.bfloat16
    assert are_near(many[:2], whole)
    with torch.no_grad():
        assert are_near(operator(wanted), whole)


@pytest.mark.parametrize("size", [4, 64])
def test_a_convolution_in_two_steps_or_in_one(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = nn.Conv2d(16, 48, 3, padding=1, bias=False), torch.randn(2, 16, size, size)
    weight = layer.weight.detach().flatten(1)
    operator: Operator = LowRankForm().fit(
        weight, Metric("identity", Side(torch.ones(48)), Side(torch.ones(144))), LowRankSetting(4)
    )

    def convolution(x: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
        return nn.functional.conv2d(x, matrix.reshape(-1, 16, 3, 3), padding=1)

    whole = convolution(x, operator.dense())
    assert torch.allclose(operator.convolve(x, convolution), whole, rtol=1e-4, atol=1e-5)
    monkeypatch.setattr("tersor.forms.products.WORTH", 0)
    assert torch.allclose(operator.convolve(x, convolution), whole, rtol=1e-4, atol=1e-5)


def test_views_follow_their_tensors_and_are_not_copied() -> None:
    operator = drawn(IntOperator((20, 37), IntSetting(4, 16)))
    first = operator.decode()
    operator.codes[0] = 255
    changed = operator.decode()
    assert torch.equal(changed[1:], first[1:]) and not torch.equal(changed[0], first[0])
    copied = copy.deepcopy(operator)
    copied.codes.zero_()
    assert torch.equal(operator.decode(), changed) and not torch.equal(copied.decode(), changed)
    operator.codes = torch.zeros_like(operator.codes)
    assert torch.equal(operator.decode(), copied.decode())
    other = drawn(IntOperator((20, 37), IntSetting(4, 16)))
    operator.load_state_dict(other.state_dict())
    assert torch.equal(operator.decode(), other.decode())
    operator.share_memory()
    assert torch.equal(operator.decode(), other.decode())
    assert torch.equal(pickle.loads(pickle.dumps(operator)).decode(), other.decode())


def test_a_row_that_is_not_there_is_refused() -> None:
    packed = Packed.of(Coded(np.ones((4, 8), np.int32), np.zeros(4, int), np.zeros(8, int), 4))
    for take in (packed.rows, drawn(IntOperator((4, 37), IntSetting(4, 16))).take):
        with pytest.raises(IndexError):
            take(torch.tensor([4]))
