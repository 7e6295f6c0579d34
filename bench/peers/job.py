"""Tersor's own job, timed in a process of its own: the study of a model, then one plan built and written.

    python -m peers.job study MODEL RUN TARGET SAMPLES
    python -m peers.job build MODEL RUN TARGET STORED_BYTES

Memory is the most that this process held and the most that any of its workers did, of which there are as many as cores;
all of them at once is the most that it can have been.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

from models import reference
from tersor.models.files import write_text
from tersor.plan import Limits
from tersor.steps import build_plan, open_study


def main() -> None:
    job, name, run, target, number = sys.argv[1:]
    known = reference(name)
    found: dict[str, Any]
    opened = None if job == "study" else open_study(known.open(), run)
    before = _usage()[0]
    start = time.perf_counter()
    if opened is None:
        opened = known.study(Path(run), int(number))
        steps = ("observe", "damping", "limit", "draw", "probe")
        found = {"steps": {step: opened.run.get(f"seconds/{step}") for step in steps}}
    else:
        plan = opened.plan_within(Limits(stored=int(number)))
        build_plan(opened, plan, Path(target).with_suffix(""))
        found = {"bytes": plan.stored}
    seconds = time.perf_counter() - start
    cpu, own, worker = _usage()
    peak = own + (os.cpu_count() or 1) * worker
    found |= {"seconds": seconds, "cpu_seconds": cpu - before, "process": own, "worker": worker, "peak_memory": peak}
    write_text(Path(target), json.dumps(found, indent=1))


def _usage() -> tuple[float, int, int]:
    """Seconds of all processors so far, the most bytes that this process held, the most that a worker did."""
    own, workers = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    seconds = sum(usage.ru_utime + usage.ru_stime for usage in (own, workers))
    return seconds, own.ru_maxrss * 1024, workers.ru_maxrss * 1024


if __name__ == "__main__":
    main()
