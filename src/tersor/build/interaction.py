"""How damages of sites add up to that of the whole: measured on a few whole plans, on held-back calibration data.

The sum over sites is exact for small damage only. A few plans of the front are fitted and measured at the end of a
study; the ratio of measured to summed divergence, between them by the logarithm of the sum, corrects every prediction
of a whole plan. It is a growing function of the sum, so it changes no choice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from tersor.build.fits import fits_of, load_fit
from tersor.errors import UnreachableBudget
from tersor.models.compare import Reference, substituted
from tersor.models.model import Model
from tersor.models.sites import Site
from tersor.plan import UNTOUCHED, Choice, Limits, Planner
from tersor.run import Run

PROBED_BITS = (3.2, 2.3, 1.8)


@contextmanager
def applied(run: Run, model: Model, sites: Sequence[Site], choices: Sequence[Choice]) -> Iterator[float]:
    """The model with these choices in the place of its weights, put back at the end; yields the sum of their
    divergences as fitted, gains included."""
    wanted = {c.site: c for c in choices if c.form != UNTOUCHED}
    total = 0.0
    with ExitStack() as stack:
        for site in sites:
            if site.name in wanted:
                fit = load_fit(run, site, wanted[site.name])
                total += fit.divergence * run.gain(site.name, wanted[site.name].form)
                stack.enter_context(substituted(model, site, fit.matrices()))
        yield total


def measure_interaction(
    run: Run,
    model: Model,
    sites: Sequence[Site],
    planner: Planner,
    reference: Reference,
    workers: int | None = None,
    progress: Callable[[str, int, int], Any] = lambda *_: None,
) -> None:
    """Measure the plans at `PROBED_BITS` bits a weight and keep [[sum, measured], ...] in the run as `interaction`."""
    if run.get("interaction") is not None:
        return
    found = []
    for number, bits in enumerate(PROBED_BITS):
        try:
            plan = planner.plan(Limits(bits=bits))
        except UnreachableBudget:
            continue
        for done, _ in enumerate(fits_of(run, model, sites, plan.choices, workers)):
            progress(f"whole plan {number + 1}", done, len(plan.choices))
        with applied(run, model, sites, plan.choices) as total:
            found.append([total, reference.divergence()])
    run.put("interaction", sorted(found))
