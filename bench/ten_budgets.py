"""What ten budgets cost after one study, beside one: study, plan, build and write, each timed in this one run.

python bench/ten_budgets.py MODEL
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np

from models import NAMES, reference
from tersor.steps import build_plan, open_study


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=NAMES)
    known = reference(parser.parse_args().model)
    folder = Path(tempfile.mkdtemp())
    largest, smallest = float(known.budgets[0].rstrip("%")), float(known.budgets[-1].rstrip("%"))
    budgets = [f"{b:.2f}%" for b in np.geomspace(largest, smallest, 10)]
    start = time.perf_counter()
    known.study(folder / "run")
    studied = time.perf_counter() - start
    print(f"study {studied:.1f} s", flush=True)
    times = []
    for number, budget in enumerate(budgets):
        start = time.perf_counter()
        opened = open_study(known.open(), folder / "run")
        build_plan(opened, opened.plan(budget), folder / f"out{number}")
        times.append(time.perf_counter() - start)
        print(f"{budget:>7} plan, build and write {times[-1]:.1f} s", flush=True)
    one, ten = studied + times[0], studied + sum(times)
    print(f"{known.name}: one budget {one:.1f} s, ten budgets {ten:.1f} s, ratio {ten / one:.2f}")


if __name__ == "__main__":
    main()
