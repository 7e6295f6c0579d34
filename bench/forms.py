"""Every form at single sites of a model at equal bytes: the share of a weight's effect that is lost.

    python bench/forms.py MODEL [--run DIR] [--sites NAME,NAME] [--forms int,coded]

A form's figure at some bits a weight is that of the best of its ladder that takes no more, over the distance of the
weight from zero, under the damped metric of the study. Without --sites the sites in the middle of the model of the two
commonest shapes are taken.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from models import NAMES, reference
from tersor.curves.draw import site_metrics
from tersor.forms import FORMS
from tersor.steps import Study

RESULTS = Path(__file__).parent / "results"
BITS = (1.0, 1.5, 2.05, 2.5, 3.0, 4.3, 6.0, 8.0)


def usual_sites(opened: Study) -> list[str]:
    """The sites in the middle of the model of its two commonest shapes, tables left out."""
    sites = [site for site in opened.sites if site.kind != "table"]
    shapes = [shape for shape, _ in Counter(site.parameter_shape for site in sites).most_common(2)]
    groups = ([s.name for s in sites if s.parameter_shape == shape] for shape in shapes)
    return [group[len(group) // 2] for group in groups]


def lost(opened: Study, name: str, forms: list[str]) -> dict[str, Any]:
    """Of every form the least share of the weight's effect lost at each of `BITS`, None where nothing is so small."""
    site = next(s for s in opened.sites if s.name == name)
    weight, metric = site.matrices(opened.model.module)[0].float(), site_metrics(opened.run, site)[0]
    whole, entries = metric.distance(weight), weight.numel()
    print(f"{name} {tuple(weight.shape)}")
    rows: dict[str, Any] = {}
    for form in forms:
        start = time.process_time()
        curve = [(8 * c.cost.stored / entries, c.divergence / whole) for c in FORMS[form].curve(weight, metric)]
        rows[form] = [min((d for b, d in curve if b <= bits), default=None) for bits in BITS]
        shown = " ".join(f"{'' if d is None else f'{d:.5f}':>8}" for d in rows[form])
        print(f"  {form:15} {shown}  {time.process_time() - start:5.1f} s", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=NAMES)
    parser.add_argument("--run", type=Path, default=None)
    parser.add_argument("--sites", default=None)
    parser.add_argument("--forms", default=",".join(FORMS))
    given = parser.parse_args()
    opened = reference(given.model).study(given.run or Path(tempfile.mkdtemp()))
    names = given.sites.split(",") if given.sites else usual_sites(opened)
    print("bits a weight: " + ", ".join(map(str, BITS)))
    found = {name: lost(opened, name, given.forms.split(",")) for name in names}
    target = RESULTS / f"forms-{given.model}.json"
    target.write_text(json.dumps({"bits": BITS, "lost": found}, indent=1), encoding="utf8")
    print(f"written to {target.name}")


if __name__ == "__main__":
    main()
