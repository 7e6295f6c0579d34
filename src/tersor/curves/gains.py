"""Gains: what probes that are measured at a site do, over what was predicted for them.

A miss of the prediction is nearly the same for every form at a site, and how forms differ in it is nearly the same at
sites of one kind. So scouts measure a probe of every form, the other sites one, and borrow the rest from the scouts;
all of a site on as many samples as tell well enough what the first does.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tersor.curves.draw import fit_site, is_unused, site_metrics
from tersor.curves.scouts import scouts_of
from tersor.engine import map_units
from tersor.forms import Candidate, Cost, form_named, settings_of
from tersor.metrics import Metric
from tersor.models.compare import Reference, substituted
from tersor.models.model import Model
from tersor.models.sites import Site
from tersor.run import Run

TOLD = 0.05  # the standard error of what a probe does, over that: it moves what a plan chooses by some 1/30 of a bit
LEADING = ("coded", "int")  # whose probe is measured at every site: the first of these that is drawn there


def probe_gains(
    run: Run,
    model: Model,
    sites: Sequence[Site],
    reference: Reference,
    forms: Sequence[str],
    workers: int | None = None,
) -> Iterator[str]:
    """Measure probes on held-back batches; measured over predicted is the gain of a form at a site.

    Where the scouts showed of which forms a plan could want much, only these are probed. Half of the workers fit probes
    while those before are measured, with all threads for any number of workers, as sums depend on their number. `gain`
    is that of `int`, which forms without a probe of their own borrow, or of the first form where that is not probed; 1
    where nothing is seen. Yields the name of every site when it was measured.
    """
    scouts = {site.name for site in scouts_of([site for site in sites if not is_unused(run, site)])}
    worth = run.get("worth_probing") or {}

    def units() -> Iterator[tuple[Site, Callable[[], tuple[Any, ...]]]]:
        for site in sites:
            wanted = [name for name in forms if name in worth.get(site.name, worth.get(site.kind, forms))]
            probes = _missing_probes(run, site, wanted, is_scout=site.name in scouts)
            if probes:
                yield site, partial(_probe_arguments, run, model, site, probes)

    fitting = workers or os.cpu_count() or 1
    if fitting > 1:
        fitting = max(2, fitting // 2)
    for site, fits in map_units(fit_probes, units(), fitting, in_order=True):
        found, batches = _known(run, site), None
        for name, (new, predicted) in fits.items():
            with reference.starting_at(site), substituted(model, site, new):
                if batches is None:
                    measured, batches = reference.told(TOLD)
                else:
                    measured = reference.divergence(batches)
            gain = measured / predicted if predicted > 0 and measured > 0 else 1.0
            found["by_form"][name] = gain
            if name == "int" or "gain" not in found:
                found |= {"predicted": predicted, "measured": measured, "gain": gain}
        run.put(f"gain/{site.name}", found)
        yield site.name
    others = [site for site in sites if site.name not in scouts]
    _borrow(run, [site for site in sites if site.name in scouts], others)


def _known(run: Run, site: Site) -> dict[str, Any]:
    found: dict[str, Any] = run.get(f"gain/{site.name}", {"by_form": {}})
    return found


def _borrow(run: Run, scouts: Sequence[Site], others: Sequence[Site]) -> None:
    """Give the forms that were not measured at a site the gain of the one that was, times how they differ at scouts."""
    at_scouts = [(site.kind, _known(run, site)["by_form"]) for site in scouts]
    for site in others:
        found = _known(run, site)
        measured = found["by_form"]
        if not measured:
            continue
        leading = _leading(measured)
        alike = [gains for kind, gains in at_scouts if kind == site.kind and leading in gains]
        borrowed = {}
        for name in sorted({name for gains in alike for name in gains} - measured.keys()):
            ratios = [gains[name] / gains[leading] for gains in alike if name in gains]
            borrowed[name] = measured[leading] * float(np.exp(np.median(np.log(ratios))))
        run.put(f"gain/{site.name}", {**found, "borrowed": borrowed, "gain": borrowed.get("int", found["gain"])})


def _leading(names: Iterable[str]) -> str:
    """Of some forms the one whose probe is measured at every site."""
    return next(name for name in (*LEADING, *names) if name in names)


def _missing_probes(run: Run, site: Site, forms: Sequence[str], *, is_scout: bool) -> dict[str, Any]:
    """The probes to measure that are not yet, by form; none for a site that the model does not use.

    Where a form that is drawn there has no probe of its own, or none is drawn, that of `int` is one of them. Of a site
    that is no scout the leading one alone.
    """
    if is_unused(run, site):
        return {}
    known, drawn = _known(run, site)["by_form"], list(run.candidates(site.name))
    curves = {name: [_of_one(c, site.stack) for c in drawn if c.form == name] for name in forms}
    probes = {name: form_named(name).probe(site.shape, curve) for name, curve in curves.items() if curve}
    if not probes or None in probes.values():
        probes["int"] = form_named("int").probe(site.shape, curves.get("int", ()))
    probes = {name: probe for name, probe in probes.items() if probe is not None}
    wanted = probes if is_scout else {_leading(probes)}
    return {name: probes[name] for name in wanted if name not in known}


def _probe_arguments(run: Run, model: Model, site: Site, probes: dict[str, Any]) -> tuple[Any, ...]:
    return site.matrices(model.module).cpu(), site_metrics(run, site), probes


def fit_probes(weights: Tensor, metrics: list[Metric], probes: dict[str, Any]) -> dict[str, tuple[Tensor, float]]:
    """The matrices of every probe, by form, and the divergence predicted for them."""
    made = {}
    for name, probe in probes.items():
        new = torch.stack([op.dense() for op in fit_site(form_named(name), weights, metrics, probe)])
        made[name] = new, sum(m.distance(w - n) for m, w, n in zip(metrics, weights, new, strict=True))
    return made


def _of_one(candidate: Candidate, count: int) -> Candidate:
    """A candidate of a stack as that of its first matrix, at the mean cost."""
    cost = Cost(candidate.cost.stored // count, candidate.cost.resident // count, candidate.cost.flops)
    return replace(candidate, setting=settings_of(candidate.setting, count)[0], cost=cost)
