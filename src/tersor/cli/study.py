"""`tersor study`: observe a model and draw the curves of all its sites; every budget is a look-up afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tersor.cli import options as o
from tersor.cli.console import give, progress_shown

EXAMPLE = "tersor study demo/model --data demo/calibration.txt --run demo/study"


def study(
    model: o.ModelSource,
    data: o.Calibration,
    run: Annotated[
        Path, typer.Option("--run", metavar="FOLDER", help="The run folder to make or to go on with, or its URL.")
    ],
    weights: o.Weights = None,
    forms: o.Forms = None,
    include: o.Include = None,
    exclude: o.Exclude = None,
    check_data: o.CheckData = None,
    metric: o.MetricName = None,
    divergence_name: o.DivergenceName = None,
    gains: o.Gains = True,
    samples: o.Samples = None,
    sequence_length: o.SequenceLength = 256,
    batch_size: o.BatchSize = 16,
    seed: o.Seed = 0,
    latency: Annotated[bool, typer.Option("--latency", help="Time every site, for budgets of time.")] = False,
    workers: o.Workers = None,
    memory: o.Memory = None,
    engine: o.Engine = "local",
    ray_address: o.RayAddress = None,
    device: o.Device = "cpu",
    as_json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Observe a model on calibration data and draw the curves of all its sites, once for every budget.

    A study that was interrupted goes on where it stopped.
    """
    with progress_shown(as_json=as_json, quiet=quiet) as progress:
        from tersor import steps

        given = o.given(
            forms=o.names_of(forms),
            check_data=check_data,
            metric=metric,
            weights=weights,
            divergence=divergence_name,
            include=include,
            exclude=exclude,
            samples=samples,
            latency=latency or None,
            gains=None if gains else False,
            workers=workers,
            memory=memory,
            engine=engine,
            ray_address=ray_address,
        )
        given |= {"sequence_length": sequence_length, "batch_size": batch_size, "seed": seed, "device": device}
        done = steps.study(model, data, run, progress=progress, **given)
    from tersor.report.account import study_facts
    from tersor.report.tables import study_table

    facts = study_facts(done.run)
    give(facts, study_table(facts), as_json=as_json, quiet=quiet)
