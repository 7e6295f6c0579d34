"""Plans of all forms beside those of each form alone, at five budgets: what mixing families is worth, measured.

    python bench/families.py MODEL [--run DIR] [--mixed-only]

The mixed plans are of a study as `compress` makes it under limits on bytes: every form at a few sites, elsewhere what
came near to the best there. The others, and what the mixed plans would be with everything drawn everywhere, are of a
second study, which is several times as long. Everything is fitted and measured in this one run.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from judging import Judge, mean_of
from models import NAMES, reference
from tersor.build.fits import fits_of
from tersor.build.interaction import applied
from tersor.errors import UnreachableBudget
from tersor.forms import FORMS
from tersor.plan import Plan
from tersor.steps import Study

RESULTS = Path(__file__).parent / "results"
FAMILIES = tuple(name for name in FORMS if name != "portable")  # which is `int` as exports can hold it


def measured(opened: Study, judge: Judge, plan: Plan) -> dict[str, Any]:
    """The bytes of a plan, its predicted and measured divergence, and how many sites have which form."""
    for _ in fits_of(opened.run, opened.model, opened.sites, plan.choices):
        pass
    with applied(opened.run, opened.model, opened.sites, plan.choices):
        divergence = mean_of(judge.divergences())
    used = Counter(choice.form for choice in plan.choices)
    return {"bytes": plan.stored, "predicted": plan.divergence, "divergence": divergence, "used": dict(used)}


def alone(opened: Study, judge: Judge, budget: str) -> Iterator[tuple[str, dict[str, Any] | None]]:
    """Every form's own plan at a budget, None where it cannot be so small."""
    for name in FAMILIES:
        try:
            plan = opened.plan(budget, forms=(name,))
        except UnreachableBudget:
            yield name, None
            continue
        yield name, measured(opened, judge, plan)


def shown(name: str, found: dict[str, Any] | None) -> str:
    if found is None:
        return f"  {name:16} cannot be so small"
    d, used = found["divergence"], ", ".join(f"{form} {count}" for form, count in sorted(found["used"].items()))
    return (
        f"  {name:16} {found['bytes']:>11,}  predicted {found['predicted']:.5f}  "
        f"{d['value']:.5f} [{d['low']:.5f}, {d['high']:.5f}]  {used}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=NAMES)
    parser.add_argument("--run", type=Path, default=None)
    parser.add_argument("--mixed-only", action="store_true")
    given = parser.parse_args()
    known, scratch = reference(given.model), given.run or Path(tempfile.mkdtemp())
    start = time.perf_counter()
    opened = known.study(scratch / "scouted", forms=FAMILIES, resources=("stored",))
    found: dict[str, Any] = {"model": known.name, "seconds": time.perf_counter() - start, "cells": []}
    found["drawn"] = {name: round(seconds) for name, seconds in opened.run.seconds_by_form().items()}
    print(f"{known.name}: study of {len(FAMILIES)} forms {found['seconds']:.0f} s", flush=True)
    judge = Judge.of(known, opened.model)
    for budget in known.budgets:
        cell = {"budget": budget, "mixed": measured(opened, judge, opened.plan(budget))}
        print(f"{budget}\n{shown('all forms', cell['mixed'])}", flush=True)
        found["cells"].append(cell)
    if not given.mixed_only:
        start = time.perf_counter()
        whole = known.study(scratch / "whole", forms=FAMILIES)
        found["whole_seconds"] = time.perf_counter() - start
        print(f"everything drawn everywhere {found['whole_seconds']:.0f} s", flush=True)
        judge = Judge.of(known, whole.model)
        for cell in found["cells"]:
            cell["whole_predicted"] = whole.plan(cell["budget"]).divergence
            ratio = cell["mixed"]["predicted"] / cell["whole_predicted"]
            print(f"{cell['budget']}: predicted {ratio:.4f} times what it is with everything drawn", flush=True)
            cell["alone"] = {}
            for name, row in alone(whole, judge, cell["budget"]):
                print(shown(name, row), flush=True)
                cell["alone"][name] = row
    target = RESULTS / f"families-{known.name}.json"
    target.write_text(json.dumps(found, indent=1), encoding="utf8")
    print(f"written to {target.name}")


if __name__ == "__main__":
    main()
