"""The limit against its closed form, against bisection over all products, and below every plan of random weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tersor.curves import limit
from tersor.curves.limit import Eigenvalues, Limit, spectrum, times_limit
from tersor.metrics import Metric, Side
from tersor.plan import Interaction
from tersor.steps import Study, limit_of, open_study, study

Make = Callable[..., Metric]
FIXED = 1000


def limit_from(*sites: tuple[Tensor, list[Metric]], pairs: tuple[tuple[float, float], ...] = ()) -> Limit:
    found = [spectrum(weights, metrics) for weights, metrics in sites]
    counts, energies = (torch.cat(parts).double().numpy() for parts in zip(*found, strict=True))
    order = np.argsort(-energies)
    return Limit(counts[order], energies[order], FIXED, Interaction(pairs))


def gaussian(*shape: int, deviation: float = 1.0, seed: int = 5) -> Tensor:
    return deviation * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def products(weight: Tensor, metric: Metric) -> Tensor:
    """All energies of one matrix, one by one."""
    rows, columns = (torch.linalg.eigvalsh(side.moment.double()) for side in (metric.rows, metric.columns))
    return metric.scale * weight.double().square().mean() * torch.outer(rows, columns).flatten()


def by_bisection(energies: Tensor, bits: float) -> float:
    """The least distortion of independent Gaussian components at a rate, by bisection on the logarithm of the level."""
    low, high = float(energies.min().log2()) - 2 * bits / len(energies) - 1, float(energies.max().log2())
    for _ in range(200):
        middle = (low + high) / 2
        rate = float((energies.log2() - middle).clamp_min(0).sum()) / 2
        low, high = (middle, high) if rate > bits else (low, middle)
    return float(energies.clamp_max(2**high).sum())


def test_one_eigenvalue_follows_the_closed_form() -> None:
    """`D = n e 2^(-2 R / n)` for `n` components of one energy `e`."""
    weight = gaussian(1, 6, 8)
    found = limit_from((weight, [Metric("identity", Side(torch.full((6,), 0.3)), Side(2 * torch.eye(8)), 0.5)]))
    energy = 0.5 * 0.3 * 2 * float(weight.double().square().mean())
    for bits in (0.0, 0.7, 4.0, 100.0, 800.0):
        assert found.divergence(FIXED + bits / 8) == pytest.approx(48 * energy * 2 ** (-2 * bits / 48), rel=1e-6)


def test_all_sites_together_equal_bisection_over_all_products(make_metric: Make) -> None:
    """Three sites, one of them a stack, each matrix with moments of its own."""
    shapes = [(2, 9, 14), (1, 20, 5), (1, 16, 16)]
    sites = []
    for number, (stack, rows, columns) in enumerate(shapes):
        metrics = [make_metric(rows, columns, seed=10 * number + 3 * k) for k in range(stack)]
        sites.append((gaussian(stack, rows, columns, deviation=0.1 + number, seed=number), metrics))
    found = limit_from(*sites)
    energies = torch.cat([products(w, m) for ws, ms in sites for w, m in zip(ws, ms, strict=True)])
    assert int(found.counts.sum()) == len(energies)
    for bits in (0.0, 1.0, 30.0, 300.0, 3000.0, 8000.0):
        assert found.divergence(FIXED + bits / 8) == pytest.approx(by_bisection(energies, bits), rel=2e-3)


def test_eigenvalues_that_are_kept_are_those_of_the_moment(make_metric: Make) -> None:
    """Layers that share an input, with another between them."""
    known, weight = Eigenvalues(), gaussian(1, 12, 20)
    for seed in (1, 1, 2, 1):
        metric = make_metric(12, 20, "input", seed=seed)
        alone, kept = spectrum(weight, [metric]), spectrum(weight, [metric], known)
        assert all(torch.equal(a, b) for a, b in zip(alone, kept, strict=True))


@pytest.mark.parametrize("kind", ["identity", "diagonal", "input", "output", "kronecker"])
def test_nothing_known_leaves_the_expected_distance_of_all(kind: str, make_metric: Make) -> None:
    """At no bits the damage is that of the weights set to zero, `scale s^2 tr(R) tr(C)`, on average over weights."""
    weight, metric = gaussian(1, 12, 20), make_metric(12, 20, kind)
    traces = [float(side.diagonal.double().sum()) for side in (metric.rows, metric.columns)]
    whole = metric.scale * float(weight.double().square().mean()) * math.prod(traces)
    found = limit_from((weight, [metric]))
    assert found.divergence(FIXED) == pytest.approx(whole, rel=1e-9)
    assert found.divergence(0) == found.divergence(FIXED)
    many = np.mean([metric.distance(gaussian(12, 20, seed=k)) for k in range(2000)])
    assert many == pytest.approx(whole / float(weight.square().mean()), rel=0.2)


def test_more_bytes_are_never_worse_and_bytes_is_the_inverse(make_metric: Make) -> None:
    found = limit_from((gaussian(1, 30, 17), [make_metric(30, 17)]), pairs=((0.5, 0.8), (40.0, 44.0)))
    points = found.front(80, 900, 4000)
    assert points[0][0] == pytest.approx(900) and points[-1][0] == pytest.approx(4000)
    assert all(a[1] >= b[1] for a, b in pairwise(points)) and points[-1][1] < 1e-3 * points[0][1]
    for size, divergence in points:
        if size > FIXED + 1:
            assert found.bytes(divergence) == pytest.approx(size, rel=1e-4)
    assert found.bytes(2 * found.divergence(0)) == FIXED
    assert found.bytes(0.0) == math.inf


def test_what_no_one_sees_costs_nothing() -> None:
    """Directions without energy, weights of zero and sites that were not used need no bits and do no damage."""
    moment = torch.diag(torch.tensor([1.0, 1e-14, 0.0, 2.0]))
    counts, energies = spectrum(torch.ones(1, 3, 4), [Metric("kronecker", Side(torch.ones(3)), Side(moment), 1.0)])
    assert int(counts.sum()) == 6 and float((counts * energies).sum()) == pytest.approx(9)
    for weight, scale in ((torch.zeros(1, 3, 4), 1.0), (torch.ones(1, 3, 4), 0.0)):
        nothing = limit_from((weight, [Metric("kronecker", Side(torch.ones(3)), Side(moment), scale)]))
        assert nothing.divergence(FIXED) == 0 and nothing.bytes(0.1) == FIXED
    assert times_limit(0.3, 0.1) == pytest.approx(3)
    assert times_limit(0.3, None) is None and times_limit(0.3, 0.0) is None and times_limit(0.0, 0.1) is None


def test_chunks_change_nothing(make_metric: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, metric = gaussian(1, 40, 30), make_metric(40, 30)
    whole = spectrum(weight, [metric])
    monkeypatch.setattr(limit, "CHUNK", 70)
    parts = spectrum(weight, [metric])
    assert torch.equal(whole[0], parts[0]) and torch.allclose(whole[1], parts[1], rtol=1e-12)


def gaussian_net() -> nn.Module:
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64))
    with torch.no_grad():
        for layer in net[::2]:
            layer.weight.normal_(0, 0.12)
    return net


def batches() -> list[Tensor]:
    return list(gaussian(5, 16, 64, seed=9))


@pytest.mark.parametrize("metric", ["identity", "diagonal", "input", "kronecker"])
def test_no_plan_of_any_form_lies_below(metric: str, quick: dict[str, Any], tmp_path: Path) -> None:
    forms = ("int", "lowrank", "int+lowrank")
    options = {**quick, "forms": forms, "settings": None}
    opened = study(gaussian_net(), batches(), tmp_path / "run", metric=metric, **options)
    found = limit_of(opened.run)
    assert found is not None and found.fixed_bytes == opened.planner().fixed_bytes
    for allowed in (forms, *((form,) for form in forms)):
        front = [point for point in opened.planner(allowed).front() if point[1] > 0]
        assert len(front) > 2
        assert all(divergence > found.divergence(size) for size, divergence in front)
        assert all(found.bytes(divergence) < size for size, divergence in front)
    for budget in ("12%", "20%", "30%"):
        plan = opened.plan(budget)
        assert plan.divergence > found.divergence(plan.stored)


def test_gains_and_interaction_scale_the_limit(quick: dict[str, Any], tmp_path: Path) -> None:
    opened = study(gaussian_net(), batches(), tmp_path / "run", **quick)
    before = limit_of(opened.run)
    assert before is not None
    for site in opened.sites:
        opened.run.put(f"gain/{site.name}", {"gain": 3.0, "by_form": {"int": 3.0, "lowrank": 2.0}})
    after = limit_of(opened.run)
    assert after is not None
    size = before.fixed_bytes + 5000
    assert after.divergence(size) == pytest.approx(3 * before.divergence(size), rel=1e-9)
    opened.run.put("interaction", [[1e-9, 1.5e-9], [2e-9, 3e-9]])
    corrected = limit_of(opened.run)
    assert corrected is not None
    assert corrected.divergence(size) == pytest.approx(4.5 * before.divergence(size), rel=1e-9)


def test_spectra_are_made_once_and_go_on_where_they_stopped(
    quick: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    monkeypatch.setattr(limit, "spectrum", lambda *values: made.append(values) or spectrum(*values))

    def dying(step: str, what: str, done: int, total: int) -> None:
        if step == "limit" and done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        study(gaussian_net(), batches(), tmp_path / "run", progress=dying, **quick)
    assert len(made) == 2
    for _ in range(2):
        opened = study(gaussian_net(), batches(), tmp_path / "run", **quick)
        assert len(made) == 3
    again, whole = limit_of(opened.run), limit_of(study(gaussian_net(), batches(), tmp_path / "other", **quick).run)
    assert again is not None and whole is not None
    assert np.array_equal(again.energies, whole.energies) and np.array_equal(again.counts, whole.counts)


def test_a_run_without_spectra_has_no_limit(tmp_path: Path) -> None:
    opened: Study = open_study(gaussian_net(), tmp_path / "run")
    assert limit_of(opened.run) is None


def test_a_site_that_could_not_be_watched_stays_as_it_is(quick: dict[str, Any], tmp_path: Path) -> None:
    opened = study(gaussian_net(), batches(), tmp_path / "run", **quick)
    before = limit_of(opened.run)
    opened.run.put("unseen_sites", [opened.sites[0].name])
    after = limit_of(opened.run)
    assert before is not None and after is not None
    assert after.fixed_bytes == before.fixed_bytes + opened.sites[0].nbytes
