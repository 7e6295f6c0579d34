"""`tersor compress`: study, plan, build and judge in one command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tersor.cli import options as o
from tersor.cli.console import give, progress_shown

EXAMPLE = """\
tersor compress demo/model --data demo/calibration.txt \\
  --held-out demo/held-out.txt --budget 8% --out demo/small"""


def compress(
    model: o.ModelSource,
    data: o.Calibration,
    out: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="Where the small model goes.")],
    budget: o.Budget = None,
    divergence: o.DivergenceLimit = None,
    memory_budget: o.MemoryBudget = None,
    flops_budget: o.FlopsBudget = None,
    latency_budget: o.LatencyBudget = None,
    held_out: Annotated[
        str | None, typer.Option(metavar="FILE[:COLUMN]", help="Data to judge the result on; without it nothing is.")
    ] = None,
    pairs: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Lines of text, text, score, to judge an encoder on.")
    ] = None,
    run: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="The run folder or its URL, kept for other budgets (default: OUT.run)."),
    ] = None,
    weights: o.Weights = None,
    forms: o.Forms = None,
    include: o.Include = None,
    exclude: o.Exclude = None,
    method: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="A published method; see `tersor methods`.", rich_help_panel=o.CHOICE),
    ] = None,
    sequential: Annotated[
        bool, typer.Option("--sequential", help="Observe inputs anew behind what is built.", rich_help_panel=o.CHOICE)
    ] = False,
    activations: o.Activations = None,
    recover: o.Recover = False,
    shard_size: o.ShardSize = None,
    check_data: o.CheckData = None,
    metric: o.MetricName = None,
    divergence_name: o.DivergenceName = None,
    gains: o.Gains = True,
    samples: o.Samples = None,
    sequence_length: o.SequenceLength = 256,
    batch_size: o.BatchSize = 16,
    seed: o.Seed = 0,
    workers: o.Workers = None,
    memory: o.Memory = None,
    engine: o.Engine = "local",
    ray_address: o.RayAddress = None,
    device: o.Device = "cpu",
    as_json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Make a model smaller within a budget, and say what it costs: study, plan, build and judge in one."""
    with progress_shown(as_json=as_json, quiet=quiet) as progress:
        from tersor import steps
        from tersor.methods import run_method

        given = o.given(
            run=run,
            held_out=held_out,
            pairs=pairs,
            forms=o.names_of(forms),
            activations=activations,
            check_data=check_data,
            metric=metric,
            memory_budget=memory_budget,
            flops_budget=flops_budget,
            latency_budget=latency_budget,
            max_divergence=divergence,
            weights=weights,
            divergence=divergence_name,
            include=include,
            exclude=exclude,
            samples=samples,
            sequential=sequential or None,
            recover=recover or None,
            shard_size=shard_size,
            gains=None if gains else False,
            workers=workers,
            memory=memory,
            engine=engine,
            ray_address=ray_address,
        )
        given |= {"sequence_length": sequence_length, "batch_size": batch_size, "seed": seed, "device": device}
        if method is None:
            result = steps.compress(model, data, budget, out, progress=progress, **given)
        else:
            result = run_method(method, model, data, budget, out, progress=progress, **given)
    from tersor.report.account import account_of_artifact
    from tersor.report.tables import account_tables, judgement_table

    account = account_of_artifact(out)
    value = {"out": out, "run": result.study.run.folder, **account.as_json()}
    shown = account_tables(account) if account.judgement is None else [judgement_table(account.judgement)]
    where = f"Written to {out}; the run is in {result.study.run.folder}."
    give(value, *shown, where, as_json=as_json, quiet=quiet)
