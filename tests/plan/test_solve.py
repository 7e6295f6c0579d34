"""The solver against exhaustive search, the front against brute force, on random small menus."""

from __future__ import annotations

import itertools
import os

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tersor.errors import UnreachableBudget
from tersor.plan import Option, Solution, front, hull, solve
from tersor.plan.solve import _nothing_on_stdout


@st.composite
def options(draw: st.DrawFn) -> Option:
    stored = draw(st.integers(1, 10**9))
    resident = draw(st.integers(1, 10**6))
    flops = draw(st.integers(1, 1000))
    return Option(0, stored, resident, flops, 10 ** draw(st.floats(-8, 2)), draw(st.floats(0.001, 1)))


menus_of = st.lists(st.lists(options(), min_size=1, max_size=5), min_size=1, max_size=4)
limited = st.sampled_from([("stored",), ("stored", "resident"), ("stored", "flops"), ("latency",)])
quickly = settings(max_examples=80, deadline=None)


def _options(*rows: tuple[int, int, float]) -> list[Option]:
    return [Option(0, stored, resident, 1, divergence) for stored, resident, divergence in rows]


# The best choice that HiGHS lets pass is over the limit by less than it can see.
BY_A_HAIR = [
    _options((1, 1, 1.0)),
    _options((1, 1, 1.0), (2, 1, 0.1)),
    _options((1, 1, 10.0), (999_997, 1, 1.0)),
    _options((1, 1, 1.0)),
]


def all_plans(menus: list[list[Option]]) -> list[Solution]:
    return [Solution(chosen, 0.0) for chosen in itertools.product(*menus)]


@quickly
@given(menus_of)
def test_the_hull_is_that_of_all_points_below(menus: list[list[Option]]) -> None:
    """An option is on the hull where no line between two others, nor one of them alone, lies below it."""
    menu = menus[0]
    found = hull(menu)
    stored, damage = [o.stored for o in found], [o.divergence for o in found]
    assert stored == sorted(set(stored)) and damage == sorted(set(damage), reverse=True)
    assert stored[0] == min(o.stored for o in menu) and damage[-1] == min(o.divergence for o in menu)
    slopes = [(b.divergence - a.divergence) / (b.stored - a.stored) for a, b in itertools.pairwise(found)]
    assert all(a <= b * (1 - 1e-9) for a, b in itertools.pairwise(slopes))
    for option in menu:
        for a, b in itertools.pairwise(found):
            if a.stored <= option.stored <= b.stored:
                share = (option.stored - a.stored) / (b.stored - a.stored)
                line = a.divergence + share * (b.divergence - a.divergence)
                assert option.divergence >= line - 1e-9 * a.divergence


@quickly
@given(menus_of)
def test_every_plan_of_the_front_is_best_for_its_size(menus: list[list[Option]]) -> None:
    plans = all_plans(menus)
    found = front(menus)
    sizes, damages = [s.total("stored") for s in found], [s.total("divergence") for s in found]
    assert sizes == sorted(sizes) and damages == sorted(damages, reverse=True)
    assert sizes[0] == min(p.total("stored") for p in plans)
    assert damages[-1] == pytest.approx(min(p.total("divergence") for p in plans))
    for size, damage in zip(sizes, damages, strict=True):
        best = min(p.total("divergence") for p in plans if p.total("stored") <= size)
        assert damage == pytest.approx(best, rel=1e-9)


@quickly
@given(
    menus_of,
    st.integers(0, 10**6),
    st.sampled_from([("stored",), ("stored", "resident"), ("stored", "flops"), ("latency",)]),
)
@example(BY_A_HAIR, 1, ("stored",))
@example(BY_A_HAIR, 1, ("stored", "resident"))
def test_solving_equals_exhaustive_search(menus: list[list[Option]], which: int, names: tuple[str, ...]) -> None:
    plans = all_plans(menus)
    limits = {name: plans[which % len(plans)].total(name) for name in names}  # some plan meets them exactly
    found = solve(menus, limits)
    assert len(found.chosen) == len(menus)
    assert all(found.total(name) <= limit for name, limit in limits.items())
    best = min(p.total("divergence") for p in plans if all(p.total(n) <= v for n, v in limits.items()))
    assert found.total("divergence") <= best * (1 + 2e-4)


@quickly
@given(menus_of, st.integers(0, 10**6))
def test_the_smallest_plan_under_a_divergence(menus: list[list[Option]], which: int) -> None:
    plans = all_plans(menus)
    limit = plans[which % len(plans)].total("divergence") * (1 + 1e-5)
    found = solve(menus, {"divergence": limit}, minimise="stored")
    assert found.total("divergence") <= limit
    best = min(p.total("stored") for p in plans if p.total("divergence") <= limit)
    assert found.total("stored") <= best * (1 + 2e-4) + 1


def test_a_limit_out_of_reach_names_the_least() -> None:
    menu = [Option(0, 100, 200, 3, 0.5), Option(1, 250, 100, 3, 0.1)]
    with pytest.raises(UnreachableBudget, match="stored can be 200 at the least, not 199"):
        solve([menu, menu], {"stored": 199})
    with pytest.raises(UnreachableBudget, match="all the limits at once"):
        solve([menu], {"stored": 150, "resident": 150})


def test_more_bytes_never_do_more_damage() -> None:
    menus = [
        [Option(k, 100 * b + 7 * site, 0, 0, 4.0**-b * (site + 1)) for k, b in enumerate((2, 3, 4, 6, 8))]
        for site in range(6)
    ]
    damages = [solve(menus, {"stored": limit}).total("divergence") for limit in range(1400, 5200, 90)]
    assert all(later <= earlier * (1 + 1e-4) for earlier, later in itertools.pairwise(damages))
    assert damages[-1] < 1e-3 * damages[0]


def test_nothing_that_compiled_code_prints_reaches_the_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    with _nothing_on_stdout():
        os.write(1, b"a line of the solver")
    os.write(1, b"a line of ours")
    assert capfd.readouterr().out == "a line of ours"
