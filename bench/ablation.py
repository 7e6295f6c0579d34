"""What each lever is worth: a plan with all of them, and with each one taken away, at equal bytes on one model.

    python bench/ablation.py MODEL [--run DIR] [--family "at rest"] [--every N]

At rest (bytes of the file) and resident (bytes in memory, forms that decode nothing at load). A lever that is taken
away is so before the curves are drawn, and the planner does the best it can without it. Everything is fitted and
measured on held-out data in this one run. With `--every`, one in so many weights that are no tables is touched.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from budgets import metrics_for
from models import NAMES, reference
from tersor.build.fits import fit_choice
from tersor.build.layout import Layout
from tersor.curves.draw import stacked_curve
from tersor.errors import UnreachableBudget
from tersor.forms import USUAL, Candidate, form_named
from tersor.judge.intervals import mean_estimate
from tersor.models import Site
from tersor.models.compare import Reference as Outputs
from tersor.models.sites import walk
from tersor.observe.store import file_of
from tersor.plan import Choice, Limits, Planner
from tersor.steps import Study

RESULTS = Path(__file__).parent / "results"
EVERY = (*USUAL, "trellis")
FEW = (1.0, 1.5, 2.0, 2.5, 3.0, 4.0)  # bits of the trellis where every rung is fitted, not estimated
RESIDENT = tuple(name for name in EVERY if name != "coded")


@dataclass(frozen=True)
class Variant:
    """Forms of the study, or one `form` drawn anew under a metric, its settings changed; how bits are spent; and
    whether the plan is fitted without enlarging what rounding shrinks."""

    name: str
    forms: tuple[str, ...] = ()
    form: str = ""
    metric: str = "kronecker"
    change: Callable[[Any], Any] | None = None
    gains: bool = True
    same_bits: bool = False
    shrunk: bool = False


AT_REST = (
    Variant("all forms", EVERY),
    Variant("only coded", ("coded",)),
    Variant("no gains", EVERY, gains=False),
    Variant("the same bits at every site", ("coded",), same_bits=True),
    Variant("one-sided metric and feedback", form="coded", metric="input"),
    Variant("diagonal metric, no feedback", form="coded", metric="diagonal"),
    Variant("no price on bits", form="coded", change=lambda s: replace(s, trade=0.0, stored=None, resident=None)),
    Variant("no entropy coding: trellis", RESIDENT),
    Variant("no entropy coding, no trellis", ("int", "lowrank", "int+lowrank")),
)
IN_MEMORY = (
    Variant("all forms that decode nothing", RESIDENT),
    Variant("no gains", RESIDENT, gains=False),
    Variant("only trellis", ("trellis",)),
    Variant("trellis, the same bits at every site", ("trellis",), same_bits=True),
    Variant(
        "trellis, not rotated", form="trellis", change=lambda s: replace(s, rotate=False) if s.bits in FEW else None
    ),
    Variant("only trellis, shrunk", ("trellis",), shrunk=True),
    Variant("trellis, one-sided metric and feedback", form="trellis", metric="input"),
    Variant("no trellis", ("int", "lowrank", "int+lowrank")),
    Variant("only integers", ("int",)),
    Variant("only integers, shrunk", ("int",), shrunk=True),
    Variant("integers, one-sided feedback", form="int", change=lambda s: replace(s, rounding="feedback")),
    Variant("integers, no feedback", form="int", change=lambda s: replace(s, rounding="nearest")),
    Variant("integers, no search of scales", form="int", change=lambda s: replace(s, search=False)),
    Variant("integers, groups of 64 only", form="int", change=lambda s: s if s.group_size == 64 else None),
    Variant("integers, symmetric", form="int", change=lambda s: replace(s, symmetric=True)),
    Variant("integers, scales of 16 bits", form="int", change=lambda s: replace(s, scale_bits=16)),
    Variant("integers, the same bits at every site", ("int",), same_bits=True),
)


def curve(opened: Study, site: Site, variant: Variant) -> tuple[Candidate, ...]:
    """The candidates of a site without the lever; a site that was not observed keeps what the study drew."""
    run = opened.run
    known = [c for c in run.candidates(site.name) if c.form in (variant.forms or (variant.form,))]
    observed = run.has_tensors(file_of(site, "fit"))
    if variant.form and observed:
        form, ladder = form_named(variant.form), None
        if variant.change is not None:
            base = form.settings(site.shape) if variant.form != "coded" else [c.setting for c in known]
            changed = (variant.change(setting) for setting in base)
            ladder = list(dict.fromkeys(s for s in changed if s is not None))
        metrics = metrics_for(opened, site, variant.metric)
        known = stacked_curve(form, site.matrices(opened.model.module).cpu(), metrics, ladder)
    gain = run.gain if variant.gains else lambda *_: 1.0
    return tuple(replace(c, divergence=c.divergence * gain(site.name, c.form)) for c in known)


def chosen(opened: Study, variant: Variant, limits: Limits) -> tuple[Choice, ...]:
    """The planner's choices without the lever; with the same bits everywhere the most that fit."""
    layout = Layout.from_json(opened.run.get("layout"))
    menus = [(site, curve(opened, site, variant)) for site in opened.sites]
    if not variant.same_bits:
        return Planner.over(menus, layout.file_bytes).plan(limits).choices
    what, budget = ("stored", limits.stored) if limits.stored is not None else ("resident", limits.resident)
    low, high = 0.0, 16.0
    best = None
    for _ in range(20):
        bits = (low + high) / 2
        plan = Planner.over([(s, (nearest(s, known, bits),)) for s, known in menus], layout.file_bytes)
        choices = [replace(c, divergence=0.0) for c in plan.plan(Limits(divergence=1e9)).choices]
        size = getattr(plan.plan_from(choices, "same bits"), what)
        low, high, best = (bits, high, tuple(choices)) if size <= budget else (low, bits, best)
    if best is None:
        raise UnreachableBudget("No number of bits is small enough.")
    return best


def nearest(site: Site, known: tuple[Candidate, ...], bits: float) -> Candidate:
    """The largest candidate of at most `bits` a weight, or the smallest there is."""
    most = bits * site.parameters / 8
    return max((c for c in known if c.cost.stored <= most), key=lambda c: c.cost.stored, default=known[0])


def measured(opened: Study, held: Outputs, variant: Variant, limits: Limits) -> dict[str, Any]:
    try:
        choices = chosen(opened, variant, limits)
    except UnreachableBudget as error:
        return {"lever": variant.name, "note": str(error)}
    module = opened.model.module
    kept = []
    try:
        for site, choice in zip(opened.sites, choices, strict=True):
            if choice.form == "untouched":
                continue
            parameter = site.parameter(module)
            observed = opened.run.has_tensors(file_of(site, "fit"))
            metrics = metrics_for(opened, site, variant.metric if observed else "kronecker")
            if variant.shrunk:
                choice = replace(choice, setting={**choice.setting, "enlarged": False})
            fit = fit_choice(site.matrices(module), metrics, choice)
            kept.append((parameter, parameter.data))
            parameter.data = site.to_parameter(fit.matrices()).to(parameter.data).contiguous()
        found = mean_estimate(held.divergences())
    finally:
        for parameter, data in kept:
            parameter.data = data
    layout = Layout.from_json(opened.run.get("layout"))
    stored = layout.file_bytes([c for c in choices if c.form != "untouched"])
    return {"lever": variant.name, "stored": stored, "divergence": asdict(found)}


FAMILIES = {"at rest": (AT_REST, "stored"), "resident": (IN_MEMORY, "resident")}


def rows_of(opened: Study, held: Outputs, budget: int, families: Sequence[str]) -> Iterator[dict[str, Any]]:
    for family in families:
        (variants, resource), base = FAMILIES[family], None
        limits = Limits(**{resource: budget})
        for variant in variants:
            row = {"family": family, **measured(opened, held, variant, limits)}
            if "divergence" in row:
                base = base or row["divergence"]["value"]
                row["times"] = row["divergence"]["value"] / base
            yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=NAMES)
    parser.add_argument("--run", type=Path, default=None)
    parser.add_argument("--family", choices=FAMILIES, default=None, help="one of the two alone; default: both")
    parser.add_argument("--every", type=int, default=None, help="touch one weight that is no table in so many")
    given = parser.parse_args()
    known = reference(given.model)
    touched = {}
    if given.every:
        sites = [site.name for site in walk(known.open().module).sites if site.kind != "table"]
        touched = {"include": sites[:: given.every]}
    opened = known.study(given.run or Path(tempfile.mkdtemp()), forms=EVERY, **touched)
    sizes = (known.held_out_samples // 2, known.sequence_length, known.batch_size)
    held = Outputs(opened.model, opened.model.batches(known.held_out, *sizes, seed=0))
    share = known.budgets[len(known.budgets) // 2]
    weights = sum(site.nbytes for site in opened.sites) if given.every else opened.stored_bytes
    rest = opened.stored_bytes - weights
    budget = rest + int(float(share.rstrip("%")) / 100 * weights)
    RESULTS.mkdir(exist_ok=True)
    target = RESULTS / f"ablation-{given.model}.json"
    rows = []
    for row in rows_of(opened, held, budget, [given.family] if given.family else list(FAMILIES)):
        if "stored" in row:
            row["share"] = (row["stored"] - rest) / weights
        rows.append(row)
        value = row.get("divergence")
        shown = row["note"] if value is None else f"{value['value']:.5f} [{value['low']:.5f}, {value['high']:.5f}]"
        print(
            f"{row['family']:9} {row['lever']:40} {row.get('stored', 0):>11,} {shown} x {row.get('times', 0):.2f}",
            flush=True,
        )
        target.write_text(json.dumps({"budget": share, "every": given.every, "rows": rows}, indent=1))
    print(f"written to {target.name}")


if __name__ == "__main__":
    main()
