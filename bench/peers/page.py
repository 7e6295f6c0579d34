"""Write docs/benchmarks.md and its plots from bench/results/peers-*.json: Tersor beside the peers.

python -m peers.page
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from peers.equal import FOUR_BITS, best_at, bits_of
from peers.plot import draw

NAMES = ("minilm", "babyllama", "pylm", "resnet56")
RESULTS = Path(__file__).parents[1] / "results"
TARGET = Path(__file__).parents[2] / "docs" / "benchmarks.md"
WAYS = (("whole", "at rest"), ("touched", "at rest"), ("whole", "resident"), ("touched", "resident"))
HEAD = """\
# Beside the peers

Tersor and the tools that one would pick instead, on the same models, calibrated on the same tensors in the same order,
judged by one judge on held-out data: `script/bench setup all`, then `script/bench peers`. Every peer ran at its own
defaults but for bits and groups, in an environment of the exact versions of `bench/peers/requirements`, and handed back
its dequantised weights with the bytes of what it stores for them: codes, scales, zeros, indices. Scales that it would
keep in 32 bits count as 16. What it leaves alone counts as it is in the original file, headers do not count.

`file` is the whole file as a share of the original, `bits` what is stored for each weight that the peer touched.
Divergence is KL in nats a token or class, 1 - cosine for the encoder, with 95 % bootstrap intervals. The last columns
are Tersor's divergence over the peer's, both measured: with a file of the same bytes, and with everything left alone
that the peer left alone, so at the same bytes of the same weights. *At rest* are plans of all forms; *resident* are
those of forms that need no decoding when they are loaded. Where a model has biases, Tersor shifts them at the end, on
some of the same tensors (`--recover`), which adds no byte. On MiniLM a plan of Tersor's stands for all peers of up to
3 % more bytes of the file, or 0.15 bits more for each weight touched, and the score is of every third pair. Seconds
are those of all processors for quantising alone. modelopt finds its scores once for all effective bits; every row
counts their seconds, the first alone their memory. Of tensorly-torch there is nothing for MiniLM: it took more than
half an hour a setting.
"""


def load() -> list[dict[str, Any]]:
    paths = [RESULTS / f"peers-{name}.json" for name in NAMES]
    return [json.loads(path.read_text(encoding="utf8")) for path in paths if path.exists()]


def model_table(found: dict[str, Any]) -> Iterator[str]:
    name, machine, ours = found["model"], found["machine"], found["tersor"]
    yield f"\n## {name}\n"
    yield (
        f"The original: {found['bytes']:,} bytes, {found['score_name']} {found['original']['value']:.2f}. Calibrated "
        f"on {found['samples']} samples, seed {found['seed']}; {machine['cores']} cores ({machine['cpu']}), "
        f"{machine['memory'] / 2**30:.0f} GiB.\n"
    )
    yield f"![{name}: divergence against stored bytes](assets/peers-{name}.svg)\n"
    yield (
        f"| tool | setting | file | bits | divergence | {found['score_name']} | at rest, same file | same weights "
        "| resident, same file | same weights | seconds | memory |"
    )
    yield "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    for row in found["rows"]:
        if "failed" in row:
            yield f"| {row['tool']} | {row['label']} | failed: {_plain(row['failed'])} | | | | | | | | | |"
            continue
        ratios = " | ".join(_ratio(row[what][menu]) for what, menu in WAYS)
        yield (
            f"| {row['tool']} | {row['label']} | {row['bytes'] / found['bytes']:.2%} | {bits_of(row):.2f} "
            f"| {_estimate(row['divergence'])} | {row['score']['value']:.2f} | {ratios} "
            f"| {row['cpu_seconds']:.0f} | {_memory(row)} |"
        )
    for job in ("study", "build"):
        what = "study, once for all budgets" if job == "study" else "plan, build and write"
        yield f"| **Tersor** | {what} | | | | | | | | | {ours[job]['cpu_seconds']:.0f} | {_memory(ours[job])} |"
    steps = ", ".join(f"{step} {seconds:.0f}" for step, seconds in ours["study"]["steps"].items() if seconds)
    yield f"\nWhere the study's {ours['study']['seconds']:.0f} seconds of wall time go: {steps}.\n"
    versions = {}
    for row in found["rows"]:
        versions[row["tool"]] = {**versions.get(row["tool"], {}), **row.get("versions", {})}
    listed = "; ".join(
        f"{tool}: " + ", ".join(f"{k} {v}" for k, v in known.items()) for tool, known in versions.items() if known
    )
    yield f"Versions: {listed}; Tersor {ours['version']}, source {ours['source']}.\n"


def sizes_table(found: dict[str, Any]) -> Iterator[str]:
    """Against the best peer at every peer's size."""
    name = found["model"]
    yield f"### {name}: against the best peer at each size\n"
    yield "The best peer at the same bytes of the whole file, every peer interpolated on its own curve.\n"
    yield "| file | best peer | its divergence | Tersor at rest | ratio | resident | ratio | the limit |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- |"
    for cell in against_best(found):
        ours = " | ".join(
            f"{cell[menu]:.3g} | {cell[menu] / cell['divergence']:.3f}" if cell[menu] is not None else "cannot | "
            for menu in ("at rest", "resident")
        )
        yield (
            f"| {cell['bytes'] / found['bytes']:.2%} | {cell['tool']} | {cell['divergence']:.3g} | {ours} "
            f"| {cell['limit']:.3g} |"
        )


def against_best(found: dict[str, Any]) -> list[dict[str, Any]]:
    """A cell for every size of a peer's file, largest first: the best peer there and Tersor's measured divergences."""
    cells: dict[int, dict[str, Any]] = {}
    known = [row for row in found["rows"] if "failed" not in row]
    for row in sorted(known, key=lambda r: -r["bytes"]):
        tool, divergence = best_at(known, row["bytes"])
        ours = {menu: row["whole"][menu].get("divergence", {}).get("value") for menu in ("at rest", "resident")}
        cells[row["bytes"]] = {
            "bytes": row["bytes"], "bits": bits_of(row), "tool": tool, "divergence": divergence, **ours,
            "limit": row["whole"]["limit"],
        }  # fmt: skip
    return list(cells.values())


def lowrank_table(found: dict[str, Any]) -> Iterator[str]:
    name = found["model"]
    if not found["low_rank"]:
        return
    yield f"\n### {name}: low rank\n"
    yield (
        "Published recipes without a maintained tool, fitted here: the same share of bytes for every site in 16-bit "
        "factors. Beside them Tersor at the same bytes of the file.\n"
    )
    yield f"| recipe | file | divergence | {found['score_name']} | Tersor at rest | resident |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for row in found["low_rank"]:
        if "failed" in row:
            continue
        ours = " | ".join(
            f"{row['whole'][menu]['divergence']['value']:.3g}" if "divergence" in row["whole"][menu] else "cannot"
            for menu in ("at rest", "resident")
        )
        yield (
            f"| {row['tool']} | {row['bytes'] / found['bytes']:.2%} | {_estimate(row['divergence'])} "
            f"| {row['score']['value']:.2f} | {ours} |"
        )


def summary(results: list[dict[str, Any]]) -> Iterator[str]:
    yield "\n## In short\n"
    yield (
        "Tersor's divergence over the peer's. `best`: over the best peer's at every size of a peer's file. Small files "
        f"are those of at most {FOUR_BITS} bits a touched weight as stored: 4 bits with their scales.\n"
    )
    yield "| model | compared | forms | cells | largest | median | median of small files | above 1 |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- |"
    every: dict[tuple[str, str], list[tuple[float, bool]]] = {}
    for found in results:
        for what, menu, cells in _comparisons(found):
            every.setdefault((what, menu), []).extend(cells)
            yield _summary_row(found["model"], what, menu, cells)
    if len(results) > 1:
        for (what, menu), cells in every.items():
            yield _summary_row("**all**", what, menu, cells)
    short = [line for found in results for line in _short(found)]
    yield "\nCells that fall short:\n" if short else "\nNo cell falls short."
    yield from short


def _comparisons(found: dict[str, Any]) -> Iterator[tuple[str, str, list[tuple[float, bool]]]]:
    """(what is compared, forms, (ratio, whether the file is small) of every cell)."""
    known = [row for row in found["rows"] if "failed" not in row]
    for menu in ("at rest", "resident"):
        best = [c for c in against_best(found) if c[menu] is not None]
        yield "best, same file", menu, [(c[menu] / c["divergence"], c["bits"] <= FOUR_BITS) for c in best]
        for what, title in (("whole", "each, same file"), ("touched", "each, same weights")):
            rows = [row for row in known if "ratio" in row[what][menu]]
            yield title, menu, [(row[what][menu]["ratio"]["value"], bits_of(row) <= FOUR_BITS) for row in rows]


def _summary_row(name: str, what: str, menu: str, cells: list[tuple[float, bool]]) -> str:
    ratios, small = [ratio for ratio, _ in cells], [ratio for ratio, is_small in cells if is_small]
    middle = f"{median(small):.3f}" if small else ""
    above = sum(ratio > 1 for ratio in ratios)
    return (
        f"| {name} | {what} | {menu} | {len(cells)} | {max(ratios):.3f} | {median(ratios):.3f} | {middle} | {above} |"
    )


def _short(found: dict[str, Any]) -> Iterator[str]:
    """A line for every cell in which a peer does less damage, or that Tersor cannot reach."""
    for cell in against_best(found):
        for menu in ("at rest", "resident"):
            if cell[menu] is not None and cell[menu] > cell["divergence"]:
                yield (
                    f"- {found['model']}, a file of {cell['bytes'] / found['bytes']:.2%}, {menu}, against the best "
                    f"peer there, {cell['tool']}: {cell[menu] / cell['divergence']:.2f}."
                )
    for row in found["rows"]:
        if "failed" in row:
            continue
        for what, menu in WAYS:
            cell = row[what][menu]
            where = f"- {found['model']}, {row['tool']} {row['label']}, {menu}, same {WHAT[what]}"
            if "ratio" not in cell:
                yield f"{where}: {_plain(cell['note'])}"
            elif cell["ratio"]["value"] > 1:
                yield f"{where}: {cell['ratio']['value']:.2f}. {_reason(cell, what)}"


WHAT = {"whole": "file", "touched": "weights"}


def _reason(cell: dict[str, Any], what: str) -> str:
    """What the figures themselves say of a cell that falls short."""
    predicted, measured, left = cell["predicted"], cell["divergence"]["value"], cell["forms"].get("untouched", 0)
    if what == "whole" and left:
        return f"The plan has bytes to leave {left} sites as they are: finer settings of its forms are lacking."
    if measured > 1.5 * predicted:
        return f"The plan was predicted to lose {predicted:.3g} and loses {measured:.3g}."
    return f"The plan loses {measured:.3g}, as predicted ({predicted:.3g}): its forms themselves are behind."


def _ratio(cell: dict[str, Any]) -> str:
    if "ratio" not in cell:
        return "cannot"
    value = cell["ratio"]["value"]
    return f"{value:.3f}" if value >= 0.001 else f"{value:.1g}"


def _estimate(found: dict[str, float]) -> str:
    return "{value:.3g} [{low:.3g}, {high:.3g}]".format(**found)


def _memory(row: dict[str, Any]) -> str:
    return f"{row['peak_memory'] / 2**20:,.0f} MiB"


def _plain(text: str) -> str:
    return text.replace("|", "/").replace("\n", " ")


def write() -> None:
    """Write the page and a plot for every model that has results."""
    results = load()
    lines = [HEAD.rstrip()]
    for found in results:
        draw(found, TARGET.parent / "assets" / f"peers-{found['model']}.svg")
        for part in (model_table, sizes_table, lowrank_table):
            lines += part(found)
    lines += summary(results)
    TARGET.write_text("\n".join(lines) + "\n", encoding="utf8")


if __name__ == "__main__":
    write()
    print(f"written to {TARGET.name}")
