"""Predicted against measured divergence: single sites under five metrics, and whole plans over ten budgets.

    python bench/prediction.py MODEL [--candidates 72] [--run DIR]

Every candidate is fitted once under the kronecker metric; each metric then predicts its divergence, and the model with
that one weight replaced is measured on held-out data. `kronecker + gain` uses one probe a site, of coded integers, `by
form` one a form besides.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr

from models import NAMES, reference
from tersor.build.fits import fit_choice, fits_of
from tersor.build.interaction import applied
from tersor.curves.draw import site_metrics
from tersor.forms import as_values
from tersor.metrics import KINDS
from tersor.models.compare import Reference, substituted
from tersor.observe import load_metrics
from tersor.observe.store import file_of
from tersor.plan import Choice
from tersor.steps import Study

RESULTS = Path(__file__).parent / "results"


def single_sites(opened: Study, held: Reference, count: int, seed: int = 0) -> list[dict[str, object]]:
    """Measure `count` candidates spread over sites and forms, under a fifth of the weight's bytes."""
    generator = np.random.default_rng(seed)
    sites = [s for s in opened.sites if opened.run.has_tensors(file_of(s, "fit"))]
    forms = sorted({c.form for s in sites for c in opened.run.candidates(s.name)})
    rows: list[dict[str, object]] = []
    order = generator.permutation(len(sites))
    for number in range(count):
        site, form = sites[order[number % len(sites)]], forms[number % len(forms)]
        known = [c for c in opened.run.candidates(site.name) if c.form == form and c.cost.stored < site.nbytes / 5]
        if not known:
            continue
        candidate = known[generator.integers(len(known))]
        choice = Choice(site.name, form, as_values(candidate.setting), candidate.setting.label, 0, 0, 0, 0.0)
        weights = site.matrices(opened.model.module)
        new = fit_choice(weights, site_metrics(opened.run, site), choice).matrices()
        with substituted(opened.model, site, new):
            measured = held.divergence()
        predicted = {
            kind: sum(
                m.distance(w - n) for m, w, n in zip(load_metrics(opened.run, site, kind), weights, new, strict=True)
            )
            for kind in KINDS
        }
        gains, damage = opened.run.gains(site.name), predicted["kronecker"]
        predicted["kronecker + gain"] = damage * gains.of("coded")
        predicted["kronecker + gain by form"] = damage * gains.of(form, damage)
        rows.append(
            {"site": site.name, "form": form, "label": choice.label, "measured": measured, "predicted": predicted}
        )
    return rows


def summarise(rows: list[dict[str, object]]) -> None:
    """Rank correlation, median ratio and quartiles of measured / predicted, by metric and form."""
    print(f"{'metric':24} {'form':14} {'n':>4} {'rank corr.':>10} {'median':>8} {'quartiles':>16}")
    for kind in (*KINDS, "kronecker + gain", "kronecker + gain by form"):
        for form in ("all", *sorted({str(r["form"]) for r in rows})):
            chosen = [r for r in rows if form in ("all", r["form"]) and r["measured"] > 1e-9]  # type: ignore[operator]
            measured = np.array([r["measured"] for r in chosen], dtype=float)
            predicted = np.array([r["predicted"][kind] for r in chosen])  # type: ignore[index]
            ratio = measured / np.maximum(predicted, 1e-30)
            low, middle, high = np.percentile(ratio, (25, 50, 75))
            print(
                f"{kind:24} {form:14} {len(chosen):4} {spearmanr(measured, predicted).statistic:10.3f} {middle:8.3f} "
                f"{low:7.3f} .. {high:6.3f}"
            )


def whole_plans(opened: Study, held: Reference, budgets: list[str]) -> list[dict[str, object]]:
    """Build plans in memory and measure them: predicted and measured divergence at each budget."""
    rows: list[dict[str, object]] = []
    for budget in budgets:
        plan = opened.plan(budget)
        measured = measure_choices(opened, held, plan.choices)
        rows.append({"budget": budget, "bytes": plan.stored, "predicted": plan.divergence, "measured": measured})
        print(f"{budget:>6} {plan.stored:>10,} predicted {plan.divergence:.5f} measured {measured:.5f} "
              f"ratio {measured / plan.divergence:.3f}", flush=True)  # fmt: skip
    return rows


def measure_choices(opened: Study, held: Reference, choices: tuple[Choice, ...]) -> float:
    """The divergence of the model with these choices in place; the model is put back afterwards."""
    for _ in fits_of(opened.run, opened.model, opened.sites, choices):
        pass
    with applied(opened.run, opened.model, opened.sites, choices):
        return held.divergence()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=NAMES)
    parser.add_argument("--candidates", type=int, default=72)
    parser.add_argument("--samples", type=int, default=None, help="held-out samples (half of those of budgets)")
    parser.add_argument("--run", type=Path, default=None)
    given = parser.parse_args()
    known = reference(given.model)
    run = given.run or Path(tempfile.mkdtemp())
    opened = known.study(run)
    samples = given.samples or known.held_out_samples // 2  # seventy candidates are measured, each on all of them
    batches = opened.model.batches(known.held_out, samples, known.sequence_length, known.batch_size, seed=0)
    held = Reference(opened.model, opened.model.compact(batches))
    rows = single_sites(opened, held, given.candidates)
    summarise(rows)
    smallest, largest = (float(b.rstrip("%")) for b in (known.budgets[-1], known.budgets[0]))
    budgets = [f"{b:.2f}%" for b in np.geomspace(largest * 1.3, smallest, 10)]
    plans = whole_plans(opened, held, budgets)
    RESULTS.mkdir(exist_ok=True)
    target = RESULTS / f"prediction-{given.model}.json"
    target.write_text(json.dumps({"samples": given.samples, "single": rows, "plans": plans}, indent=1))
    print(f"written to {target.name}")


if __name__ == "__main__":
    main()
