"""`tersor judge`: measure a small model against its original on held-out data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tersor.cli import options as o
from tersor.cli.console import give, progress_shown

LEDGER = ("site", "predicted", "measured", "low", "high")
EXAMPLE = "tersor judge demo/small --model demo/model --data demo/held-out.txt"


def judge(
    out: Annotated[Path, typer.Argument(help="A small model that Tersor wrote.")],
    model: Annotated[str, typer.Option("--model", metavar="MODEL", help="The original, as it was given to compress.")],
    data: Annotated[str, typer.Option("--data", metavar="FILE[:COLUMN]", help="Held-out data.")],
    weights: o.Weights = None,
    pairs: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Lines of text, text, score, to judge an encoder on.")
    ] = None,
    sites: Annotated[bool, typer.Option("--sites", help="Measure every site alone, too.")] = False,
    run: Annotated[Path | None, typer.Option(metavar="FOLDER", help="The run whose ledger to fill.")] = None,
    samples: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="How many windows, texts or images to use (128 windows, 512 others)."),
    ] = None,
    sequence_length: Annotated[int, typer.Option(min=2, metavar="N", help="Tokens of a window or text.")] = 256,
    batch_size: Annotated[int, typer.Option(min=1, metavar="N", help="Samples of a batch.")] = 16,
    memory: o.Memory = None,
    device: o.Device = "cpu",
    as_json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Measure a small model against its original: divergence, task scores, bytes, latency, memory, with intervals."""
    with progress_shown(as_json=as_json, quiet=quiet) as progress:
        from tersor.build.artifact import read_record
        from tersor.judge.artifact import judge_artifact, judge_sites
        from tersor.models import open_model, walk
        from tersor.run import Run
        from tersor.steps.memory import Memory

        record = read_record(out)
        limit = None if memory is None else Memory.of(memory)
        opened = None if run is None else Run(run)
        opening = {"weights": weights, "divergence": record["divergence"], "device": device}
        original = open_model(model, on_demand=limit is not None, **opening)
        if limit is not None:
            sites_known = walk(original.module).sites
            batch_size = limit.batch_size(sites_known, batch_size, sequence_length, gradients=False)
        measured = {"samples": samples, "sequence_length": sequence_length, "batch_size": batch_size}
        found = judge_artifact(original, out, data, pairs=pairs, run=opened, progress=progress, **measured)  # type: ignore[arg-type]
        alone = judge_sites(original, out, data, run=opened, progress=progress, **measured) if sites else {}  # type: ignore[arg-type]
    from tersor.report.tables import judgement_table, ledger_table

    ledger = [(name, p, m.value, m.low, m.high) for name, (p, m) in alone.items()]
    value = {**found.as_json(), "sites": [dict(zip(LEDGER, row, strict=True)) for row in ledger]}
    shown = [judgement_table(found.as_json()), *([ledger_table(ledger, found.unit)] if ledger else [])]
    give(value, *shown, as_json=as_json, quiet=quiet)
