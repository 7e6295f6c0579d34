"""A few points of a front, spread evenly over its sizes, with what each is made of and how far it is from the limit."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

from tersor.curves.limit import Limit, times_limit
from tersor.plan import UNTOUCHED, Planner, front


@dataclass(frozen=True)
class Point:
    """One plan of the front: bytes of its file, share of the original, bits a weight of a site, predicted divergence.

    `forms` are the shares of the weights that each form takes. `limit` is the least divergence that any code of as many
    bytes could have, `times_limit` the divergence over it; both None where the run has none.
    """

    stored: int
    share: float
    bits: float
    divergence: float
    forms: dict[str, float]
    limit: float | None = None
    times_limit: float | None = None


def front_points(planner: Planner, original_bytes: int, count: int = 15, limit: Limit | None = None) -> list[Point]:
    """About `count` plans worth having, from the smallest to the largest, at even ratios of their sizes."""
    solutions = front(planner.menus)
    sizes = [math.log(planner.fixed_bytes + s.total("stored")) for s in solutions]
    step = (sizes[-1] - sizes[0]) / max(count - 1, 1)
    wanted = [sizes[0] + step * k for k in range(count)]
    picked = sorted({min(range(len(sizes)), key=lambda i: abs(sizes[i] - size)) for size in wanted})
    weights = sum(s.parameters for s in planner.sites)
    points = []
    for index in picked:
        plan = planner.plan_of(solutions[index], "front")
        of_form: Counter[str] = Counter()
        for site, choice in zip(planner.sites, plan.choices, strict=True):
            of_form[choice.form] += site.parameters
        shares = {form: n / weights for form, n in sorted(of_form.items(), key=lambda e: (e[0] == UNTOUCHED, -e[1]))}
        bits = 8 * sum(c.stored for c in plan.choices) / weights
        least = None if limit is None else limit.divergence(plan.stored)
        times = times_limit(plan.divergence, least)
        points.append(Point(plan.stored, plan.stored / original_bytes, bits, plan.divergence, shares, least, times))
    return points
