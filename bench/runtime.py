"""Built models at run time beside their originals: bytes resident, most bytes at once, seconds to load, latency.

    python bench/runtime.py MODEL [--run DIR]

The plan of each form alone, and of all forms, at the third of the model's budgets; latency of one sample and of 32, the
two models in turn. Peaks are of one batch of 32.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import tersor
from models import NAMES, reference
from tersor.errors import UnreachableBudget
from tersor.judge.costs import latency, peak_bytes, resident_bytes
from tersor.models import Model
from tersor.steps import build_plan, open_study

RESULTS = Path(__file__).parent / "results"
FORMS = ("int", "coded", "lowrank", None)


def measured(original: Model, new: Model, batches: dict[int, Any]) -> dict[str, Any]:
    """Bytes and latencies of `new`, with the ratios to `original`."""
    found: dict[str, Any] = {"resident": resident_bytes(new.module) / resident_bytes(original.module)}
    peaks = [
        peak_bytes(lambda m=m: m.outputs(batches[32]), m.module, m.device)
        for m in (original, new)  # type: ignore[misc]
    ]
    found["peak"] = peaks[1] / peaks[0]
    for size, batch in batches.items():
        timed = latency(original, new, batch, rounds=15)
        found[f"latency {size}"] = timed.ratio
        found[f"seconds {size}"] = timed.new
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=NAMES)
    parser.add_argument("--run", type=Path, default=None)
    given = parser.parse_args()
    known, scratch = reference(given.model), Path(tempfile.mkdtemp())
    run = given.run or scratch / "run"
    known.study(run)
    rows = []
    for form in FORMS:
        opened, original = open_study(known.open(), run), known.open()
        batches = {size: original.batches(known.held_out, size, known.sequence_length, size)[0] for size in (1, 32)}
        try:
            plan = opened.plan(known.budgets[2], forms=None if form is None else (form,))
        except UnreachableBudget as error:
            print(f"{form}: {error}")
            continue
        out = scratch / str(form)
        build_plan(opened, plan, out)
        start = time.perf_counter()
        module = original.module if original.identity.kind == "module" else None
        opened.model.module = tersor.load(out, model=None if module is None else known.open().module)
        seconds = time.perf_counter() - start
        row = {"forms": form or "all", "bytes": plan.stored / opened.stored_bytes, "load": seconds}
        row |= measured(original, opened.model, batches)
        rows.append(row)
        print(", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"runtime-{known.name}.json").write_text(json.dumps({"model": known.name, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
