"""Tersor's plan beside uniform baselines at equal bytes, on one model: divergence and task score with intervals.

    python bench/budgets.py MODEL [--run DIR] [--forms int,lowrank,...]

Tersor's plan is from all forms (or those given), and beside it from the forms without entropy coding.
Baselines put one setting at every site, the largest that fits the budget: round-to-nearest, `feedback` (GPTQ-style,
under the input metric), two-sided feedback, plain SVD. Everything is fitted, measured and scored in this one run.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from judging import Judge
from models import NAMES, reference
from tersor.build.fits import fit_choice, fits_of
from tersor.build.interaction import applied
from tersor.build.layout import Layout
from tersor.curves.draw import UNUSED, identity_metric, site_metrics
from tersor.errors import UnreachableBudget
from tersor.forms import IntSetting, LowRankSetting, as_values, form_named
from tersor.metrics import Metric, Side
from tersor.models import Site
from tersor.observe.store import file_of
from tersor.plan import Choice
from tersor.steps import Study, limit_of

RESULTS = Path(__file__).parent / "results"
GROUPS = (32, 64, 128, None)
FIXED = ["int", "lowrank", "int+lowrank"]  # forms of which every code takes the same number of bits


def _integers(**fixed: Any) -> list[tuple[str, dict[str, Any]]]:
    return [
        ("int", as_values(IntSetting(bits, group, symmetric=symmetric, **fixed)))
        for bits in (8, 6, 5, 4, 3, 2)
        for group in GROUPS
        for symmetric in (False, True)
    ]


# Each baseline: the metric of its fits and its ladder, from which the largest that fits the budget is taken.
BASELINES = {
    "round to nearest": ("identity", _integers(rounding="nearest", search=False)),
    "feedback (GPTQ-style)": ("input", _integers(rounding="feedback")),
    "two-sided feedback": ("kronecker", _integers(rounding="two-sided")),
    "plain SVD": ("identity", [("lowrank", {"share": share / 100}) for share in range(100, 1, -1)]),
}


def choices_of(opened: Study, form: str, values: dict[str, Any]) -> list[Choice]:
    """The same setting at every site; sites that were not observed at 4 bits, as everywhere."""
    out = []
    for site in opened.sites:
        if not opened.run.has_tensors(file_of(site, "fit")):
            out.append(Choice(site.name, "int", as_values(UNUSED), UNUSED.label, 0, 0, 0, 0.0))
            continue
        known = values
        if "share" in values:  # 16-bit factors that take this share of the matrix in 16 bits
            rank = max(1, int(values["share"] * site.shape[0] * site.shape[1] / sum(site.shape)))
            known = as_values(LowRankSetting(rank))
        label = form_named(form).setting(known).label
        out.append(Choice(site.name, form, known, label, 0, 0, 0, 0.0))
    return out


def metrics_for(opened: Study, site: Site, kind: str) -> list[Metric]:
    if kind != "identity" or not opened.run.has_tensors(file_of(site, "fit")):
        return site_metrics(opened.run, site, None if kind == "kronecker" else kind)
    plain = identity_metric(site)
    return [Metric("identity", plain.rows, Side(plain.columns.moment), 1.0)] * site.stack


def measure_uniform(opened: Study, judge: Judge, kind: str, choices: list[Choice]) -> dict[str, Any]:
    module = opened.model.module
    kept = [(site.parameter(module), site.parameter(module).data) for site in opened.sites]
    fits = [
        fit_choice(s.matrices(module), metrics_for(opened, s, kind), c)
        for s, c in zip(opened.sites, choices, strict=True)
    ]
    try:
        for site, fit in zip(opened.sites, fits, strict=True):
            site.parameter(module).data = site.to_parameter(fit.matrices()).contiguous()
        return judge.measured()
    finally:
        for parameter, data in kept:
            parameter.data = data


def rows_at(
    opened: Study, judge: Judge, budget: str, forms: list[str] | None, kept: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """The rows of Tersor's plans and of all baselines at one budget; `kept` has what other budgets measured."""
    layout = Layout.from_json(opened.run.get("layout"))
    limit = int(float(budget.rstrip("%")) / 100 * opened.stored_bytes)
    bound = limit_of(opened.run)
    for tool, menu in (("Tersor", forms), ("Tersor, fixed rates", FIXED)):
        start = time.perf_counter()
        try:
            plan = opened.plan(budget, forms=menu)
        except UnreachableBudget as error:
            yield {"tool": tool, "bytes": None, "note": str(error)}
            continue
        for _ in fits_of(opened.run, opened.model, opened.sites, plan.choices):
            pass
        seconds = time.perf_counter() - start
        with applied(opened.run, opened.model, opened.sites, plan.choices):
            found = judge.measured()
        least = None if bound is None else bound.divergence(plan.stored)
        row = {"tool": tool, "bytes": plan.stored, "predicted": plan.divergence, "limit": least, "seconds": seconds}
        yield {**row, **found}
    for name, (kind, ladder) in BASELINES.items():
        if name not in kept:
            uniform = [choices_of(opened, form, values) for form, values in ladder]
            kept[name] = [(layout.file_bytes(choices), choices) for choices in uniform]
        fitting = [entry for entry in kept[name] if entry[0] <= limit]
        if not fitting:
            least = min(size for size, _ in kept[name])
            yield {"tool": name, "bytes": None, "note": f"smallest is {least / opened.stored_bytes:.1%}"}
            continue
        size, choices = max(fitting, key=lambda entry: entry[0])
        key = f"{name} {size}"
        if key not in kept:
            kept[key] = measure_uniform(opened, judge, kind, choices)
        yield {"tool": name, "bytes": size, "setting": choices[1].label, **kept[key]}


def shown(row: dict[str, Any], stored: int) -> str:
    if row["bytes"] is None:
        return f"  {row['tool']:24} cannot: {row['note']}"
    d, s = row["divergence"], row["score"]
    predicted = (
        f" predicted {row['predicted']:.4f} limit {row['limit'] or 0:.4f}"
        if "predicted" in row
        else f" {row.get('setting', '')}"
    )
    return (
        f"  {row['tool']:24} {row['bytes']:>11,} {row['bytes'] / stored:7.2%}  {d['value']:.5f} "
        f"[{d['low']:.5f}, {d['high']:.5f}]  {s['value']:8.3f} [{s['low']:.3f}, {s['high']:.3f}]{predicted}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=NAMES)
    parser.add_argument("--run", type=Path, default=None)
    parser.add_argument("--samples", type=int, default=None)
    parser.add_argument("--forms", default=None)
    given = parser.parse_args()
    known = reference(given.model)
    run = given.run or Path(tempfile.mkdtemp())
    start = time.perf_counter()
    opened = known.study(run, given.samples)
    print(f"{known.name}: {opened.stored_bytes:,} bytes, study {time.perf_counter() - start:.0f} s", flush=True)
    judge = Judge.of(known, opened.model)
    original = judge.score()["value"]
    print(f"  original: {known.score_name} {original:.3f}", flush=True)
    cells: list[dict[str, Any]] = []
    kept: dict[str, Any] = {}
    forms = None if given.forms is None else given.forms.split(",")
    for budget in known.budgets:
        print(f"{budget}: bytes, share, divergence, {known.score_name}")
        try:
            rows = []
            for row in rows_at(opened, judge, budget, forms, kept):
                print(shown(row, opened.stored_bytes), flush=True)
                rows.append(row)
        except UnreachableBudget as error:
            print(f"  {error}")
            continue
        cells.append({"budget": budget, "rows": rows})
        others = [r["divergence"]["value"] for r in rows[2:] if r["bytes"] is not None]
        if others and rows[0]["bytes"] is not None:
            print(f"  against the best uniform one: {rows[0]['divergence']['value'] / min(others) - 1:+.0%} divergence")
    RESULTS.mkdir(exist_ok=True)
    target = RESULTS / f"budgets-{known.name}.json"
    target.write_text(
        json.dumps({"model": known.name, "bytes": opened.stored_bytes, "original": original, "cells": cells}, indent=1)
    )
    print(f"written to {target.name}")


if __name__ == "__main__":
    main()
