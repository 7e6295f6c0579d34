"""Run claim scripts, each in a process of its own, keep what they hand over, and write docs/claims.md from it.

    python claims/_run.py              # all scripts of this folder
    python claims/_run.py p160 gptq    # those whose names begin so
    python claims/_run.py --page       # none, only the page

A script's result is one JSON file in claims/results. The rows of the page come from these files alone.
"""

from __future__ import annotations

import ast
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from _shared import FAILS, HAND_OVER, HOLDS, SKIPPED, UNTESTABLE

HERE = Path(__file__).parent
RESULTS = HERE / "results"
PAGE = HERE.parent / "docs" / "claims.md"
VERDICTS = {HOLDS: "holds here", FAILS: "does not hold here", UNTESTABLE: "cannot be tested at this size"}
HEAD = """\
# Claims

Does the direction of a published method's claim show on a real model, beside its null at equal bytes? One script a
method, in `claims/`; this page is written by `script/claims` from what they measured. Divergence is that of the model
as loaded from disk, on held-out data. A claim holds where the method's file is no larger than its null's and the whole
95 % bootstrap interval of the paired difference lies below zero at every budget tried. `claims/README.md` says how they
are run and discusses what does not hold.
"""


def scripts(names: list[str]) -> list[Path]:
    """The scripts of these names, or whose names begin so, or all; a name without a script ends the run."""
    known = {path.stem: path for path in sorted(HERE.glob("*.py")) if not path.name.startswith("_")}
    if not names:
        return list(known.values())
    asked: dict[Path, None] = {}
    for name in map(str.lower, names):
        found = [name] if name in known else [stem for stem in known if stem.startswith(name)]
        if not found:
            sys.exit(f"There is no claim {name!r}; the scripts are {', '.join(known)}.")
        asked.update(dict.fromkeys(known[stem] for stem in found))
    return list(asked)


def run(script: Path) -> int:
    """Run a script and keep its result; its exit status. Nothing is kept of one that was skipped or broke."""
    with tempfile.TemporaryDirectory() as folder:
        handed = Path(folder) / "tables.json"
        handed.write_text("[]", encoding="utf8")
        before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        status = subprocess.run([sys.executable, script], env={**os.environ, HAND_OVER: str(handed)}).returncode
        seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
        tables = json.loads(handed.read_text(encoding="utf8"))
    if status not in VERDICTS:
        return status
    found = {
        "script": script.name,
        "verdict": VERDICTS[status],
        "seconds": round(seconds, 1),
        "processor_seconds": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1),
        "tables": tables,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{script.stem}.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf8")
    return status


def id_of(script: Path) -> str:
    """The paper's id, or the script's name where its paper has none."""
    return script.stem.split("_")[0].upper() if re.match(r"p\d+_", script.stem) else script.stem


def title_of(script: Path) -> str:
    """The first line of a script's docstring, without the id and the full stop."""
    first = (ast.get_docstring(ast.parse(script.read_text(encoding="utf8"))) or script.stem).splitlines()[0]
    return first.removeprefix(id_of(script)).strip().removesuffix(".")


def result_of(script: Path) -> dict[str, Any] | None:
    path = RESULTS / f"{script.stem}.json"
    return json.loads(path.read_text(encoding="utf8")) if path.exists() else None


def page() -> str:
    """The whole page: a row a script, then what each measured."""
    known = sorted(scripts([]), key=lambda path: (not re.match(r"p\d+_", path.stem), path.stem))
    lines = [HEAD]
    lines += ["| id | claim | model | null -> method (ratio) | verdict | command | processor s |"]
    lines += ["| --- | --- | --- | --- | --- | --- | --- |"]
    for script in known:
        lines += summary(script, result_of(script))
    for script in known:
        if (found := result_of(script)) is not None:
            lines += details(script, found)
    return "\n".join(lines) + "\n"


def summary(script: Path, found: dict[str, Any] | None) -> Iterator[str]:
    """The rows of a script in the table of all, one for each of its tables."""
    command = f"`script/claims {script.stem}`"
    if found is None:
        yield f"| {id_of(script)} | {title_of(script)} | | | not run yet | {command} | |"
        return
    for number, table in enumerate(found["tables"] or [{"claim": title_of(script), "model": "", "measured": ""}]):
        verdict, seconds = (f"**{found['verdict']}**", f"{found['processor_seconds']:.0f}") if not number else ("", "")
        name, told = (f"[{id_of(script)}](#{script.stem})", command) if not number else ("", "")
        yield f"| {name} | {table['claim']} | {table['model']} | {measured(table)} | {verdict} | {told} | {seconds} |"


def measured(table: dict[str, Any]) -> str:
    """The pairs of the claim itself on one line, those with the same budget and null's figure at once."""
    if "pairs" not in table:
        return str(table["measured"])
    parts = []
    for row in table["pairs"]:
        if not row["shown"]:
            null, method = row["null"], row["method"]
            parts.append(
                f"{row['budget']}: {null['label']} {figure(null['divergence'])} -> {method['label']} "
                f"{figure(method['divergence'])} ({row['ratio']:.2f})"
            )
    return "; ".join(parts)


def figure(value: float) -> str:
    """Three digits that count, or four after the point."""
    return f"{value:.4f}" if value < 0.1 else f"{value:.3f}" if value < 10 else f"{value:.1f}"


def details(script: Path, found: dict[str, Any]) -> Iterator[str]:
    """A section with every pair that a script measured, those beside its claim too."""
    named = "" if id_of(script) == script.stem else f"{id_of(script)} "
    yield f'\n## <a id="{script.stem}"></a>{named}{title_of(script)}'
    for table in found["tables"]:
        yield ""
        if "pairs" not in table:
            yield from (f"{table['claim']} {table['model']}.", "")
            yield f"| {' | '.join(table['columns'])} |"
            yield f"|{' --- |' * len(table['columns'])}"
            yield from (f"| {' | '.join(map(str, row))} |" for row in table["rows"])
        else:
            yield f"{table['claim']} {table['model']}, {table['unit']}, {table['samples']} held-out samples."
            yield "\n| budget | null | method | bits a weight | null | method | ratio | difference [95 %] | bytes |"
            yield f"|{' --- |' * 9}"
            yield from (pair_row(row) for row in table["pairs"])
        if table["notes"]:
            yield ""
            yield from (f"- {note}" for note in table["notes"])


def pair_row(row: dict[str, Any]) -> str:
    null, method, gap = row["null"], row["method"], row["difference"]
    interval = f"{gap['value']:+.4f} [{gap['low']:+.4f}, {gap['high']:+.4f}]"
    budget = f"{row['budget']}, beside the claim" if row["shown"] else f"**{row['budget']}**"
    return (
        f"| {budget} | {null['label']} | {method['label']} | {method['bits']:.2f} | {null['divergence']:.4f} | "
        f"{method['divergence']:.4f} | {row['ratio']:.2f} | {interval} "
        f"| {method['bytes'] / null['bytes'] - 1:+.2%} |"
    )


def main() -> int:
    names = sys.argv[1:]
    broken = []
    for script in [] if names == ["--page"] else scripts(names):
        print(f"== {script.stem}", flush=True)
        status = run(script)
        if status not in (*VERDICTS, SKIPPED):
            broken.append(script.stem)
        PAGE.write_text(page(), encoding="utf8")
    PAGE.write_text(page(), encoding="utf8")
    print(f"written to {PAGE.name}" + (f"; broken: {', '.join(broken)}" if broken else ""))
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
