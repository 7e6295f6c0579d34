"""Matrix product operators: planted chains, the bounds of the TT-SVD, and the chains that are other forms."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import pytest
import torch
from torch import Tensor

from tersor.errors import TersorError
from tersor.forms import KroneckerForm, KroneckerSetting, TensorTrainForm, TensorTrainSetting
from tersor.forms.lowrank import factorise
from tersor.forms.multilinear import Frame, improve
from tersor.forms.network import Network
from tersor.forms.tensor_train import chain, split
from tersor.metrics import Metric, Side

Maker = Callable[..., Metric]
FORM = TensorTrainForm()


def plain_error(weight: Tensor, network: Network) -> Tensor:
    return weight - network.matrix(FORM.decompose(network.tensor(weight), network))


def unfolding(weight: Tensor, network: Network, cut: int) -> Tensor:
    """The modes of the first cores against those of the others."""
    d = len(network.operands)
    tensor = network.tensor(weight).permute([axis for k in range(d) for axis in (k, d + k)])
    return tensor.reshape(prod(tensor.shape[: 2 * cut]), -1)


@pytest.mark.parametrize(("rows", "columns"), [((4, 6), (3, 8)), ((2, 3, 4), (4, 2, 3)), ((2, 3, 2, 2), (2, 2, 3, 2))])
def test_a_planted_chain_is_found(rows: tuple[int, ...], columns: tuple[int, ...]) -> None:
    network = chain(rows, columns, 3)
    weight = network.matrix([torch.randn(s, dtype=torch.float64) for s in network.shapes])
    assert plain_error(weight, network).norm() < 1e-8 * weight.norm()
    assert plain_error(weight, chain(rows, columns, 2)).norm() > 0.1 * weight.norm()


def test_a_bond_of_full_rank_leaves_nothing() -> None:
    weight = torch.randn(24, 24, dtype=torch.float64)
    network = chain((2, 3, 4), (4, 2, 3), 10**6)
    assert [network.sizes[c] for c in "xy"] == [8, 12]
    assert plain_error(weight, network).norm() < 1e-8 * weight.norm()


@pytest.mark.parametrize("bond", [1, 3, 6])
def test_the_error_lies_between_the_largest_tail_and_the_sum_of_tails(bond: int) -> None:
    weight, network = torch.randn(24, 24, dtype=torch.float64), chain((2, 3, 4), (4, 2, 3), bond)
    tails = [float(torch.linalg.svdvals(unfolding(weight, network, k))[bond:].square().sum()) for k in (1, 2)]
    error = float(plain_error(weight, network).square().sum())
    assert max(tails) * (1 - 1e-9) <= error <= sum(tails) * (1 + 1e-9)


def test_more_bond_never_does_worse() -> None:
    weight = torch.randn(32, 48, dtype=torch.float64)
    errors = [float(plain_error(weight, chain((2, 4, 4), (3, 4, 4), bond)).norm()) for bond in (1, 2, 4, 8, 16)]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("kind", ["identity", "diagonal", "input", "kronecker"])
def test_all_rows_beside_all_columns_is_a_low_rank(kind: str, make_moment: Callable[..., Tensor]) -> None:
    """Exactly: each side is one mode, so that whitening the modes is whitening the matrix."""
    sides = Side(make_moment(20, spread=0.5)), Side(make_moment(30, seed=1, spread=0.5))
    metric, weight = Metric("kronecker", *sides).coarsened(kind), torch.randn(20, 30, dtype=torch.float64)
    network = chain((20, 1), (1, 30), 6)
    frame = Frame.of(network, metric)
    white = frame.whiten(network.tensor(weight), network.modes)
    factors = FORM.decompose(white, network)
    tail = factorise(metric.whiten(weight)).tail(6)
    assert float((white - network.contract(factors)).square().sum()) == pytest.approx(tail, rel=1e-8)
    better = improve(frame, white.reshape(20, 30), factors)
    assert float((white - network.contract(better)).square().sum()) == pytest.approx(tail, rel=1e-8)


def test_two_cores_are_a_sum_of_kronecker_products(make_metric: Maker) -> None:
    weight, metric = torch.randn(36, 64), make_metric(36, 64, "diagonal")
    train = FORM.fit(weight, metric, TensorTrainSetting(2, 5))
    products = KroneckerForm().fit(weight, metric, KroneckerSetting(6, 8, 5))
    assert train.nbytes == products.nbytes
    distances = [metric.distance(weight - o.dense()) for o in (train, products)]
    assert distances[0] == pytest.approx(distances[1], rel=0.02)


@pytest.mark.parametrize("cores", [3, 4])
def test_the_metric_is_felt(cores: int, make_metric: Maker) -> None:
    weight, metric, setting = torch.randn(48, 72), make_metric(48, 72), TensorTrainSetting(cores, 6)
    plain = FORM.fit(weight, metric.coarsened("identity"), setting)
    fitted = FORM.fit(weight, metric, setting)
    assert metric.distance(weight - fitted.dense()) < 0.8 * metric.distance(weight - plain.dense())


@pytest.mark.parametrize(
    ("size", "count", "expected"),
    [(384, 3, (6, 8, 8)), (1536, 3, (8, 12, 16)), (7, 2, (1, 7)), (64, 4, (2, 2, 4, 4)), (30, 3, (2, 3, 5))],
)
def test_sizes_split_evenly(size: int, count: int, expected: tuple[int, ...]) -> None:
    assert split(size, count) == expected


def test_the_ladder_keeps_to_its_shares() -> None:
    for setting in FORM.settings((384, 1536)):
        parameters = FORM.network((384, 1536), setting).parameters
        assert parameters <= (0.5 if setting.bits is None else 1.0) * 384 * 1536


def test_cores_and_bonds_are_checked() -> None:
    with pytest.raises(TersorError, match="tt: cores is 5"):
        TensorTrainSetting(5, 4)
    with pytest.raises(TersorError, match="tt: bond is 0"):
        TensorTrainSetting(3, 0)
