"""Write docs/figures.md from the results in bench/results: what was measured, and the commands that repeat it.

python bench/figures.py
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from models import NAMES

RESULTS = Path(__file__).parent / "results"
TARGET = Path(__file__).parents[1] / "docs" / "figures.md"
SCORES = {"minilm": "STS-B Spearman x 100", "babyllama": "perplexity", "pylm": "perplexity", "resnet56": "top-1 %"}
HEAD = """\
# Figures

Measured on two cores, each table in one run with its rivals. The models: all-MiniLM-L6-v2 (a sentence encoder),
BabyLlama and PyLM (language models of 0.9 and 4.6 M parameters), ResNet-56 for CIFAR-10. Shares are of the
original's weights file, everything counted, tables included. Divergence is on held-out data: KL in nats a token or
class, 1 - cosine for the encoder. Brackets are 95 % bootstrap intervals. Baselines put one setting at every site,
tables included, the largest that fits.
"""


def budget_table(found: dict[str, Any]) -> Iterator[str]:
    name = found["model"]
    yield f"\n## {name}: budgets\n"
    yield f"`script/bench budgets {name}`. The original: {SCORES[name]} {found['original']:.2f}.\n"
    yield f"| budget | tool | share | divergence | predicted | limit | {SCORES[name]} |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for cell in found["cells"]:
        for row in cell["rows"]:
            if row["bytes"] is None:
                yield f"| {cell['budget']} | {row['tool']} | cannot; {row['note']} | | | | |"
                continue
            d, s = row["divergence"], row["score"]
            tool = f"{row['tool']}, {row['setting']}" if "setting" in row else f"**{row['tool']}**"
            predicted = f"{row['predicted']:.4f}" if "predicted" in row else ""
            least = f"{row['limit']:.4f}" if row.get("limit") else ""
            yield (
                f"| {cell['budget']} | {tool} | {row['bytes'] / found['bytes']:.2%} | {d['value']:.4f} "
                f"[{d['low']:.4f}, {d['high']:.4f}] | {predicted} | {least} | {s['value']:.2f} "
                f"[{s['low']:.2f}, {s['high']:.2f}] |"
            )


def prediction_table(name: str, found: dict[str, Any]) -> Iterator[str]:
    rows = [r for r in found["single"] if r["measured"] > 1e-9]
    yield f"\n## {name}: predicted against measured\n"
    yield f"`script/bench prediction {name}`. {len(rows)} candidates at single sites; ratio: measured / predicted.\n"
    yield "| metric | rank correlation | median ratio | quartiles | int | lowrank | int+lowrank |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for kind in rows[0]["predicted"]:
        measured = np.array([r["measured"] for r in rows])
        predicted = np.array([r["predicted"][kind] for r in rows])
        ratio = measured / np.maximum(predicted, 1e-30)
        low, middle, high = np.percentile(ratio, (25, 50, 75))
        by_form = [np.median(ratio[[r["form"] == form for r in rows]]) for form in ("int", "lowrank", "int+lowrank")]
        yield (
            f"| {kind} | {spearmanr(measured, predicted).statistic:.3f} | {middle:.2f} | {low:.2f} .. {high:.2f} | "
            + " | ".join(f"{v:.2f}" for v in by_form)
            + " |"
        )
    yield "\nWhole plans:\n"
    yield "| budget | bytes | predicted | measured | ratio |"
    yield "| --- | --- | --- | --- | --- |"
    for p in found["plans"]:
        ratio = p["measured"] / p["predicted"]
        yield f"| {p['budget']} | {p['bytes']:,} | {p['predicted']:.5f} | {p['measured']:.5f} | {ratio:.2f} |"


def main() -> None:
    lines = [HEAD.rstrip()]
    for name in NAMES:
        for kind in ("budgets", "prediction"):
            path = RESULTS / f"{kind}-{name}.json"
            if path.exists():
                found = json.loads(path.read_text(encoding="utf8"))
                lines += budget_table(found) if kind == "budgets" else prediction_table(name, found)
    TARGET.write_text("\n".join(lines) + "\n", encoding="utf8")
    print(f"written to {TARGET.name}")


if __name__ == "__main__":
    main()
