"""What shifting biases is worth: divergence of plans on held-out data without and with it, at the same bytes.

    python bench/recovery.py MODEL [--run DIR] [--budgets 20%,13%,9%]

At rest (all forms) and resident (those that decode nothing at load).
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from judging import Judge, mean_of, ratio_of
from models import NAMES, reference
from peers.ours import DRAWN, MENUS
from recovering import Recovery
from tersor.build.fits import fits_of
from tersor.build.interaction import applied
from tersor.models.files import write_text

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=NAMES)
    parser.add_argument("--run", type=Path)
    parser.add_argument("--budgets")
    given = parser.parse_args()
    known = reference(given.model)
    opened = known.study(given.run or Path(tempfile.mkdtemp()) / "run", forms=DRAWN)
    model, judge = opened.model, Judge.of(known, opened.model)
    recovery = Recovery(known, model)
    rows = []
    for budget in given.budgets.split(",") if given.budgets else known.budgets:
        for menu, forms in MENUS.items():
            plan = opened.plan(budget, forms=forms)
            for _ in fits_of(opened.run, model, opened.sites, plan.choices):
                pass
            with applied(opened.run, model, opened.sites, plan.choices):
                before = judge.divergences()
                with recovery.shifted():
                    after = judge.divergences()
            row = {"budget": budget, "forms": menu, "stored": plan.stored, "without": mean_of(before),
                   "with": mean_of(after), "ratio": ratio_of(after, before)}  # fmt: skip
            rows.append(row)
            print(
                f"{budget:>6} {menu:9} {row['without']['value']:.5f} -> {row['with']['value']:.5f}, ratio "
                "{value:.3f} [{low:.3f}, {high:.3f}]".format(**row["ratio"]),
                flush=True,
            )
    found = {"model": given.model, "layers": recovery.layers, "unit": model.divergence.unit, "rows": rows}
    write_text(RESULTS / f"recovery-{given.model}.json", json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
