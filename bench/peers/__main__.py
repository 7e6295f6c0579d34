"""Run the peers and Tersor on reference models, and write bench/results/peers-MODEL.json and docs/benchmarks.md.

    script/bench peers [--models babyllama,pylm] [--tools hqq,llmcompressor] [--no-low-rank] [--again]

What was run before with the same versions is not run again, but what failed is with --again. Scratch is bench/.peers.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tersor
from models import NAMES
from peers import lowrank, page
from peers.ours import Ours, source_digest
from peers.processes import watched
from peers.running import divergences_of, row_of
from peers.settings import settings_of
from peers.setup import PEERS
from peers.subject import Subject, open_subject
from tersor.models.files import write_text
from tersor.steps import open_study

SCRATCH = Path(__file__).parents[1] / ".peers"
RESULTS = Path(__file__).parents[1] / "results"
NOMINAL = (8, 4, 3, 2)
DAY = 86400


def machine() -> dict[str, Any]:
    """The processor, its cores and the memory of this machine."""
    model = next(
        (line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), ""
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {"cpu": model or platform.processor(), "cores": os.cpu_count(), "memory": memory}


def _lines(path: str) -> list[str]:
    return Path(path).read_text(encoding="utf8").splitlines() if Path(path).exists() else []


def peers_of(subject: Subject, tools: tuple[str, ...], again: bool) -> Iterator[dict[str, Any]]:
    for peer in tools:
        for setting in settings_of(peer, subject.name):
            row = row_of(subject, peer, setting, again)
            print(shown(row, subject.file_bytes), flush=True)
            yield row


def shown(row: dict[str, Any], file_bytes: int) -> str:
    name = f"  {row['tool']:14} {row['label']:28}"
    if "failed" in row:
        return f"{name} failed: {row['failed']}"
    d, s = row["divergence"], row["score"]
    figures = f"{row['bytes'] / file_bytes:7.2%} {d['value']:.5f} [{d['low']:.5f}, {d['high']:.5f}] {s['value']:8.3f}"
    return f"{name} {figures}  {row['seconds']:.0f} s" if "seconds" in row else f"{name} {figures}"


def ours_of(subject: Subject, rows: list[dict[str, Any]], run: Path) -> tuple[Ours, dict[str, Any]]:
    """Tersor's study and a build at the size of the peers' 4 bits, each timed in a process of its own, once."""
    sizes = sorted(row["bytes"] for row in rows if "bytes" in row and row["setting"].get("bits") == 4)
    stored = sizes[len(sizes) // 2] if sizes else subject.file_bytes // 6
    spent = {}
    for job, number in (("study", subject.samples), ("build", stored)):
        target = run.with_name(f"{run.name}-{job}.json")
        if not target.exists():
            command = [sys.executable, "-m", "peers.job", job, subject.name, str(run), str(target), str(number)]
            code, peak = watched(command, Path(__file__).parents[1], os.environ, None, DAY)
            if code != 0:
                sys.exit(f"The {job} of {subject.name} failed.")
            found = json.loads(target.read_text(encoding="utf8"))
            write_text(target, json.dumps({**found, "peak_memory": peak}))
        spent[job] = json.loads(target.read_text(encoding="utf8"))
    return Ours(subject, open_study(subject.model, run), run.with_name(f"{run.name}-cells")), spent


def measured(name: str, tools: tuple[str, ...], samples: int | None, again: bool, low_rank: bool) -> dict[str, Any]:
    """All rows of a model, those of the low-rank recipes where asked for."""
    subject = open_subject(name, SCRATCH / name, samples)
    original, digest = subject.judge.score(), source_digest()
    print(f"{name}: {subject.file_bytes:,} bytes, {subject.known.score_name} {original['value']:.3f}", flush=True)
    rows = list(peers_of(subject, tools, again))
    ours, job = ours_of(subject, rows, subject.scratch / f"run-{digest}-{subject.fingerprint}")
    print(f"  Tersor: study {job['study']['seconds']:.0f} s, build {job['build']['seconds']:.0f} s", flush=True)
    for row in sorted((row for row in rows if "failed" not in row), key=lambda row: row["bytes"]):
        others = divergences_of(subject, row)
        names = row.pop("touched")
        row |= {"parameters": len(names), "whole": ours.beside(row["bytes"], None, others)}
        row["touched"] = ours.beside(row["bytes"], names, others)
        print(beside(row), flush=True)
    for row in rows:
        row.pop("folder", None)
    nearest = (_nearest(rows, subject.file_bytes, bits) for bits in NOMINAL if low_rank)
    sizes, recipes = [size for size in nearest if size is not None], []
    for row in lowrank.rows_at(ours.opened, subject.judge, sizes, ours.folder):
        if "failed" not in row:
            size = ours.standing_for(row["bytes"], None)
            row["whole"] = {menu: ours.measured(size, menu, None)[0] for menu in ("at rest", "resident")}
        print(shown(row, subject.file_bytes), flush=True)
        recipes.append(row)
    return {
        "model": name, "bytes": subject.file_bytes, "score_name": subject.known.score_name, "original": original,
        "divergence_unit": subject.model.divergence.unit, "seed": 0, "samples": subject.samples,
        "calibration": subject.fingerprint, "machine": machine(),
        "tersor": {"version": tersor.__version__, "source": digest, **job}, "rows": rows, "low_rank": recipes,
    }  # fmt: skip


def _nearest(rows: list[dict[str, Any]], file_bytes: int, bits: int) -> int | None:
    """The median size of the peers' files at so many bits."""
    sizes = sorted(r["bytes"] for r in rows if "bytes" in r and r["setting"].get("bits") == bits)
    return sizes[len(sizes) // 2] if sizes else None


def beside(row: dict[str, Any]) -> str:
    """The ratios of Tersor's divergences to a peer's, on a line."""
    parts = []
    for what in ("whole", "touched"):
        for menu in ("at rest", "resident"):
            cell = row[what][menu]
            parts.append(f"{what} {menu} " + (f"{cell['ratio']['value']:.3f}" if "ratio" in cell else "none"))
    return f"  {row['tool']:14} {row['label']:28} Tersor / peer: {', '.join(parts)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(NAMES))
    parser.add_argument("--tools", default=",".join(PEERS))
    parser.add_argument("--samples", type=int, default=None)
    parser.add_argument("--no-low-rank", action="store_true", help="leave out the published low-rank recipes")
    parser.add_argument("--again", action="store_true")
    given = parser.parse_args()
    for name in given.models.split(","):
        found = measured(name, tuple(given.tools.split(",")), given.samples, given.again, not given.no_low_rank)
        write_text(RESULTS / f"peers-{name}.json", json.dumps(found, indent=1) + "\n")
        print(f"written to peers-{name}.json", flush=True)
    page.write()
    print("written to docs/benchmarks.md")


if __name__ == "__main__":
    main()
