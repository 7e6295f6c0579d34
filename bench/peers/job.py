"""Tersor's own job, timed in a process of its own: the study of a model, then one plan built and written.

    python -m peers.job study MODEL RUN TARGET SAMPLES
    python -m peers.job build MODEL RUN TARGET STORED_BYTES

Whoever starts it watches its memory, that of its workers included.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

from models import reference
from peers.ours import DRAWN
from tersor.models.files import write_text
from tersor.plan import Limits
from tersor.steps import build_plan, open_study


def main() -> None:
    job, name, run, target, number = sys.argv[1:]
    known = reference(name)
    found: dict[str, Any]
    opened = None if job == "study" else open_study(known.open(), run)
    before, start = _cpu_seconds(), time.perf_counter()
    if opened is None:
        opened = known.study(Path(run), int(number), forms=DRAWN)
        steps = ("observe", "damping", "limit", "draw", "probe")
        found = {"steps": {step: opened.run.get(f"seconds/{step}") for step in steps}}
    else:
        plan = opened.plan_within(Limits(stored=int(number)))
        build_plan(opened, plan, Path(target).with_suffix(""))
        found = {"bytes": plan.stored}
    found |= {"seconds": time.perf_counter() - start, "cpu_seconds": _cpu_seconds() - before}
    write_text(Path(target), json.dumps(found, indent=1))


def _cpu_seconds() -> float:
    """Seconds of all processors so far, those of workers that have ended included."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


if __name__ == "__main__":
    main()
