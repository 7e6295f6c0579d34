"""Hashed rows: planted tables, dense solves, means for one hash, and the hash as it is written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tersor.errors import TersorError
from tersor.forms import HashedForm, HashedSetting, cost_of
from tersor.forms.hashed import Hash, least_squares
from tersor.forms.shared import SharedSetting, places
from tersor.metrics import Metric, Side

Maker = Callable[..., Metric]
FORM = HashedForm()
SHAPE = (60, 7)
SETTINGS = [HashedSetting(0.25), HashedSetting(0.1, seed=3), HashedSetting(0.25, 2), HashedSetting(0.4, 2, seed=5)]
each = pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: f"{s.label} {s.seed}")


def hash_of(shape: tuple[int, int], setting: HashedSetting) -> Hash:
    return Hash.of(shape, setting, torch.arange(shape[0]))


def matrix_of(hashed: Hash) -> Tensor:
    """`H` (n, size), written out."""
    return hashed.spread(torch.eye(hashed.size, dtype=torch.float64))


@each
@pytest.mark.parametrize("kind", ["identity", "diagonal", "input", "kronecker"])
def test_a_table_made_by_hashing_is_recovered(setting: HashedSetting, kind: str, make_metric: Maker) -> None:
    hashed = hash_of(SHAPE, setting)
    weight = hashed.spread(torch.randint(-8, 9, (hashed.size, SHAPE[1])) / 8)
    metric = make_metric(*SHAPE, kind).damped(0.1, 0.1)
    dense = FORM.fit(weight, metric, setting).dense()
    assert torch.allclose(dense, weight, atol=2e-3)


@each
@pytest.mark.parametrize("kind", ["identity", "diagonal", "output", "kronecker"])
def test_rows_are_those_of_a_dense_solve(setting: HashedSetting, kind: str, make_metric: Maker) -> None:
    """Under both moments at once, though the fit never looks at that of the columns."""
    metric = make_metric(*SHAPE, kind).damped(0.1, 0.1)
    weight, hashed = torch.randn(SHAPE, dtype=torch.float64), hash_of(SHAPE, setting)
    rows, columns = (s.moment.diag() if s.is_diagonal else s.moment for s in (metric.rows, metric.columns))
    left, right = (torch.linalg.cholesky(m.double()).T.contiguous() for m in (rows, columns))
    basis = torch.kron(left @ matrix_of(hashed), right)
    exact = torch.linalg.lstsq(basis, torch.kron(left, right) @ weight.flatten(), driver="gelsd").solution
    exact = exact.reshape(hashed.size, SHAPE[1])
    fitted = hashed.spread(least_squares(weight, metric.rows, hashed))
    assert torch.allclose(fitted, hashed.spread(exact), atol=1e-5)


def test_with_one_hash_rows_are_means_weighted_by_frequency() -> None:
    weight, frequencies, setting = torch.randn(SHAPE), torch.rand(60), HashedSetting(0.2)
    hashed = hash_of(SHAPE, setting)
    table = least_squares(weight, Side(frequencies), hashed)
    for j in range(hashed.size):
        members = (hashed.place[:, 0] == j).nonzero()[:, 0]
        share = frequencies[members] * hashed.sign[members, 0]
        mean = (share[:, None] * weight[members]).sum(0) / frequencies[members].sum()
        assert torch.allclose(table[j].float(), mean, atol=1e-5)


@pytest.mark.parametrize("seed", [0, 4])
def test_a_table_as_large_as_the_weight_loses_nothing(seed: int, make_metric: Maker) -> None:
    weight = torch.randn(SHAPE).half().float()
    assert torch.equal(FORM.fit(weight, make_metric(*SHAPE), HashedSetting(1.0, seed=seed)).dense(), weight)


def test_frequent_rows_are_nearer_than_rare_ones() -> None:
    weight, frequencies = torch.randn(400, 8), 1 / (1.0 + torch.randperm(400))
    metric = Metric("diagonal", Side(frequencies), Side(torch.ones(8)))
    for hashes in (1, 2):
        error = (weight - FORM.fit(weight, metric, HashedSetting(0.25, hashes)).dense()).square().sum(1)
        often = frequencies > frequencies.median()
        assert error[frequencies.topk(20).indices].mean() < 0.2 * error[~often].mean()


def test_the_hash_is_that_of_places_and_neighbours_go_apart() -> None:
    setting = HashedSetting(0.25, 2, seed=7)
    hashed = hash_of(SHAPE, setting)
    for h in (0, 1):
        place, sign = places((60, 1), SharedSetting(0.25, seed=14 + h), torch.arange(60))
        same = hashed.place[:, h] == place[:, 0]
        assert torch.equal(hashed.sign[:, h], sign[:, 0])  # type: ignore[index]
        assert same.all() if h == 0 else same.float().mean() > 0.7
        first = hash_of(SHAPE, replace(setting, hashes=1)).place[:, 0]
        assert all(len(part.unique()) == 15 for part in first.split(15))
    assert (hashed.place[:, 0] != hashed.place[:, 1]).all()
    some = torch.tensor([3, 59, 3])
    assert torch.equal(Hash.of(SHAPE, setting, some).place, hashed.place[some])


@pytest.mark.parametrize(("bits", "stored"), [(None, 2 * 15 * 7), (8, 15 * (7 + 1) + 8), (4, 15 * (4 + 1) + 8)])
def test_the_smaller_table_alone_is_stored(bits: int | None, stored: int) -> None:
    """Values; for integers a byte of scale a row and the two ends of the scales."""
    for hashes in (1, 2):
        assert cost_of(FORM, SHAPE, HashedSetting(0.25, hashes, bits)).stored == stored


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"share": 0.0}, "share is 0.0"),
        ({"share": 0.5, "hashes": 3}, "hashes is 3"),
        ({"share": 0.5, "bits": 7}, "bits is 7"),
    ],
)
def test_a_bad_setting_is_named(values: dict[str, float], message: str) -> None:
    with pytest.raises(TersorError, match=message):
        FORM.setting(values)
