"""The trellis form: its search against brute force, its rates, its reading on every path, its stream, its damage."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from tersor.coding.trellis import HEADER, REMAINS, SIDE_BITS, Side, Trellis, rates_of, values
from tersor.errors import TersorError
from tersor.forms import TrellisForm, TrellisSetting, as_values, trellis_fit, trellis_kernels
from tersor.forms.rotation import rotatable, rotate, rotate_back
from tersor.forms.trellis import TrellisOperator
from tersor.forms.trellis_fit import Frame
from tersor.metrics import Metric
from tersor.metrics import Side as MetricSide

Maker = Callable[..., Metric]
FORM = TrellisForm()


def searched(targets: np.ndarray, rates: list[int], table: np.ndarray, start: int, end: int) -> np.ndarray:
    count = len(table)
    room = np.empty(count, np.int32), np.empty(count, np.int32), np.empty((len(targets), count >> 1), np.uint8)
    states = np.empty(len(targets), np.int64)
    scaled = (table * trellis_kernels.SCALE).astype(np.float32)
    trellis_kernels.search(targets.astype(np.float32), np.array(rates), scaled, start, end, room, states)
    return states


def free_rows_metric(rows: int, metric: Metric) -> Metric:
    frequencies = 1 / torch.arange(1, rows + 1, dtype=torch.float64)
    return replace(metric, rows=MetricSide(frequencies))


def gentle(rows: int, columns: int) -> Metric:
    """A metric of a spread that damped moments have: eigenvalues over three powers of ten."""
    sides = []
    for size in (rows, columns):
        generator = torch.Generator().manual_seed(size)
        basis, _ = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
        sides.append(MetricSide((basis * torch.logspace(0, -3, size, dtype=torch.float64)) @ basis.T))
    return Metric("kronecker", *sides)


@pytest.mark.parametrize("rates", [[1, 1, 1, 1, 1], [2, 1, 0, 3, 1], [5, 1, 2, 1], [6, 2, 1]])
@pytest.mark.parametrize("ring", [False, True])
def test_the_search_finds_what_trying_everything_finds(rates: list[int], ring: bool) -> None:
    window = 6
    table = values()[: 1 << window]
    generator = np.random.default_rng(len(rates))
    for start in (0, 45):
        targets = generator.standard_normal(len(rates))
        best, chosen = np.inf, None
        for news in itertools.product(*(range(1 << rate) for rate in rates)):
            state, states, cost = start, [], 0.0
            for new, rate, target in zip(news, rates, targets, strict=True):
                state = ((state << rate) | new) & ((1 << window) - 1)
                states.append(state)
                cost += (table[state] - target) ** 2 if rate else 0.0
            if cost < best and (not ring or state == start):
                best, chosen = cost, states
        if chosen is None:
            continue
        found = searched(targets, rates, table, start, start if ring else -1)
        assert found[-1] == start or not ring
        cost = sum((table[s] - t) ** 2 for s, t, r in zip(found, targets, rates, strict=True) if r)
        assert cost == pytest.approx(best, rel=2e-3, abs=2e-3)


@pytest.mark.parametrize("rate", [1, 2, 3, 4, 5, 6])
def test_a_gaussian_is_left_with_what_the_table_says(rate: int) -> None:
    targets = np.random.default_rng(rate).standard_normal(30000)
    table = values() * np.float32(np.sqrt(1 - REMAINS[rate]))
    states = searched(targets, [rate] * len(targets), table, 0, -1)
    assert np.mean((table[states] - targets) ** 2) == pytest.approx(REMAINS[rate], rel=0.1)


def test_it_comes_closer_to_the_limit_than_any_scalar_code() -> None:
    """The best scalar code of a Gaussian leaves 0.3634, 0.1175 and 0.03454 at 1, 2 and 3 bits (Max, 1960)."""
    assert all(r < s for r, s in zip(REMAINS[1:4], (0.3634, 0.1175, 0.03454), strict=True))
    assert all(r > 4.0**-bits for bits, r in enumerate(REMAINS) if bits)


@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (40, 1), (3, 5), (48, 72), (72, 48), (105, 128)])
@pytest.mark.parametrize("bits", [0.3, 2.0, 4.6])
@pytest.mark.parametrize("free", [False, True])
def test_every_way_of_reading_gives_what_was_written(
    shape: tuple[int, int], bits: float, free: bool, make_metric: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trellis_fit, "FREE", 1)
    metric = make_metric(*shape)
    metric = free_rows_metric(shape[0], metric) if free else metric
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    frame = Frame.of(weight, metric, True, np.ones(shape[0]))
    coding = frame.walk(frame.weight, bits)
    operator = FORM.fit(weight, metric, TrellisSetting(bits))
    reader = operator.reader
    matrix = reader.rows()
    assert torch.equal(matrix, reader._with_tensors(None))
    again = TrellisOperator(shape, operator.setting)
    again.stream = torch.frombuffer(bytearray(coding.trellis.to_bytes()), dtype=torch.uint8)
    assert np.allclose(again.reader.rows().numpy(), frame.weight - coding.error, atol=1e-5)
    if free:
        index = torch.tensor([0, shape[0] - 1, shape[0] // 2, 0])
        assert torch.equal(reader.rows(index), matrix[index]) and torch.equal(
            reader._with_tensors(index), matrix[index]
        )
        assert torch.allclose(operator.take(index), operator.dense()[index], atol=1e-6)


def test_entries_take_as_many_bits_as_are_there() -> None:
    weight, metric = torch.randn(96, 128), gentle(96, 128)
    frame = Frame.of(weight, metric, True, np.ones(96))
    for bits in (0.5, 1.3, 2.0, 3.7):
        rates = np.concatenate(list(frame.walk(frame.weight, bits).trellis.rates()))
        assert bits - 0.05 < rates.mean() <= bits
        importance = np.outer(*frame.pivots)
        assert np.corrcoef(np.log(importance).ravel(), rates.ravel().astype(float))[0, 1] > 0.8


def test_equal_entries_may_take_fractions_of_a_bit() -> None:
    side = Side.of(np.zeros(64), 8.0)
    trellis = Trellis((64, 64), False, (False, False), side, side, side, side, np.zeros(0, "u1"))
    levels = (replace(trellis, column_rates=replace(side, base=base)) for base in range(128, 192))
    means = [np.concatenate(list(t.rates())).mean() for t in levels]
    assert means == sorted(means) and len({*means}) > 10 and means[0] == 2 and means[-1] == 3


def test_sides_are_as_fine_as_their_range_allows() -> None:
    logs = np.random.default_rng(0).uniform(-3, 1, 500)
    side = Side.of(logs, 10.0)
    assert np.abs(side.values / 64 - logs).max() <= side.step / 128 + 1 / 64 and side.step <= 9
    assert side.codes.max() < 1 << SIDE_BITS
    assert Side.of(np.array([0.0, -1e9]), 10.0).values.min() == -640
    assert np.array_equal(rates_of(np.array([0, 64]), np.array([0, 4096, 99999])), [[0, 1, 6], [1, 2, 6]])


@pytest.mark.parametrize("size", [1, 2, 3, 48, 105, 128, 350])
def test_a_rotation_keeps_lengths_and_comes_back(size: int) -> None:
    x = torch.randn(3, size)
    assert torch.allclose(rotate_back(rotate(x)), x, atol=1e-5)
    assert torch.allclose(rotate(x).norm(dim=-1), x.norm(dim=-1), rtol=1e-5)
    assert rotatable(size) == (size > 1)
    assert not rotatable(2 * 521)


def test_an_outlier_is_spread_by_the_rotation() -> None:
    weight = torch.randn(64, 64)
    metric = Metric("kronecker", MetricSide(torch.eye(64).double()), MetricSide(torch.eye(64).double()))
    weight[torch.rand(64, 64, generator=torch.Generator().manual_seed(5)) < 0.01] *= 20
    left = [
        metric.distance(weight - FORM.fit(weight, metric, TrellisSetting(2.0, rotate=turn)).dense())
        for turn in (True, False)
    ]
    assert left[0] < 0.7 * left[1]


def test_it_beats_integers_in_groups_at_equal_bytes() -> None:
    from tersor.forms import IntForm, IntSetting

    weight, metric = torch.randn(128, 256), gentle(128, 256)
    integers = IntForm().fit(weight, metric, IntSetting(2, 128))
    bits = 8 * integers.nbytes / weight.numel() - 0.15
    trellis = FORM.fit(weight, metric, TrellisSetting(bits))
    assert trellis.nbytes <= trellis.resident <= integers.resident
    assert metric.distance(weight - trellis.dense()) < 0.6 * metric.distance(weight - integers.dense())


@pytest.mark.parametrize("free", [False, True])
def test_the_ladder_predicts_its_fits(free: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trellis_fit, "FREE", 1)
    weight, metric = torch.randn(160, 192), gentle(160, 192)
    metric = free_rows_metric(160, metric) if free else metric
    for candidate in FORM.curve(weight, metric):
        fitted = metric.distance(weight - FORM.fit(weight, metric, candidate.setting).dense())  # type: ignore[arg-type]
        assert candidate.divergence == pytest.approx(fitted, rel=0.3)


def test_a_tall_table_is_estimated_from_some_of_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trellis_fit, "FREE", 1)
    rows, generator = 4096, torch.Generator().manual_seed(2)
    shares = (1 / torch.arange(1, rows + 1)) ** 0.8
    metric = Metric("kronecker", MetricSide(shares[torch.randperm(rows, generator=generator)]), gentle(8, 48).columns)
    weight = torch.randn(rows, 48, generator=generator) * (1 + metric.rows.moment.sqrt())[:, None]
    whole, searched = FORM.curve(weight, metric), list[int]()
    walk = Frame.walk
    monkeypatch.setattr(Frame, "walk", lambda self, *args: (searched.append(len(self.weight)), walk(self, *args))[1])
    monkeypatch.setattr("tersor.metrics.metric.SAMPLED_ROWS", 1024)
    for known, candidate in zip(whole, FORM.curve(weight, metric), strict=True):
        assert (known.setting, known.cost) == (candidate.setting, candidate.cost)
        assert candidate.divergence == pytest.approx(known.divergence, rel=0.1)
    assert {*searched} == {1024}


def test_moving_and_saving_keeps_the_stream(make_metric: Maker) -> None:
    operator = FORM.fit(torch.randn(32, 48), make_metric(32, 48), TrellisSetting(2.5))
    dense = operator.dense()
    assert torch.equal(operator.to(torch.float16).dense(), dense)
    other = FORM.empty((32, 48), FORM.setting(as_values(operator.setting)))
    with pytest.raises(TersorError, match="does not begin with TST1"):
        other.dense()
    other.load_state_dict(operator.state_dict())
    assert torch.equal(other.dense(), dense)
    other.load_state_dict(FORM.fit(torch.zeros(32, 48), make_metric(32, 48), TrellisSetting(2.5)).state_dict())
    assert not other.dense().any()


def test_a_compiled_module_reads_it_too(make_metric: Maker) -> None:
    operator = FORM.fit(torch.randn(32, 48), make_metric(32, 48), TrellisSetting(2.0))
    x = torch.randn(3, 48)
    compiled = torch.compile(operator, backend="eager", dynamic=False)
    assert torch.allclose(compiled(x), operator(x), atol=1e-5)


def test_every_changed_byte_is_noticed(make_metric: Maker) -> None:
    operator = FORM.fit(torch.randn(8, 12), make_metric(8, 12), TrellisSetting(2.0))
    stream = operator.stream.numpy().tobytes()
    for at in range(len(stream)):
        damaged = bytearray(stream)
        damaged[at] ^= 0x41
        with pytest.raises(TersorError, match=r"TST1|damaged"):
            Trellis.from_bytes(bytes(damaged), (8, 12))
    with pytest.raises(TersorError, match="has shape 8 x 12, not 12 x 8"):
        Trellis.from_bytes(stream, (12, 8))
    with pytest.raises(TersorError, match="does not begin with TST1"):
        Trellis.from_bytes(stream[: HEADER.size], (8, 12))


def test_rates_beyond_the_bits_are_refused(make_metric: Maker) -> None:
    operator = FORM.fit(torch.randn(8, 12), make_metric(8, 12), TrellisSetting(2.0))
    trellis = Trellis.from_bytes(operator.stream.numpy().tobytes(), (8, 12))
    greedy = replace(trellis, column_rates=replace(trellis.column_rates, base=3000))
    with pytest.raises(TersorError, match="fewer bits than its rates ask for"):
        Trellis.from_bytes(greedy.to_bytes(), (8, 12))


@pytest.mark.parametrize("values", [{"bits": 0}, {"bits": 7}, {"bits": True}, {"bits": "2"}, {"bits": 2, "rotate": 1}])
def test_settings_that_make_no_sense_are_refused(values: dict[str, object]) -> None:
    with pytest.raises(TersorError, match=r"^trellis: "):
        FORM.setting(values)
    with pytest.raises(TersorError, match="a setting has bits, rotate, enlarged and free_rows"):
        FORM.setting({"step": 1})
