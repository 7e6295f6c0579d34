"""`tersor build`: fit a plan of a study and write the small model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tersor.cli import options as o
from tersor.cli.console import give, progress_shown
from tersor.errors import TersorError

EXAMPLE = "tersor build demo/small.run --budget 10% --out demo/smaller"


def build(
    run: o.RunFolder,
    out: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="Where the small model goes.")],
    plan: Annotated[
        str | None, typer.Option(metavar="NAME", help="A plan of `tersor plan`.", rich_help_panel=o.BUDGET)
    ] = None,
    budget: o.Budget = None,
    divergence: o.DivergenceLimit = None,
    memory_budget: o.MemoryBudget = None,
    flops_budget: o.FlopsBudget = None,
    latency_budget: o.LatencyBudget = None,
    forms: o.Forms = None,
    activations: o.Activations = None,
    recover: o.Recover = False,
    shard_size: o.ShardSize = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="FILE[:COLUMN]",
            help="Calibration data for --activations and --recover.",
            rich_help_panel=o.CALIBRATION,
        ),
    ] = None,
    samples: o.Samples = None,
    sequence_length: o.SequenceLength = 256,
    batch_size: o.BatchSize = 16,
    workers: o.Workers = None,
    memory: o.Memory = None,
    engine: o.Engine = "local",
    ray_address: o.RayAddress = None,
    device: o.Device = "cpu",
    as_json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Fit a plan and write the small model; the plan is one made before, or the best one under a budget."""
    limits = o.given(
        memory_budget=memory_budget, flops_budget=flops_budget, latency_budget=latency_budget, divergence=divergence
    )
    if plan is not None and (budget or limits):
        raise TersorError("Give either --plan or a budget, not both.")
    if (activations is None and not recover) != (data is None):
        raise TersorError("--data goes with --activations or --recover, which are done by what the data bring.")
    with progress_shown(as_json=as_json, quiet=quiet) as progress:
        from tersor import steps
        from tersor.build.build import check_target
        from tersor.data import read_data
        from tersor.steps.compressing import one_batch

        check_target(out)
        opened = steps.open_run(run)
        if plan is None:
            made = steps.plan_run(
                opened, budget, forms=o.names_of(forms), activations=activations, shard_size=shard_size, **limits
            )
        else:
            made = steps.plan_named(opened, plan)
        study = steps.reopen(run, device, memory)
        sizes = samples, sequence_length, batch_size
        options = o.given(workers=workers, engine=engine, ray_address=ray_address, shard_size=shard_size)
        read = None if data is None else read_data(data)
        batches = [] if read is None else list(study.model.batches(read, *sizes, 0))
        if read is not None and recover:
            options["recover"] = one_batch(study.model, read, sequence_length, 0)
        steps.build_plan(study, made, out, activations=activations, calibration=batches, progress=progress, **options)
    from tersor.report.account import account_of_artifact
    from tersor.report.tables import account_tables

    account = account_of_artifact(out)
    value = {"out": out, **account.as_json()}
    give(value, *account_tables(account), f"Written to {out}.", as_json=as_json, quiet=quiet)
