"""Identities of metrics: the trace formula, whitening, damping, coarsening, and the nearest Kronecker product."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tersor.metrics import KINDS, Metric, Side
from tersor.observe import nearest_kronecker

Maker = Callable[..., Metric]


def trace(metric: Metric, error: Tensor) -> float:
    """`scale tr(R E C E^T)` as written, in float64."""
    rows, columns = (
        torch.diag(s.moment.double()) if s.is_diagonal else s.moment.double() for s in (metric.rows, metric.columns)
    )
    return float(metric.scale * torch.trace(rows @ error @ columns @ error.T))


@pytest.mark.parametrize("kind", KINDS)
def test_distance_is_the_trace_formula(kind: str, make_metric: Maker) -> None:
    metric, error = make_metric(7, 11, kind), torch.randn(7, 11, dtype=torch.float64)
    assert metric.distance(error) == pytest.approx(trace(metric, error), rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strip", [None, 22])
def test_what_is_kept_is_an_inner_product(
    kind: str, strip: int | None, make_metric: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`<W, F> / <W, W>` from distances alone, of the whole and of single rows under the moment of the columns."""
    if strip is not None:
        monkeypatch.setattr("tersor.metrics.metric.STRIP", strip)
    metric, weight, fitted = make_metric(7, 11, kind).damped(0.1, 0.1), torch.randn(7, 11), torch.randn(7, 11)

    def inner(metric: Metric, a: Tensor, b: Tensor) -> float:
        return (metric.distance(a + b) - metric.distance(a - b)) / 4

    kept, judge = metric.kept(weight, fitted), metric.judged_by
    assert judge is not None
    assert float(kept.parts.sum()) == pytest.approx(inner(metric, weight, fitted) / metric.distance(weight), abs=1e-4)
    for k in range(7):
        alone = Metric(kind, Side(torch.ones(1)), judge.columns)
        w, f = weight[k : k + 1], fitted[k : k + 1]
        assert float(kept.of_rows[k]) == pytest.approx(inner(alone, w, f) / alone.distance(w), abs=1e-4)


def test_what_was_scaled_is_undone(make_metric: Maker) -> None:
    metric, weight = make_metric(7, 11), torch.randn(7, 11)
    rows = torch.linspace(0.93, 1.05, 7)
    kept = metric.kept(weight, rows[:, None] * weight)
    assert torch.allclose(kept.row_factors, 1 / rows.double(), rtol=1e-5)
    assert kept.factor(kept.row_factors) == pytest.approx(1, abs=1e-5)
    assert metric.kept(weight, 0.1 * weight).factor() == 1.25  # no more than that
    nothing = metric.kept(torch.zeros(7, 11), torch.zeros(7, 11))
    assert nothing.factor() == pytest.approx(1, abs=1e-6) and nothing.row_factors.tolist() == [1.0] * 7


@pytest.mark.parametrize("kind", KINDS)
def test_whitening_keeps_distances_and_is_undone(kind: str, make_metric: Maker) -> None:
    metric, error = make_metric(7, 11, kind), torch.randn(7, 11, dtype=torch.float64)
    white = metric.whiten(error)
    assert metric.scale * float(white.square().sum()) == pytest.approx(trace(metric, error), rel=1e-9)
    assert torch.allclose(metric.unwhiten(white), error, rtol=1e-7, atol=1e-9)


def test_unit_lower_factors_give_the_moment_back(make_moment: Callable[..., Tensor]) -> None:
    moment = make_moment(9)
    lower, pivots = Side(moment).unit_lower
    assert lower is not None
    assert torch.equal(lower.diagonal(), torch.ones(9, dtype=torch.float64))
    assert torch.allclose((lower * pivots) @ lower.T, moment, rtol=1e-8)
    none, pivots = Side(moment.diagonal()).unit_lower
    assert none is None and torch.equal(pivots, moment.diagonal())


def test_the_pivoted_order_takes_the_largest_pivot_that_is_left(make_moment: Callable[..., Tensor]) -> None:
    side = Side(make_moment(12))
    order = side.pivoted_order
    pivots = side.permuted(order).unit_lower[1]
    assert sorted(order.tolist()) == list(range(12)) and (pivots.diff() <= 1e-9 * pivots[0]).all()
    assert float(pivots.prod()) == pytest.approx(
        float(side.unit_lower[1].prod()), rel=1e-6
    )  # a determinant has no order
    assert Side(torch.rand(5)).pivoted_order.tolist() == list(range(5))


def test_a_singular_moment_still_has_a_factor() -> None:
    direction = torch.randn(12, 1, dtype=torch.float64)
    factor = Side(direction @ direction.T).cholesky
    assert torch.allclose(factor @ factor.T, direction @ direction.T, atol=1e-6)


@pytest.mark.parametrize("diagonal", [False, True])
def test_damping_adds_a_share_of_the_mean_diagonal(diagonal: bool, make_moment: Callable[..., Tensor]) -> None:
    moment = make_moment(6)
    side = Side(moment.diagonal().clone() if diagonal else moment)
    extra = side.damped(0.3).moment - side.moment
    expected = 0.3 * moment.diagonal().mean() * torch.eye(6, dtype=torch.float64)
    assert torch.allclose(extra, expected.diagonal() if diagonal else expected)


def test_a_damped_metric_steers_but_does_not_judge(make_metric: Maker) -> None:
    metric, error = make_metric(5, 6), torch.randn(5, 6)
    damped = metric.damped(0.5, 0.1).damped(0.5, 0.1)
    assert damped.distance(error) == metric.distance(error)
    assert torch.allclose(damped.rows.moment, metric.rows.damped(0.5).damped(0.5).moment)


def test_coarser_kinds_keep_less_of_the_same_moments(make_metric: Maker) -> None:
    metric = make_metric(6, 8)
    diagonal, identity = metric.coarsened("diagonal"), metric.coarsened("identity")
    assert torch.equal(diagonal.rows.moment, metric.rows.diagonal)
    single = torch.zeros(6, 8)
    single[2, 5] = 1.0  # of an error in one entry all but the identity see the same
    assert diagonal.distance(single) == pytest.approx(metric.distance(single), rel=1e-5)
    for whole, mean in ((metric.rows, identity.rows), (metric.columns, identity.columns)):
        assert torch.allclose(mean.moment.sum(), whole.diagonal.sum())
    assert metric.coarsened("input").columns is metric.columns
    assert metric.coarsened("output").rows is metric.rows
    turned = metric.coarsened("input", input_is_columns=False)
    assert turned.rows is metric.rows and turned.columns.is_diagonal


def test_on_average_over_signs_all_kinds_agree_with_the_diagonal(make_metric: Maker) -> None:
    metric, error = make_metric(4, 4), torch.rand(4, 4, dtype=torch.float64)
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 4).double()
    flips = [r[:, None] * c[None, :] * error for r in signs for c in signs]
    mean = sum(trace(metric, e) for e in flips) / len(flips)
    assert mean == pytest.approx(trace(metric.coarsened("diagonal"), error), rel=1e-9)


def test_compress_sees_errors_in_coefficients_as_the_side_sees_them(make_moment: Callable[..., Tensor]) -> None:
    basis, error = torch.randn(9, 3, dtype=torch.float64), torch.randn(3, 2, dtype=torch.float64)
    for side in (Side(make_moment(9)), Side(make_moment(9).diagonal())):
        small = side.compress(basis)
        assert torch.allclose(error.T @ small.apply(error), (basis @ error).T @ side.apply(basis @ error))


def test_the_nearest_product_to_one_metric_is_itself(make_metric: Maker) -> None:
    metric = make_metric(4, 5)
    assert nearest_kronecker([metric]) is metric


@pytest.mark.parametrize("kinds", [("kronecker", "kronecker"), ("kronecker", "diagonal"), ("diagonal", "diagonal")])
def test_the_nearest_product_to_two_is_the_rank_one_rearrangement(kinds: tuple[str, str], make_metric: Maker) -> None:
    metrics = [make_metric(4, 5, kind, seed=10 * k) for k, kind in enumerate(kinds)]
    found = nearest_kronecker(metrics)
    total = torch.zeros(16, 25, dtype=torch.float64)  # Van Loan's rearrangement of sum scale R (x) C
    for m in metrics:
        rows, columns = (torch.diag(s.moment) if s.is_diagonal else s.moment for s in (m.rows, m.columns))
        total += m.scale * torch.outer(rows.flatten(), columns.flatten())
    u, s, v = torch.linalg.svd(total)
    best = s[0] * torch.outer(u[:, 0], v[0])
    rows, columns = (torch.diag(t.moment) if t.is_diagonal else t.moment for t in (found.rows, found.columns))
    assert torch.allclose(found.scale * torch.outer(rows.flatten(), columns.flatten()), best, rtol=1e-4, atol=1e-6)
    assert rows.diagonal().min() > 0 and columns.diagonal().min() > 0
