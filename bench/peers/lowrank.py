"""The published low-rank recipes as rivals: no maintained tool has them, so they are fitted by Tersor's own parts.

Each gives every site the same share of its bytes, in 16-bit factors, as large as fits the bytes of the whole file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from budgets import choices_of, measure_uniform
from judging import Judge
from tersor.build.layout import Layout
from tersor.steps import Study

# The metric of each: how errors are weighed when the singular values are cut.
RECIPES = {
    "plain SVD": "identity",
    "FWSVD": "fisher-input",
    "ASVD": "input-diagonal",
    "SVD-LLM whitening, DRONE": "input",
}
SHARES = [{"share": share / 200} for share in range(200, 2, -1)]


def rows_at(opened: Study, judge: Judge, sizes: list[int], folder: Path) -> Iterator[dict[str, Any]]:
    """A row for every recipe at every size of the whole file that it can reach."""
    if not sizes:
        return
    layout = Layout.from_json(opened.run.get("layout"))
    ladder = [choices_of(opened, "lowrank", values) for values in SHARES]
    known = [
        (layout.file_bytes(choices), values["share"], choices) for values, choices in zip(SHARES, ladder, strict=True)
    ]
    for tool, metric in RECIPES.items():
        for size in sizes:
            fitting = [entry for entry in known if entry[0] <= size]
            if not fitting:
                yield {
                    "tool": tool,
                    "label": f"{size:,} bytes",
                    "failed": f"its smallest file is {known[-1][0]:,} bytes",
                }
                continue
            stored, share, choices = max(fitting, key=lambda entry: entry[0])
            kept = folder / f"lowrank-{metric}-{stored}.json"
            if not kept.exists():
                row = {"tool": tool, "label": f"share {share:.1%}", "bytes": stored}
                row |= measure_uniform(opened, judge, metric, choices)
                kept.parent.mkdir(parents=True, exist_ok=True)
                kept.write_text(json.dumps(row), encoding="utf8")
            yield json.loads(kept.read_text(encoding="utf8"))
