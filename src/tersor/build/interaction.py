"""How damages of sites add up to that of the whole: measured on a few whole plans, on held-back calibration data.

The sum over sites is exact for small damage only. A few plans of the front are fitted and measured at the end of a
study; the ratio of measured to summed divergence, between them by the logarithm of the sum, corrects every prediction
of a whole plan. It is a growing function of the sum, so it changes no choice. What a single large site does more than
its small probe foretold is no matter of the sum, and does change choices: it is measured there alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from tersor.build.fits import Fit, fits_of, load_fit
from tersor.errors import UnreachableBudget
from tersor.models.compare import Reference, substituted
from tersor.models.model import Model
from tersor.models.sites import Site
from tersor.plan import UNTOUCHED, Choice, Limits, Planner
from tersor.run import Gains, Run

PROBED_BITS = (3.2, 2.3, 1.8)
LARGE = 1 / 4  # of a whole plan's sum: a site that does more is measured alone too
_Done = dict[str, tuple[str, float]]  # by site the form that a plan chose, and the divergence of its fit


@contextmanager
def applied(run: Run, model: Model, sites: Sequence[Site], choices: Sequence[Choice]) -> Iterator[_Done]:
    """The model with these choices, which are fitted, in the place of its weights, put back at the end.

    Yields by site the form that was chosen, and the divergence of its fit without the gain.
    """
    done: _Done = {}
    with ExitStack() as stack:
        for site, choice, fit in _fitted(run, sites, choices):
            done[site.name] = choice.form, fit.divergence
            stack.enter_context(substituted(model, site, fit.matrices()))
        yield done


def measure_interaction(
    run: Run,
    model: Model,
    sites: Sequence[Site],
    planner: Planner,
    reference: Reference,
    workers: int | None = None,
    progress: Callable[[str, int, int], Any] = lambda *_: None,
) -> None:
    """Measure the plans at `PROBED_BITS` bits a weight and keep [[sum, measured], ...] in the run as `interaction`.

    Each site that does more than `LARGE` of one is measured there alone; how its gain grows becomes part of its gain.
    """
    if run.get("interaction") is not None:
        return
    gains = {site.name: run.gains(site.name) for site in sites}
    plans: list[tuple[_Done, float]] = []
    growth: dict[str, dict[float, float]] = {}
    for number, bits in enumerate(PROBED_BITS):
        try:
            choices = planner.plan(Limits(bits=bits)).choices
        except UnreachableBudget:
            continue
        for done, _ in enumerate(fits_of(run, model, sites, choices, workers)):
            progress(f"whole plan {number + 1}", done, len(choices))
        with applied(run, model, sites, choices) as done_by:
            plans.append((done_by, reference.divergence()))
        damages = _damages(done_by, gains)
        large = [site for site in sites if damages.get(site.name, 0.0) > LARGE * sum(damages.values())]
        for site, _, fit in _fitted(run, large, choices):
            with reference.starting_at(site), substituted(model, site, fit.matrices()):
                alone = reference.divergence()
            if alone > 0:
                growth.setdefault(site.name, {})[fit.divergence] = alone / damages[site.name]
    gains |= {name: Gains({**gains[name].fact, "growth": sorted(points.items())}) for name, points in growth.items()}
    pairs = [(sum(_damages(done_by, gains).values()), whole) for done_by, whole in plans]
    facts = {f"gain/{name}": gains[name].fact for name in growth}
    run.put_all({**facts, "interaction": sorted(pairs)})


def _damages(plan: _Done, gains: Mapping[str, Gains]) -> dict[str, float]:
    return {name: divergence * gains[name].of(form, divergence) for name, (form, divergence) in plan.items()}


def _fitted(run: Run, sites: Sequence[Site], choices: Sequence[Choice]) -> Iterator[tuple[Site, Choice, Fit]]:
    """Of the sites that a plan touches, what it chose and the fit of that."""
    wanted = {choice.site: choice for choice in choices if choice.form != UNTOUCHED}
    for site in sites:
        if site.name in wanted:
            yield site, wanted[site.name], load_fit(run, site, wanted[site.name])
