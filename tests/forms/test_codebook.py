"""Codebooks: the lattice E8 as it is known, codes and entries that are best for each other, less error than scalars."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from tersor.errors import TersorError
from tersor.forms import CodebookForm, CodebookSetting, IntForm, IntSetting, e8
from tersor.forms.codebook_fit import Book, Scaled, choose, refitted
from tersor.forms.codebook_kernels import _least, _nearest, nearest
from tersor.metrics import Metric, Side

Maker = Callable[..., Metric]


def identity(rows: int, columns: int) -> Metric:
    return Metric("identity", Side(torch.ones(rows)), Side(torch.ones(columns)), 1 / (rows * columns))


def test_the_shells_of_the_lattice_have_their_known_sizes() -> None:
    points = e8.points(16).astype(int)
    norms, counts = np.unique((points**2).sum(1) // 4, return_counts=True)
    assert dict(zip(norms.tolist(), counts.tolist(), strict=True)) == {
        0: 1, 2: 240, 4: 2160, 6: 6720, 8: 17520, 10: 30240
    }  # fmt: skip
    assert len(np.unique(e8.key_of(points))) == len(points)
    differences = points[:500, None] - points[None, :500]  # of two points: a point again
    parity = differences % 2
    assert (parity == parity[..., :1]).all() and (differences.sum(-1) % 4 == 0).all()


def test_a_point_is_found_by_its_key() -> None:
    keys, order = e8.keys(12)
    points = e8.points(12)
    assert (order[np.searchsorted(keys, e8.key_of(points))] == np.arange(len(points))).all()


def test_the_nearest_point_is_the_nearest() -> None:
    points, generator = e8.points(16) / 2.0, np.random.default_rng(0)
    best, other = np.empty(8, np.int64), np.empty(8, np.int64)
    for target in generator.normal(size=(200, 8)) * 0.5:
        _nearest(target, 1.0, best, other)
        distances = ((points - target) ** 2).sum(1)
        assert ((best / 2 - target) ** 2).sum() == pytest.approx(distances.min())


def test_a_planted_lattice_is_found_exactly() -> None:
    generator = np.random.default_rng(0)
    doubled = e8.points(12)[generator.integers(2401, size=(24, 5))]
    weight = torch.from_numpy(doubled.reshape(24, 40) * 0.5 * 0.25).float()
    scaled = Scaled.of(weight, identity(24, 40), torch.ones(24), torch.ones(40), 8)
    found = choose(scaled, Book(torch.from_numpy(e8.roots()), steps=torch.tensor([0.25])), torch.tensor([4]))
    assert (found.numpy() == doubled).all()


def test_codes_are_nearest_where_nothing_is_felt() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, entries = torch.randn(20, 32, generator=generator), torch.randn(16, 4, generator=generator)
    scaled = Scaled.of(weight, identity(20, 32), torch.ones(20), torch.ones(32), 4)
    codes = choose(scaled, Book(entries), torch.tensor([0, 16]))
    expected = torch.cdist(weight.view(-1, 4), entries).argmin(1).view(20, 8)
    assert torch.equal(codes[..., 0], expected)
    plain = nearest(weight.view(-1, 4).numpy(), np.ones((160, 4), np.float32), entries.T.contiguous().numpy())
    assert (plain == expected.flatten().numpy()).all()


def test_codes_are_the_same_whether_inner_products_are_held_or_made(
    make_metric: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(6)
    weight, entries = torch.randn(30, 40, generator=generator), torch.randn(24, 5, generator=generator)
    scaled = Scaled.of(weight, make_metric(30, 40), torch.ones(30), torch.ones(40), 5)
    held = choose(scaled, Book(entries), torch.tensor([0, 9, 24]))
    monkeypatch.setattr("tersor.forms.codebook_fit.PAIRED", 0)
    assert torch.equal(choose(scaled, Book(entries), torch.tensor([0, 9, 24])), held)


@pytest.mark.parametrize("count", [1, 7, 8, 21])
def test_the_least_is_the_first_least(count: int) -> None:
    for values in np.random.default_rng(0).integers(0, 4, (20, count)).astype(np.float32):
        assert _least(values) == values.argmin()


@pytest.mark.parametrize("dims", [None, 2])
def test_refitted_entries_are_the_least_squares_solution(
    dims: int | None, make_metric: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(1)
    weight, metric = torch.randn(12, 24, generator=generator), make_metric(12, 24)
    rows, columns = (0.5 + torch.rand(n, generator=generator) for n in (12, 24))
    scaled = Scaled.of(weight, metric, rows, columns, 4)
    codes = torch.randint(4, (12, 6, 1), generator=generator)
    projection = None if dims is None else torch.randn(dims, 4, generator=generator)
    book, offsets = Book(torch.randn(4, dims or 4, generator=generator), projection), torch.tensor([0, 4])
    monkeypatch.setattr("tersor.forms.codebook_fit.STEPS", 24)  # more than unknowns
    for _ in range(4):
        book = refitted(scaled, codes, book, offsets)
    basis = torch.eye(book.entries.numel()).view(-1, *book.entries.shape)
    seen = [metric.whiten(scaled.values(codes, Book(b, projection).whole, offsets)).flatten() for b in basis]
    target = metric.whiten(weight).flatten()
    columns_seen = torch.stack(seen, 1)
    best = (columns_seen @ torch.linalg.lstsq(columns_seen, target).solution - target).square().sum()
    left = metric.whiten(weight - scaled.values(codes, book.whole, offsets)).square().sum()
    assert float(left) == pytest.approx(float(best), rel=1e-3)  # in 32 bits


@pytest.mark.parametrize(
    ("setting", "most"),
    [
        (CodebookSetting((8,), 4), 0.1),
        (CodebookSetting((8, 8)), 0.1),
        (CodebookSetting((16,), lattice=True), 0.095),
        (CodebookSetting((16, 16), lattice=True), 0.0095),
    ],
    ids=lambda v: getattr(v, "label", None),
)
def test_a_gaussian_is_left_with_less_than_by_scalars(setting: CodebookSetting, most: float) -> None:
    """The limits are 1/16 and 1/256; the best scalar codes of 2 and 4 bits leave 0.118 and 0.0095."""
    weight = torch.randn(128, 256, generator=torch.Generator().manual_seed(0))
    operator = CodebookForm().fit(weight, identity(128, 256), setting)
    assert 4.0 ** -(sum(setting.bits) / setting.length) < identity(128, 256).distance(weight - operator.dense()) < most


def test_feedback_and_refitting_pay(make_metric: Maker) -> None:
    weight, metric = torch.randn(64, 96, generator=torch.Generator().manual_seed(2)), make_metric(64, 96)
    form, setting = CodebookForm(), CodebookSetting((6,), 4)

    def left(metric_of_fit: Metric, setting: CodebookSetting) -> float:
        return metric.distance(weight - form.fit(weight, metric_of_fit, setting).dense())

    blind = left(metric.coarsened("identity"), setting)
    once = left(metric, CodebookSetting((6,), 4, rounds=0))
    assert left(metric, setting) <= once < blind


def test_more_stages_leave_less_than_one(make_metric: Maker) -> None:
    weight, metric = torch.randn(64, 96, generator=torch.Generator().manual_seed(3)), make_metric(64, 96)

    def left(bits: tuple[int, ...]) -> float:
        return metric.distance(weight - CodebookForm().fit(weight, metric, CodebookSetting(bits, 4)).dense())

    assert left((4, 4, 4)) < left((4, 4)) < left((4,))


def test_bits_on_disk_are_those_of_the_codes() -> None:
    operator = CodebookForm().empty((100, 804), CodebookSetting((10,), 4))
    assert operator.nbytes == 100 * (201 + 51) + 100 + 804 + 8 + 6 * 6 + 2 * 1024 * 4


def test_a_weight_that_stands_out_costs_the_others_nothing() -> None:
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(5))
    form, setting, metric = CodebookForm(), CodebookSetting((16,), lattice=True), identity(64, 64)
    before = metric.distance(weight - form.fit(weight, metric, setting).dense())
    weight[17, 40] = 300.0
    operator = form.fit(weight, metric, setting)
    assert metric.distance(weight - operator.dense()) < 1.05 * before
    assert operator.dense()[17, 40] == operator.take(torch.tensor([3, 17]))[1, 40] == 300.0


def test_vectors_that_reach_beyond_the_row() -> None:
    weight: Tensor = torch.randn(40, 45, generator=torch.Generator().manual_seed(4))
    operator = CodebookForm().fit(weight, identity(40, 45), CodebookSetting((16,), lattice=True))
    assert operator.dense().shape == (40, 45)
    scalar = IntForm().fit(weight, identity(40, 45), IntSetting(2, None))
    assert (weight - operator.dense()).norm() < (weight - scalar.dense()).norm()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"bits": [7]}, r"bits is \[7\]"),
        ({"bits": [8], "lattice": True, "length": 4}, "length is 4"),
        ({"bits": [8], "dims": 8}, "dims is 8"),
        ({"bits": [8], "rounds": -1}, "rounds is -1"),
    ],
)
def test_settings_that_cannot_be_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(TersorError, match=message):
        CodebookForm().setting(values)
