"""Plans of all forms beside those of each form alone, at five budgets: what mixing families is worth, measured.

    python bench/families.py MODEL [--run DIR] [--mixed-only] [--alone coded,trellis]

The mixed plans are of a study as `compress` makes it under limits on bytes: every form at a few sites, elsewhere what
came near to the best there. For the others the rest is drawn, every form everywhere, in the settings that such budgets
could want. All plans are predicted; measured are the mixed ones, and those of a form alone that are predicted within
`CLOSE` of the mixed one. Everything is fitted and measured in this one run.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from judging import Judge, mean_of
from models import NAMES, reference
from tersor.build.fits import fits_of
from tersor.build.interaction import applied
from tersor.curves.draw import draw_unit, is_unused, site_metrics
from tersor.curves.scouts import scouts_of
from tersor.engine import map_units
from tersor.errors import UnreachableBudget
from tersor.forms import FORMS, as_values, cost_of
from tersor.models import Site
from tersor.plan import Plan
from tersor.steps import Study, open_study

RESULTS = Path(__file__).parent / "results"
FAMILIES = tuple(name for name in FORMS if name != "portable")  # which is `int` as exports can hold it
WANTED = (1.0, 4.2)  # bits a weight of the settings that are drawn everywhere
CLOSE = 2.0  # times the mixed plan's prediction up to which a plan of one form is measured
STEPS = ("observe", "damping", "limit", "draw", "probe")


def draw_the_rest(opened: Study, names: Sequence[str]) -> float:
    """Draw these forms where the study did not, in the settings that are wanted; returns the seconds it took."""
    start, run = time.perf_counter(), opened.run

    def units() -> Iterator[tuple[str, Callable[[], tuple[Any, ...]]]]:
        for site in sorted(opened.sites, key=lambda site: -site.parameters):
            known = {(c.form, c.setting) for c in run.candidates(site.name)}
            for name in () if is_unused(run, site) else names:
                missing = [as_values(setting) for setting in wanted(site, name) if (name, setting) not in known]
                if missing:
                    most = 2 * len(missing) > len(list(FORMS[name].settings(site.shape)))
                    yield site.name, partial(arguments, site, name, None if most else missing)

    def arguments(site: Site, name: str, ladder: list[dict[str, Any]] | None) -> tuple[Any, ...]:
        ladders = None if ladder is None else {name: ladder}  # a whole one is drawn faster than most of it is fitted
        return site.matrices(opened.model.module).cpu(), site_metrics(run, site), [name], ladders

    for site_name, curves in map_units(draw_unit, units()):
        for form, (curve, seconds) in curves.items():
            run.add_candidates(site_name, form, curve, seconds)
    run.put("drawn_for", None)
    return time.perf_counter() - start


def wanted(site: Site, name: str) -> list[Any]:
    """The settings of a form at a site that take `WANTED` bits a weight; none where a fit only says how many."""
    form, (low, high) = FORMS[name], (bits * site.shape[0] * site.shape[1] / 8 for bits in WANTED)
    return [s for s in form.settings(site.shape) if low <= cost_of(form, site.shape, s).stored <= high]


def measured(opened: Study, judge: Judge, plan: Plan) -> dict[str, Any]:
    """A plan as it is predicted, and its measured divergence."""
    for _ in fits_of(opened.run, opened.model, opened.sites, plan.choices):
        pass
    with applied(opened.run, opened.model, opened.sites, plan.choices):
        return {**predicted(opened, plan), "divergence": mean_of(judge.divergences())}


def predicted(opened: Study, plan: Plan) -> dict[str, Any]:
    """The bytes of a plan, its predicted divergence, and how many sites and weights have which form."""
    used, weights = Counter(choice.form for choice in plan.choices), Counter[str]()
    for site, choice in zip(opened.sites, plan.choices, strict=True):
        weights[choice.form] += site.parameters
    return {"bytes": plan.stored, "predicted": plan.divergence, "used": dict(used), "weights": dict(weights)}


def hulls(opened: Study) -> dict[str, Any]:
    """Of the smallest scout that is no table: for every form the points that no other of it beats, (bits, nats)."""
    site = min((s for s in scouts_of(opened.sites) if s.kind != "table"), key=lambda s: s.parameters)
    found: dict[str, list[tuple[float, float]]] = {}
    for candidate in opened.run.candidates(site.name):  # smallest first
        points = found.setdefault(candidate.form, [])
        if not points or candidate.divergence < points[-1][1]:
            points.append((8 * candidate.cost.stored / site.parameters, candidate.divergence))
    return {"site": site.name, "shape": site.shape, "forms": found}


def beside_the_best(opened: Study, sizes: Sequence[int]) -> dict[str, list[float | None]]:
    """What a form does at least, over the best at equal bits a weight, at the scouts that are no tables.

    A size of a whole plan says the bits; None where the form has nothing so small at any of these.
    """
    scouts = [s for s in scouts_of(opened.sites) if s.kind != "table" and not is_unused(opened.run, s)]
    shares = [size / sum(site.parameters for site in opened.sites) for size in sizes]
    least: dict[str, list[float | None]] = {}
    for site in scouts:
        candidates = list(opened.run.candidates(site.name))
        for k, most in enumerate(share * site.parameters for share in shares):
            fit = [(c.form, c.divergence) for c in candidates if c.cost.stored <= most]
            best = min(d for _, d in fit)
            for form in {c.form for c in candidates}:
                known = least.setdefault(form, [None] * len(sizes))
                ratio = min((d / best for name, d in fit if name == form), default=None)
                known[k] = min((r for r in (known[k], ratio) if r is not None), default=None)
    return least


def alone(
    opened: Study, judge: Judge, names: Sequence[str], budget: str, most: float
) -> Iterator[tuple[str, dict[str, Any] | None]]:
    """Each form's own plan at a budget, measured where it is predicted to do `most` damage; None: it has none."""
    for name in names:
        try:
            plan = opened.plan(budget, forms=(name,))
        except UnreachableBudget:
            yield name, None
            continue
        yield name, measured(opened, judge, plan) if plan.divergence <= most else predicted(opened, plan)


def shown(name: str, found: dict[str, Any] | None) -> str:
    if found is None:
        return f"  {name:16} cannot be so small"
    d, used = found.get("divergence"), ", ".join(f"{form} {count}" for form, count in sorted(found["used"].items()))
    real = "not measured" if d is None else f"{d['value']:.5f} [{d['low']:.5f}, {d['high']:.5f}]"
    return f"  {name:16} {found['bytes']:>11,}  predicted {found['predicted']:.5f}  {real}  {used}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=NAMES)
    parser.add_argument("--run", type=Path, default=None)
    parser.add_argument("--mixed-only", action="store_true")
    parser.add_argument("--alone", default=",".join(FAMILIES), help="the forms whose own plans are made")
    given = parser.parse_args()
    known, scratch = reference(given.model), given.run or Path(tempfile.mkdtemp())
    target = RESULTS / f"families-{known.name}.json"
    is_new = not (scratch / "scouted").exists()
    opened = known.study(scratch / "scouted", forms=FAMILIES, resources=("stored",))
    found: dict[str, Any] = {"model": known.name, "cells": [], "hulls": hulls(opened)}
    took = scratch / "took.json"  # of a study that went on after it was stopped, no time can be told
    if is_new:
        seconds = {step: opened.run.get(f"seconds/{step}", 0.0) for step in STEPS}
        drawn = {name: round(seconds) for name, seconds in opened.run.seconds_by_form().items()}
        took.write_text(json.dumps({"seconds": seconds, "drawn": drawn}), encoding="utf8")
    if took.exists():
        found |= json.loads(took.read_text(encoding="utf8"))
        print(f"{known.name}: study of {len(FAMILIES)} forms {sum(found['seconds'].values()):.0f} s", flush=True)
    judge = Judge.of(known, opened.model)
    for budget in known.budgets:
        cell = {"budget": budget, "mixed": measured(opened, judge, opened.plan(budget)), "alone": {}}
        print(f"{budget}\n{shown('all forms', cell['mixed'])}", flush=True)
        found["cells"].append(cell)
    found["beside_the_best"] = beside_the_best(opened, [cell["mixed"]["bytes"] for cell in found["cells"]])
    target.write_text(json.dumps(found, indent=1), encoding="utf8")
    if given.mixed_only:
        return
    names = given.alone.split(",")
    if not (scratch / "whole").exists():
        shutil.copytree(scratch / "scouted", scratch / "whole")
    whole = open_study(opened.model, scratch / "whole")
    print(f"everything drawn everywhere {draw_the_rest(whole, names):.0f} s more", flush=True)
    for cell in found["cells"]:
        cell["whole_predicted"] = whole.plan(cell["budget"]).divergence
        ratio = cell["mixed"]["predicted"] / cell["whole_predicted"]
        print(f"{cell['budget']}: predicted {ratio:.4f} times what it is with everything drawn", flush=True)
    for cell in found["cells"]:
        print(cell["budget"], flush=True)
        for name, row in alone(whole, judge, names, cell["budget"], CLOSE * cell["mixed"]["predicted"]):
            print(shown(name, row), flush=True)
            cell["alone"][name] = row
            target.write_text(json.dumps(found, indent=1), encoding="utf8")
    print(f"written to {target.name}")


if __name__ == "__main__":
    main()
