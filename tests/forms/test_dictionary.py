"""Dictionaries: planted atoms, closed forms, what is stored, and that supports, atoms and values are each the best."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations, pairwise

import pytest
import torch
from torch import Tensor

from tersor.errors import TersorError
from tersor.forms import DictionaryForm, DictionarySetting, LowRankForm, LowRankSetting, cost_of
from tersor.forms import dictionary as parts
from tersor.forms.dictionary import Code, Problem, SparseOperator
from tersor.metrics import Metric, Side

Maker = Callable[..., Metric]
FORM = DictionaryForm()


def drawn(count: int, atoms: int, entries: int) -> Tensor:
    """A sparse matrix (count, atoms) with so many entries in every row, none of them small."""
    index = torch.rand(count, atoms).argsort(1)[:, :entries]
    values = (1 + torch.rand(count, entries)) * torch.randint(0, 2, (count, entries)).sub(0.5).mul(2)
    return torch.zeros(count, atoms).scatter_(1, index, values)


def hadamard(size: int) -> Tensor:
    return torch.ones(1, 1) if size == 1 else torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), hadamard(size // 2))


@pytest.mark.parametrize("side", ["columns", "rows"])
@pytest.mark.parametrize(("entries", "orthogonal"), [(1, False), (2, True)])
def test_a_planted_dictionary_is_found(side: str, entries: int, orthogonal: bool, make_metric: Maker) -> None:
    """Atoms up to sign, order and scale: directions of single atoms under a metric, and orthogonal ones in pairs."""
    planted, metric = torch.nn.functional.normalize(torch.randn(12, 20)), make_metric(600, 20, "diagonal")
    if orthogonal:
        planted, metric = torch.linalg.qr(planted.T)[0].T, make_metric(600, 20, "identity")
    weight = drawn(600, 12, entries) @ planted
    if side == "rows":
        weight, metric = weight.T.contiguous(), Metric(metric.kind, metric.columns, metric.rows)
    operator = FORM.fit(weight, metric, DictionarySetting(12, entries / 12, side, orthogonal=orthogonal))
    assert metric.distance(weight - operator.dense()) < 1e-6 * metric.distance(weight)
    found = operator.right.dense() if side == "columns" else operator.left.dense().T
    assert ((torch.nn.functional.normalize(found) @ planted.T).abs().amax(0) > 1 - 1e-5).all()


@pytest.mark.parametrize("entries", [2, 3])
def test_k_svd_near_planted_atoms_finds_them(entries: int) -> None:
    """From afar it may stop at a mixture of two atoms; from near it must not.

    Unit vectors and Walsh functions have products below `1 / (2 entries - 1)`, so that pursuit is exact.
    """
    planted = torch.cat([torch.eye(32), hadamard(32) / 32**0.5])
    signals, weights = drawn(3000, 64, entries) @ planted, 0.5 + torch.rand(3000)
    setting = DictionarySetting(64, entries / 64)
    left, atoms = parts._rounds(signals, weights, planted + 0.05 * torch.randn(64, 32), setting, 40)
    assert left < 1e-8 * float(weights @ signals.square().sum(1))
    assert ((atoms @ planted.T).abs().amax(0) > 1 - 1e-6).all()


def test_pursuit_of_one_atom_is_the_best_and_of_more_is_least_squares_on_its_support() -> None:
    signals, atoms = torch.randn(40, 12), torch.nn.functional.normalize(torch.randn(9, 12))
    one, three = (parts.pursued(signals, atoms, entries) for entries in (1, 3))
    assert torch.equal(one.index[:, 0], (signals @ atoms.T).abs().argmax(1))
    for j in range(40):
        chosen = atoms[three.index[j]]
        exact = torch.linalg.lstsq(chosen.T.double(), signals[j].double()).solution
        assert torch.allclose(three.values[j].double(), exact, atol=1e-5)
        assert len(set(three.index[j].tolist())) == 3


def test_each_step_of_a_pursuit_takes_the_atom_that_lessens_the_error_most() -> None:
    signals, atoms = torch.randn(20, 8).double(), torch.nn.functional.normalize(torch.randn(7, 8)).double()
    index = parts.pursued(signals.float(), atoms.float(), 3).index

    def left(signal: Tensor, chosen: list[int]) -> float:
        basis = atoms[chosen].T
        return float((signal - basis @ torch.linalg.lstsq(basis, signal).solution).norm())

    for signal, places in zip(signals, index.tolist(), strict=True):
        for size in range(1, 4):
            others = [left(signal, [*places[: size - 1], a]) for a in range(7) if a not in places[: size - 1]]
            assert left(signal, places[:size]) == pytest.approx(min(others), rel=1e-5)


def test_where_atoms_are_orthogonal_the_largest_products_are_the_best_support() -> None:
    atoms, _ = torch.linalg.qr(torch.randn(6, 6))
    signals = torch.randn(15, 6)
    code = parts.thresholded(signals, atoms, 2)
    errors = (signals - code.dense(6) @ atoms).square().sum(1)
    for j in range(15):
        products = atoms @ signals[j]
        best = min(
            float((signals[j] - products[list(s)] @ atoms[list(s)]).square().sum()) for s in combinations(range(6), 2)
        )
        assert float(errors[j]) == pytest.approx(best, rel=1e-4)


@pytest.mark.parametrize("diagonal", [True, False])
def test_refits_agree_with_a_dense_solve(diagonal: bool, make_moment: Callable[..., Tensor]) -> None:
    """Atoms and values against least squares over all of their entries at once, both moments whole."""
    moment = make_moment(14, spread=0.2)
    problem = Problem(torch.randn(14, 6), Side((moment.diagonal() if diagonal else moment).float()))
    atoms = torch.nn.functional.normalize(torch.randn(5, 6))
    code = parts.pursued(problem.signals, atoms, 2)
    root = torch.linalg.cholesky(problem.coupling.moment.double().diag() if diagonal else moment).T
    sparse, target = root @ code.dense(5).double(), root @ problem.signals.double()
    exact = torch.linalg.lstsq(sparse, target).solution
    assert torch.allclose(parts.refitted_atoms(problem, atoms, code).double(), exact, rtol=1e-4, atol=1e-5)

    parts_of = [root[:, j, None] * atoms[a].double() for j in range(14) for a in code.index[j]]
    basis = torch.stack([p.flatten() for p in parts_of], 1)
    best = torch.linalg.lstsq(basis, target.flatten()).solution.reshape(14, 2)
    values = code
    for _ in range(10):  # conjugate gradients begun again
        values = parts.refitted_values(problem, atoms, values)
    assert torch.allclose(values.values.double(), best, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["diagonal", "kronecker"])
@pytest.mark.parametrize("side", ["columns", "rows"])
def test_refits_never_do_worse(kind: str, side: str, make_metric: Maker) -> None:
    metric = make_metric(30, 20, kind)
    problem = Problem(torch.randn(30, 20), Side(metric.rows.moment.float()))
    atoms = torch.nn.functional.normalize(torch.randn(10, 20))
    code = parts.pursued(problem.signals, atoms, 3)
    distances = [problem.distance(problem.signals - code.dense(10) @ atoms)]
    for _ in range(3):
        atoms = parts.refitted_atoms(problem, atoms, code)
        code = parts.refitted_values(problem, atoms, code)
        distances.append(problem.distance(problem.signals - code.dense(10) @ atoms))
    assert all(after <= before * (1 + 1e-5) for before, after in pairwise(distances))


@pytest.mark.parametrize("kind", ["identity", "input", "kronecker"])
def test_denser_codes_and_more_atoms_do_better(kind: str, make_metric: Maker) -> None:
    weight, metric = torch.randn(96, 64), make_metric(96, 64, kind).damped(0.03, 0.03)
    denser = [DictionarySetting(32, s / 32) for s in (2, 4, 8, 16, 32)]
    larger = [DictionarySetting(k, 4 / k) for k in (8, 16, 32, 64)]
    for ladder in (denser, larger):
        divergences = [c.divergence for c in FORM.curve(weight, metric, ladder)]
        assert divergences == sorted(divergences, reverse=True)


def test_all_atoms_in_every_row_are_at_least_a_low_rank(make_metric: Maker) -> None:
    """With nothing left out it is a factorisation, the best of which is known."""
    weight, metric = torch.randn(60, 40), make_metric(60, 40, "input")
    best = LowRankForm().fit(weight, metric, LowRankSetting(10))
    dense = FORM.fit(weight, metric, DictionarySetting(10, 1.0))
    assert metric.distance(weight - dense.dense()) == pytest.approx(metric.distance(weight - best.dense()), rel=1e-2)


def test_a_union_of_subspaces_beats_one_subspace_of_the_same_bytes() -> None:
    weight = drawn(256, 64, 4) @ torch.linalg.qr(torch.randn(64, 64))[0]
    metric = Metric("identity", Side(torch.ones(256)), Side(torch.ones(64)))
    sparse = FORM.fit(weight, metric, DictionarySetting(64, 4 / 64, orthogonal=True))
    rank = LowRankForm().fit(weight, metric, LowRankSetting(-(-sparse.nbytes // (2 * (256 + 64)))))
    assert sparse.nbytes <= rank.nbytes
    assert metric.distance(weight - sparse.dense()) < 0.5 * metric.distance(weight - rank.dense())


@pytest.mark.parametrize(
    ("atoms", "entries", "places"), [(64, 4, 3), (64, 20, 8), (100, 3, 3), (512, 16, 18), (512, 60, 64), (1, 1, 1)]
)
@pytest.mark.parametrize("value_bits", [4, 8, 16])
def test_places_take_the_fewer_bytes_and_come_back(atoms: int, entries: int, places: int, value_bits: int) -> None:
    """Indices of ceil(log2 atoms) bits or a mask, values, and 16 bits of scale for integers."""
    setting = DictionarySetting(atoms, entries / atoms, value_bits=value_bits)
    operator = SparseOperator(7, setting)
    index = torch.rand(7, atoms).argsort(1)[:, :entries]
    values = torch.randn(7, entries)
    operator.set(index, values)
    stored = -(-entries * value_bits // 8) + (0 if value_bits == 16 else 2)
    assert operator.nbytes == 7 * (places + stored)
    exact = Code(index, values).dense(atoms)
    step = {16: 2e-3, 8: 0.5 / 127, 4: 0.5 / 7}[value_bits] * float(values.abs().max()) * 1.01
    assert (operator.dense() - exact).abs().max() <= step
    assert not operator.dense()[exact == 0].any()


def test_a_table_is_affordable_and_its_curve_is_drawn_from_some_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tersor.metrics.metric.SAMPLED_ROWS", 500)
    weight = torch.randn(3000, 32) @ torch.diag(torch.arange(1.0, 33) ** -0.5)
    metric = Metric("kronecker", Side(1 / torch.arange(1.0, 3001)), Side(torch.eye(32) + 0.3))
    setting = DictionarySetting(48, 6 / 48, "columns", 4, 8)
    (candidate,) = FORM.curve(weight, metric, [setting])
    operator = FORM.fit(weight, metric, setting)
    assert candidate.cost == cost_of(FORM, (3000, 32), setting) and candidate.cost.stored == operator.nbytes
    assert candidate.divergence == pytest.approx(metric.distance(weight - operator.dense()), rel=0.1)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"atoms": 0, "density": 0.5}, "atoms is 0"),
        ({"atoms": 8, "density": 0.0}, "density is 0.0"),
        ({"atoms": 8, "density": 1.5}, "density is 1.5"),
        ({"atoms": 8, "density": 0.5, "side": "left"}, "side is 'left'"),
        ({"atoms": 8, "density": 0.5, "value_bits": 3}, "value_bits is 3"),
        ({"atoms": 8, "density": 0.5, "atom_bits": 7}, "bits is 7"),
    ],
)
def test_a_bad_setting_is_named(values: dict[str, object], message: str) -> None:
    with pytest.raises(TersorError, match=message):
        FORM.setting(values)
