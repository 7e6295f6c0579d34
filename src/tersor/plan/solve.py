"""Choosing one candidate a site: the whole front by a Lagrangian sweep, one budget exactly by integer programming.

The planner knows no tensors: a menu is a list of options with their costs and a divergence. Damages of sites add, which
the ledger checks afterwards.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_matrix

from tersor.errors import TersorError, UnreachableBudget

RESOURCES = ("stored", "resident", "flops", "latency")
TRIES = 12  # choices of HiGHS that may break a limit by a hair before all limits are tightened by one


@dataclass(frozen=True)
class Option:
    """What one choice at one site costs and damages; `key` says which candidate it is, None for leaving it as it is."""

    key: int | None
    stored: int
    resident: int
    flops: int
    divergence: float
    latency: float = 0.0


Menu = Sequence[Option]


@dataclass(frozen=True)
class Solution:
    """One option a menu, and by how much at most a better choice could lie below it, as a share (0 is proved best)."""

    chosen: tuple[Option, ...]
    gap: float

    def total(self, what: str) -> float:
        return float(sum(getattr(option, what) for option in self.chosen))


def hull(menu: Menu, resource: str = "stored") -> list[Option]:
    """The lower convex hull of a menu from its cheapest option on: falling divergence, at ever flatter slopes."""
    best: list[Option] = []
    for option in sorted(menu, key=lambda o: (getattr(o, resource), o.divergence)):
        if best and option.divergence >= best[-1].divergence:
            continue
        while len(best) >= 2 and _slope(best[-2], option, resource) <= _slope(best[-2], best[-1], resource):
            best.pop()
        best.append(option)
    return best


def front(menus: Sequence[Menu], resource: str = "stored") -> list[Solution]:
    """Every plan on the lower convex hull of all plans, from the smallest to the least damaged.

    Each is optimal for its own size: the sites' hulls are walked together, steepest step first.
    """
    hulls = [hull(menu, resource) for menu in menus]
    steps = [
        (_slope(a, b, resource), site, number)
        for site, options in enumerate(hulls)
        for number, (a, b) in enumerate(pairwise(options), 1)
    ]
    at = [0] * len(menus)
    solutions = [Solution(tuple(h[0] for h in hulls), 0.0)]
    for _, site, number in sorted(steps):
        at[site] = number
        solutions.append(Solution(tuple(h[i] for h, i in zip(hulls, at, strict=True)), 0.0))
    return solutions


def solve(
    menus: Sequence[Menu],
    limits: dict[str, float],
    *,
    minimise: str = "divergence",
    seconds: float = 20.0,
) -> Solution:
    """The best choice under `limits` on the sums of `stored`, `resident`, `flops`, `latency` or `divergence`, by HiGHS.

    Raises UnreachableBudget, naming the smallest reachable sum, where no choice fits.
    """
    for name, limit in limits.items():
        least = sum(min(getattr(o, name) for o in menu) for menu in menus)
        if least > limit:
            raise UnreachableBudget(
                f"The budget is out of reach: {name} can be {_shown(least)} at the least, not {_shown(limit)}."
            )
    menus = [_undominated(menu, {*limits, minimise}) for menu in menus]
    known = _on_the_front(menus, limits, minimise)
    if known is not None:  # what costs more alone than all of a known solution is in none that is better
        bound = known.total(minimise)
        if bound <= 0:
            return known
        menus = [[o for o in menu if getattr(o, minimise) <= bound] for menu in menus]
    options = [option for menu in menus for option in menu]
    owner = np.repeat(np.arange(len(menus)), [len(menu) for menu in menus])
    columns = np.arange(len(options))
    one_each = csr_matrix((np.ones(len(options)), (owner, columns)), shape=(len(menus), len(options)))
    constraints = [LinearConstraint(one_each, 1, 1)]
    for name, limit in limits.items():
        scale = max(abs(limit), 1e-12)
        constraints.append(
            LinearConstraint(np.array([[getattr(o, name) for o in options]]) / scale, -np.inf, limit / scale)
        )
    cost = np.array([getattr(o, minimise) for o in options], dtype=float)
    cost /= _cost_scale(menus, minimise) if known is None else known.total(minimise)
    for _ in range(TRIES):
        with _nothing_on_stdout():
            found = milp(
                cost,
                constraints=constraints,
                integrality=np.ones(len(options)),
                bounds=Bounds(0, 1),
                options={"time_limit": seconds, "mip_rel_gap": 1e-4},
            )
        if found.x is None:
            if known is not None:
                return known
            if len(limits) > 1 and found.status == 2:
                raise UnreachableBudget("No plan meets all the limits at once; loosen one of them.")
            raise TersorError(f"The solver found no plan: {found.message}")
        taken = found.x > 0.5
        picked = Solution(tuple(options[i] for i in columns[taken]), max(0.0, float(found.mip_gap or 0.0)))
        if all(picked.total(name) <= limit for name, limit in limits.items()):
            return picked
        # HiGHS keeps a limit to one part in a million, ours hold to the byte: this choice is out, and it looks again.
        constraints.append(LinearConstraint(taken[None].astype(float), -np.inf, len(menus) - 1))
    if known is not None:
        return known
    return solve(menus, {name: limit * (1 - 2e-6) for name, limit in limits.items()}, minimise=minimise)


def _on_the_front(menus: Sequence[Menu], limits: dict[str, float], minimise: str) -> Solution | None:
    """The best plan on the lower convex hull that fits, its gap that to the hull at the limit; None where none fits."""
    if minimise not in ("divergence", "stored"):
        return None
    fitting = []
    for resource in (*(name for name in limits if name in RESOURCES), "stored"):
        for solution in front(menus, resource):
            if all(solution.total(name) <= limit for name, limit in limits.items()):
                fitting.append(solution)
    best = min(fitting, key=lambda s: s.total(minimise), default=None)
    return None if best is None else Solution(best.chosen, 0.0 if best.total(minimise) <= 0 else 1.0)


@contextmanager
def _nothing_on_stdout() -> Iterator[None]:
    """Nothing that compiled code prints reaches the terminal: HiGHS has lines that no option of its own turns off."""
    sys.stdout.flush()
    kept, nothing = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nothing, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nothing)


def _cost_scale(menus: Sequence[Menu], minimise: str) -> float:
    """The sum of the medians, so that the objective is of the order of one."""
    return max(sum(float(np.median([getattr(o, minimise) for o in menu])) for menu in menus), 1e-12)


def _undominated(menu: Menu, names: set[str]) -> list[Option]:
    """The options that no other beats in all of `names`."""
    order = sorted(names)
    kept: list[Option] = []
    for option in sorted(menu, key=lambda o: tuple(getattr(o, n) for n in order)):
        if not any(all(getattr(k, n) <= getattr(option, n) for n in order) for k in kept):
            kept.append(option)
    return kept


def _slope(a: Option, b: Option, resource: str) -> float:
    width = getattr(b, resource) - getattr(a, resource)
    return (b.divergence - a.divergence) / width if width > 0 else -np.inf


def _shown(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.4g}"
