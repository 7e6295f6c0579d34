"""Finding out on a few sites which settings a plan could use, so that the others need not be fitted everywhere.

What nowhere among the scouts comes near to what the other forms do at equal cost is left out elsewhere. Which cost
that is depends on the budgets to come: what takes few bytes on disk may take many in memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import median

import numpy as np

from tersor.forms import Candidate, Setting
from tersor.models.sites import Site

SHARE = 6  # sites of one kind and shape for which one stands
NEAR = 1.1  # times the damage of the other forms, at most, for a setting to be worth drawing
FAR = 1.2  # the same where it speaks for trying the form on a giant
SOME, MOST = 1 / 6, 1 / 2  # of the settings of a form, that must: at scouts of the giant's kind, and at others
GIANT = 3  # times as large as the median scout
RUIN = 0.25  # of the worst damage at a site: a candidate that does more is not worth having


def scouts_of(sites: Sequence[Site]) -> list[Site]:
    """From the middle of every run of `SHARE` sites of one kind and shape."""
    groups: dict[tuple[str, tuple[int, ...]], list[Site]] = {}
    for site in sites:
        groups.setdefault((site.kind, site.parameter_shape), []).append(site)
    return [site for group in groups.values() for site in group[(min(len(group), SHARE) - 1) // 2 :: SHARE]]


def giants_of(scouts: Sequence[Site]) -> list[Site]:
    """Scouts beside which most others are small, such as a table of words: the small ones are asked first."""
    usual = median(site.parameters for site in scouts) if scouts else 0
    return [site for site in scouts if site.parameters > GIANT * usual]


def worth_drawing(
    curves: Iterable[Sequence[Candidate]], resources: Sequence[str], near: float = NEAR
) -> dict[str, set[Setting]]:
    """The settings, by form, that somewhere do at most `near` times the damage of all other forms at the same cost.

    `curves` has the candidates of all forms, a site each; `resources` are the costs that will be limited, of `stored`,
    `resident` and `flops`.
    """
    found: dict[str, set[Setting]] = {}
    for candidates in curves:
        ruin = RUIN * max(c.divergence for c in candidates)
        for form in {c.form for c in candidates}:
            own = [c for c in candidates if c.form == form and c.divergence <= ruin]
            others = [c for c in candidates if c.form != form]
            chosen = [c.setting for c in own if any(_comes_near(c, others, resource, near) for resource in resources)]
            if chosen:
                found.setdefault(form, set()).update(chosen)
    return found


def _comes_near(candidate: Candidate, others: Sequence[Candidate], resource: str, near: float) -> bool:
    """Whether a candidate does at most `near` times the damage of the others, by the logarithm between their best."""
    if not others:
        return True
    cost, damage = np.array([(getattr(c.cost, resource), c.divergence) for c in others], dtype=float).T
    order = np.lexsort((damage, cost))
    best = np.minimum.accumulate(np.log(np.maximum(damage[order], 1e-300)))
    there = np.interp(getattr(candidate.cost, resource), cost[order], best, left=np.inf)
    return bool(np.log(max(candidate.divergence, 1e-300)) <= there + np.log(near))
