"""Drawing curves: for every site and form, the candidates with their exact costs and predicted divergences.

What is drawn is stored in the run at once, form by form, so an interrupted study goes on where it stopped.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tersor.curves.damping import Damping, Sample, choose_damping
from tersor.curves.scouts import FAR, MOST, SOME, giants_of, scouts_of, worth_drawing
from tersor.engine import map_units
from tersor.forms import (
    FORMS,
    OF_TABLES,
    Candidate,
    Cost,
    Form,
    IntSetting,
    Operator,
    Setting,
    Shape,
    as_values,
    cost_of,
    form_named,
    settings_of,
    stacked,
)
from tersor.metrics import Metric, Side
from tersor.models.model import Model
from tersor.models.sites import Site
from tersor.observe import load_metrics
from tersor.observe.store import file_of
from tersor.run import Run

DAMPING_SITES = 4
APART = 1 << 18  # entries of a weight above which scouts draw every form in a unit of its own
UNUSED = IntSetting(4, 64, rounding="nearest")
Report = Callable[[str], Any]
Ladders = Mapping[str, Sequence[Mapping[str, Any]]]  # by the name of a form, settings as plain values


def site_metrics(run: Run, site: Site, kind: str | None = None) -> list[Metric]:
    """The damped metrics of the matrices of a site, as the study chose them."""
    kind = kind or run.get("metric")
    if is_unused(run, site):
        return [identity_metric(site)] * site.stack
    damping = Damping(**run.get("damping"))
    return [damping.apply(m, table=site.kind == "table") for m in load_metrics(run, site, kind)]


def identity_metric(site: Site) -> Metric:
    """The metric of a site that the model did not use: no error in it was seen to matter."""
    rows, columns = site.shape
    return Metric("identity", Side(torch.ones(rows)), Side(torch.ones(columns)), 0.0)


def settle_damping(
    run: Run,
    model: Model,
    sites: Sequence[Site],
    kind: str,
    progress: Callable[[int, int], Any] = lambda *_: None,
) -> Damping:
    """Choose the damping on a few sites spread over the model and keep it, with its evidence, in the run."""
    known = run.get("damping")
    if known is not None:
        return Damping(**known)
    picked = [site for site in damping_sites(run, sites) if run.has_tensors(file_of(site, "check"))]
    damping, evidence = choose_damping([_sample(run, model, site, kind) for site in picked], progress)
    run.put("damping_evidence", evidence)
    run.put("damping", {"inputs": damping.inputs, "gradients": damping.gradients, "frequencies": damping.frequencies})
    return damping


def damping_sites(run: Run, sites: Sequence[Site]) -> list[Site]:
    """The sites on which the damping is chosen, of those that the model used: a few over its depth, and a table."""
    usable = [site for site in sites if run.has_tensors(file_of(site, "fit"))]
    tables = [s for s in usable if s.kind == "table"][:1]
    others = [s for s in usable if s.kind != "table"]
    return others[:: max(1, -(-len(others) // DAMPING_SITES))] + tables


def _sample(run: Run, model: Model, site: Site, kind: str) -> Sample:
    """The first matrix of a site, or some rows of a table, with its metric from both parts of the data."""
    weight = site.matrices(model.module)[0].cpu()
    fitted, held_back = (load_metrics(run, site, kind, part)[0] for part in ("fit", "check"))
    rows = fitted.sampled_rows()
    if rows is not None:
        weight, fitted, held_back = weight[rows[0]], fitted.of_rows(*rows), held_back.of_rows(*rows)
    return Sample(weight, fitted, held_back, site.kind == "table")


def draw_all(
    run: Run,
    model: Model,
    sites: Sequence[Site],
    forms: Sequence[str],
    workers: int | None = None,
    settings: Ladders | None = None,
    resources: Sequence[str] | None = None,
) -> Iterator[str]:
    """Draw the curves that are not in the run yet, a unit a site; yields the name of every site when it is stored.

    `settings` replaces the ladder of a form, by its name, with settings given as plain values. With `resources`, the
    costs that will be limited, a few scouts draw all forms and the other sites what came near to the best at those of
    their kind. Giants among the scouts draw what the small ones speak for; forms made for tables are for these.
    """
    unseen = run.get("unseen_sites", ())  # used, but not as could be watched: they stay as they are
    sites = [site for site in sites if site.name not in unseen]
    scouts = scouts_of([s for s in sites if not is_unused(run, s)])
    others = [site for site in sites if site not in scouts]
    known = run.get("drawn_for")
    if known is not None and known["resources"] != list(resources or ()):
        run.undraw(known["left_out"], [site.name for site in others])
        run.put("drawn_for", None)
    run.put("worth_probing", None)
    draw = partial(_draw, run, model, workers=workers)
    if resources is None or settings is not None:
        yield from draw(scouts, lambda _: forms, lambda _: settings, apart=True)
        yield from draw(others, lambda _: forms, lambda _: settings)
    else:
        yield from _draw_near_the_best(run, scouts, others, forms, resources, draw)


def _draw_near_the_best(
    run: Run,
    scouts: Sequence[Site],
    others: Sequence[Site],
    forms: Sequence[str],
    resources: Sequence[str],
    draw: Callable[..., Iterator[str]],
) -> Iterator[str]:
    """Draw small scouts, giants, then the others; keeps in the run which forms are not whole, and what to probe."""

    def at(site: Site, names: Iterable[str]) -> list[str]:
        return [name for name in forms if name in names and (site.kind == "table" or name not in OF_TABLES)]

    giants = giants_of(scouts)
    small = [site for site in scouts if site not in giants]
    yield from draw(small, lambda site: at(site, forms), lambda _: None, apart=True)
    tried = {site.name: _tried(run, site, small, forms, resources) for site in giants}
    yield from draw(giants, lambda site: at(site, tried[site.name]), lambda _: None, apart=True)
    near: dict[str, dict[str, set[Setting] | None]] = {}
    for kind in {site.kind for site in scouts}:
        alike = [site for site in scouts if site.kind == kind]
        near[kind] = _ladders(worth_drawing(_curves(run, alike, forms), resources), alike)
    whole = {site.name: at(site, tried.get(site.name, forms)) for site in scouts}
    for site in others:
        whole[site.name] = at(site, [name for name, ladder in near.get(site.kind, {}).items() if ladder is None])
    left_out = sorted({name for found in whole.values() for name in set(forms).difference(found)})
    run.put("drawn_for", {"resources": list(resources), "left_out": left_out} if left_out else None)
    run.put("worth_probing", _worth_probing(run, near, scouts, others, forms, resources))
    yield from draw(
        others, lambda site: at(site, near.get(site.kind, forms)), lambda site: _ladders_at(site, near.get(site.kind))
    )


def _tried(run: Run, site: Site, small: Sequence[Site], forms: Sequence[str], resources: Sequence[str]) -> list[str]:
    """The forms that are worth trying on a giant: those of which many settings came near to the best at a small scout.

    Not so many need do so at those of its kind; where there are none of its kind all count as such.
    """
    alike = [other for other in small if other.kind == site.kind]
    tried = set() if alike else {*OF_TABLES}
    for other in small:
        (curve,) = _curves(run, [other], forms)
        drawn = Counter(candidate.form for candidate in curve)
        many = SOME if other in (alike or small) else MOST
        near = worth_drawing([curve], resources, FAR)
        tried.update(name for name, settings in near.items() if len(settings) >= many * drawn[name])
    return [name for name in forms if name in tried]


def _curves(run: Run, sites: Sequence[Site], forms: Sequence[str]) -> list[list[Candidate]]:
    return [[c for c in run.candidates(site.name) if c.form in forms] for site in sites]


def _ladders(worth: Mapping[str, set[Setting]], scouts: Sequence[Site]) -> dict[str, set[Setting] | None]:
    """The settings to draw of every form that is worth it, None for its whole ladder.

    That is where a fit completes settings, and where most are worth it: forms draw a whole ladder faster than they fit.
    """
    known = {name: {s for site in scouts for s in form_named(name).settings(site.shape)} for name in worth}
    return {
        name: settings if settings <= known[name] and 2 * len(settings) <= len(known[name]) else None
        for name, settings in worth.items()
    }


def _worth_probing(
    run: Run,
    near: Mapping[str, Mapping[str, set[Setting] | None]],
    scouts: Sequence[Site],
    others: Sequence[Site],
    forms: Sequence[str],
    resources: Sequence[str],
) -> dict[str, list[str]]:
    """The forms to probe at sites of a kind: those most of whose settings are near to the best.

    Scouts that stand for no other site probe, each by its name, all forms that have such a setting there.
    """
    found: dict[str, list[str]] = {}
    for kind, ladders in near.items():
        whole = [name for name, ladder in ladders.items() if ladder is None]
        if any(site.kind == kind for site in others):
            found[kind] = sorted(whole or ladders)
            continue
        for site in scouts:
            if site.kind == kind:
                found[site.name] = sorted(worth_drawing(_curves(run, [site], forms), resources))
    return found


def _ladders_at(site: Site, ladders: Mapping[str, set[Setting] | None] | None) -> Ladders | None:
    """Those settings that are in the ladders of a site, as plain values."""
    if ladders is None:
        return None
    return {
        name: [as_values(s) for s in form_named(name).settings(site.shape) if s in chosen]
        for name, chosen in ladders.items()
        if chosen is not None
    }


def is_unused(run: Run, site: Site) -> bool:
    """Whether the model did nothing with a site on the calibration data."""
    return site.name in run.get("unused_sites", ())


def _draw(
    run: Run,
    model: Model,
    sites: Sequence[Site],
    forms: Callable[[Site], Sequence[str]],
    ladders: Callable[[Site], Ladders | None],
    *,
    workers: int | None,
    apart: bool = False,
) -> Iterator[str]:
    """Draw the forms of every site that are missing; with `apart` a unit a form where a weight is large."""
    missing = {site.name: [name for name in forms(site) if not run.is_drawn(site.name, name)] for site in sites}

    def units() -> Iterator[tuple[str, Callable[[], tuple[Any, ...]]]]:
        for site in sorted(sites, key=lambda s: -s.parameters):
            names = missing[site.name]
            for part in [[n] for n in names] if apart and site.parameters > APART else [names]:
                if part:
                    yield site.name, partial(_arguments, run, model, site, part, ladders(site))

    left = {name: len(names) for name, names in missing.items()}
    for name, curves in map_units(draw_unit, units(), workers):
        for form, (curve, seconds) in curves.items():
            run.add_candidates(name, form, curve, seconds)
        left[name] -= len(curves)
        if not left[name]:
            yield name


def _arguments(run: Run, model: Model, site: Site, missing: list[str], settings: Ladders | None) -> tuple[Any, ...]:
    return site.matrices(model.module).cpu(), site_metrics(run, site), missing, settings


def draw_unit(
    weights: Tensor, metrics: list[Metric], forms: list[str], settings: Ladders | None = None
) -> dict[str, tuple[list[Candidate], float]]:
    """The curves of one site by form, each with the seconds it took; a site not used has one safe candidate."""
    if metrics[0].scale == 0.0:
        shape = (weights.shape[1], weights.shape[2])
        unused = Candidate("int", UNUSED, _sum([cost_of(FORMS["int"], shape, UNUSED)] * len(weights)), 0.0)
        return {name: ([unused], 0.0) for name in forms}
    curves = {}
    for name in forms:
        start = time.perf_counter()
        form = form_named(name)
        ladder = given_ladder(form, (weights.shape[1], weights.shape[2]), (settings or {}).get(name))
        curve = [] if ladder == [] else stacked_curve(form, weights, metrics, ladder)
        curves[name] = curve, time.perf_counter() - start
    return curves


def given_ladder(form: Form, shape: Shape, values: Sequence[Mapping[str, Any]] | None) -> list[Any] | None:
    """The settings given as plain values that take less than the matrix in 32-bit floats; None where none are given."""
    if values is None:
        return None
    settings = [form.setting(v) for v in values]
    return [s for s in settings if cost_of(form, shape, s).stored < 4 * shape[0] * shape[1]]


def stacked_curve(
    form: Form, weights: Tensor, metrics: list[Metric], settings: Sequence[Any] | None = None
) -> list[Candidate]:
    """The curve of a stack of matrices that share a setting: costs and divergences add.

    Where the matrices are worth different settings, each gets those of the others too.
    """
    curves = [{c.setting: c for c in form.curve(w, m, settings)} for w, m in zip(weights, metrics, strict=True)]
    ladder = dict.fromkeys(setting for curve in curves for setting in curve)
    for curve, weight, metric in zip(curves, weights, metrics, strict=True):
        missing = [setting for setting in ladder if setting not in curve]
        curve.update({c.setting: c for c in form.curve(weight, metric, missing)} if missing else {})
    stacks = ([curve[setting] for curve in curves] for setting in ladder)
    return [
        Candidate(form.name, stacked([c.setting for c in s]), _sum([c.cost for c in s]), sum(c.divergence for c in s))
        for s in stacks
    ]


def fit_site(form: Form, weights: Tensor, metrics: list[Metric], setting: Any) -> list[Operator]:
    """Fit one setting at every matrix of a site."""
    settings = settings_of(setting, len(weights))
    return [form.fit(w, m, s) for w, m, s in zip(weights, metrics, settings, strict=True)]


def _sum(costs: Sequence[Cost]) -> Cost:
    """The cost of a stack: a position passes through one of its matrices."""
    return Cost(sum(c.stored for c in costs), sum(c.resident for c in costs), costs[0].flops)
