"""Tucker and CP: planted cores and ranks, the bounds of the surrogate by trying every core, two-step convolutions."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor

from tersor.errors import TersorError
from tersor.forms import CPForm, CPSetting, TuckerForm, TuckerSetting, cost_of
from tersor.forms.tucker import best_core, core_of_ratio, modes_of, size_of
from tersor.metrics import Metric, Side

Maker = Callable[..., Metric]
FORM = TuckerForm()


def planted(dims: tuple[int, ...], core: tuple[int, ...]) -> Tensor:
    bases = [torch.randn(n, r, dtype=torch.float64) for n, r in zip(dims, core, strict=True)]
    return torch.einsum("rst,ar,bs,ct->abc", torch.randn(core, dtype=torch.float64), *bases)


def loss(tensor: Tensor, core: tuple[int, int, int]) -> float:
    """What the best factors found of a core leave out, squares."""
    shape, setting = (tensor.shape[0], tensor[0].numel()), TuckerSetting(tensor.shape[2], 1.0, core=core)
    network = FORM.network(shape, setting)
    return float((tensor - network.contract(FORM.decompose(FORM.prepare(tensor), network))).square().sum())


def test_a_planted_core_is_found() -> None:
    tensor = planted((12, 10, 9), (4, 3, 2))
    assert loss(tensor, (4, 3, 2)) < 1e-16 * float(tensor.square().sum())
    assert loss(tensor, (4, 2, 2)) > 1e-4 * float(tensor.square().sum())


def test_the_shape_of_a_planted_core_is_chosen(make_moment: Callable[..., Tensor]) -> None:
    tensor = planted((20, 16, 9), (4, 3, 2)).float()
    weight, room = tensor.reshape(20, 144), size_of((20, 16, 9), (4, 3, 2)) / tensor.numel()
    metric = Metric("kronecker", Side(make_moment(20, spread=0.3)), Side(make_moment(144, seed=1, spread=0.3)))
    fitted = FORM.fit(weight, metric, TuckerSetting(9, room))
    assert fitted.setting.core == (4, 3, 2)
    assert metric.distance(weight - fitted.dense()) < 1e-5 * metric.distance(weight)


def test_the_whole_core_is_the_weight() -> None:
    tensor = torch.randn(6, 5, 9, dtype=torch.float64)
    assert loss(tensor, (6, 5, 9)) == 0
    assert FORM.network((6, 45), TuckerSetting(9, 1.0, core=(6, 5, 9))).parameters == tensor.numel()


def test_a_basis_of_full_rank_is_not_stored() -> None:
    """All positions kept is Tucker-2."""
    network = FORM.network((16, 72), TuckerSetting(9, 1.0, core=(5, 4, 9)))
    assert network.operands == ("rsc", "ar", "bs")
    assert network.parameters == 5 * 4 * 9 + 16 * 5 + 8 * 4 == size_of((16, 8, 9), (5, 4, 9))


@pytest.mark.parametrize("seed", range(4))
def test_every_core_lies_between_its_bounds_and_the_best_surrogate_is_found(seed: int) -> None:
    """P365: the largest tail is at most the loss, the sum of tails at least; so the choice is within a factor of 3."""
    dims = (6, 5, 4)
    tensor = torch.randn(dims, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    tensor = tensor * torch.arange(1, 7, dtype=torch.float64)[:, None, None] ** -1.0
    tails = FORM.prepare(tensor).tails
    within, losses, sums = [], {}, {}
    for core in product(*(range(1, n + 1) for n in dims)):
        ends = [float(tail[r]) for tail, r in zip(tails, core, strict=True)]
        found = loss(tensor, core)
        assert max(ends) * (1 - 1e-9) - 1e-12 <= found <= sum(ends) * (1 + 1e-9) + 1e-12
        losses[core], sums[core] = found, sum(ends)
        if size_of(dims, core) <= 60:
            within.append(core)
    chosen = best_core(tails, 60)
    assert chosen in within
    assert sums[chosen] == pytest.approx(min(sums[c] for c in within), rel=1e-12)
    assert losses[chosen] <= 3 * min(losses[c] for c in within)


def test_no_room_is_the_smallest_core() -> None:
    tensor = torch.randn(6, 5, 4, dtype=torch.float64)
    assert best_core(FORM.prepare(tensor).tails, 3) == (1, 1, 1) == core_of_ratio((6, 5, 4), 3)


def test_ratios_are_the_same_for_every_mode() -> None:
    assert core_of_ratio((64, 64, 9), 64 * 64 * 9) == (64, 64, 9)
    core = core_of_ratio((64, 64, 9), 9000)
    assert core[0] == core[1] and abs(core[0] / 64 - core[2] / 9) < 1 / 9 and size_of((64, 64, 9), core) <= 9000


def test_in_turn_is_no_worse_than_at_once() -> None:
    tensor = torch.randn(10, 9, 8, dtype=torch.float64)
    prepared, core = FORM.prepare(tensor), (3, 4, 2)
    bases = [f.left[:, :r] for f, r in zip(prepared.found, core, strict=True)]
    kept = torch.einsum("abc,ar,bs,ct->rst", tensor, *bases).square().sum()
    assert loss(tensor, core) < float(tensor.square().sum() - kept)


@pytest.mark.parametrize("rule", ["surrogate", "ratio"])
def test_the_factors_take_no_more_than_their_share(rule: str, make_metric: Maker) -> None:
    weight, metric = torch.randn(48, 72), make_metric(48, 72)
    for share in (0.2, 0.5, 0.9):
        fitted = FORM.fit(weight, metric, TuckerSetting(9, share, rule))
        assert fitted.nbytes <= 2 * share * weight.numel()
        again = FORM.fit(weight, metric, fitted.setting)
        assert again.setting.core == fitted.setting.core


@pytest.mark.parametrize("form", [FORM, CPForm()], ids=["tucker", "cp"])
def test_a_large_image_is_convolved_in_two_steps(form: TuckerForm | CPForm, make_metric: Maker) -> None:
    setting = TuckerSetting(9, 0.2) if isinstance(form, TuckerForm) else CPSetting(9, 12)
    operator = form.fit(torch.randn(64, 288), make_metric(64, 288, "diagonal"), setting)
    x, seen = torch.randn(2, 32, 32, 32), []

    def convolution(x: Tensor, matrix: Tensor) -> Tensor:
        seen.append(len(matrix))
        return torch.nn.functional.conv2d(x, matrix.reshape(-1, 32, 3, 3), padding=1)

    assert torch.allclose(operator.convolve(x, convolution), convolution(x, operator.dense()), atol=1e-3)
    assert seen[0] < 32 and seen[1] == 64
    assert operator.flops == 2 * seen[0] * (64 + 288) == cost_of(form, (64, 288), operator.setting).flops


@pytest.mark.parametrize("dims", [(12, 10, 9), (8, 15, 3)])
def test_a_planted_rank_of_outer_products_is_found(dims: tuple[int, int, int]) -> None:
    factors = [torch.randn(n, 3, dtype=torch.float64) for n in dims]
    tensor, form = torch.einsum("ar,br,cr->abc", *factors), CPForm()
    network = form.network((dims[0], dims[1] * dims[2]), CPSetting(dims[2], 3))
    found = network.contract(form.decompose(tensor, network))
    assert (found - tensor).norm() < 1e-6 * tensor.norm()
    weight = tensor.float().reshape(dims[0], -1)
    metric = Metric("identity", Side(torch.ones(dims[0])), Side(torch.ones(weight.shape[1])))
    operator = form.fit(weight, metric, CPSetting(dims[2], 3))
    assert (operator.dense() - weight).norm() < 2e-3 * weight.norm()


def test_a_rank_above_all_sizes_is_reached() -> None:
    """Vectors that no singular one starts are drawn, always alike."""
    weight = torch.randn(6, 15)
    metric = Metric("identity", Side(torch.ones(6)), Side(torch.ones(15)))
    errors = [float((weight - CPForm().fit(weight, metric, CPSetting(3, r)).dense()).norm()) for r in (2, 15)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.1 * float(weight.norm())


def test_a_kernel_that_does_not_divide_takes_what_is_common() -> None:
    """With one position left, Tucker is a low rank with a core between."""
    assert modes_of((16, 64), 9) == (16, 64, 1) and modes_of((16, 24), 9) == (16, 8, 3)
    weight = torch.randn(16, 64, dtype=torch.float64)
    tail = float(torch.linalg.svdvals(weight)[5:].square().sum())
    assert loss(weight[..., None], (5, 5, 1)) == pytest.approx(tail, rel=1e-9)


def test_bad_settings_are_one_sentence() -> None:
    with pytest.raises(TersorError, match="tucker: core is"):
        FORM.network((16, 72), TuckerSetting(9, 0.5, core=(17, 1, 1)))
    for values, message in (({"share": 0}, "share is 0"), ({"rule": "greedy"}, "rule is 'greedy'")):
        with pytest.raises(TersorError, match=message):
            TuckerSetting(**{"kernel": 9, "share": 0.5, **values})
    with pytest.raises(TersorError, match="cp: rank is 0"):
        CPSetting(9, 0)
