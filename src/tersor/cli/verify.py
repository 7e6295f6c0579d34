"""`tersor verify`: check that a small model is what its `tersor.json` says, and does what was measured of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tersor.cli import options as o
from tersor.cli.console import give, progress_shown
from tersor.errors import TersorError

EXAMPLE = "tersor verify demo/small --model demo/model --data demo/held-out.txt"


def verify(
    out: Annotated[Path, typer.Argument(help="A small model that Tersor wrote.")],
    model: Annotated[
        str | None, typer.Option("--model", metavar="MODEL", help="The original, as it was given to compress.")
    ] = None,
    data: Annotated[
        str | None, typer.Option("--data", metavar="FILE[:COLUMN]", help="The held-out data that it was judged on.")
    ] = None,
    weights: o.Weights = None,
    device: o.Device = "cpu",
    as_json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Check hashes, settings, shapes and streams; with the original and data, the measured divergence, too."""
    if data is not None and model is None:
        raise TersorError("Give --model with --data: a divergence is one to the original.")
    with progress_shown(as_json=as_json, quiet=quiet) as progress:
        from tersor.build.artifact import read_record
        from tersor.judge.verify import verify as check
        from tersor.models import open_model

        divergence = read_record(out)["divergence"]
        original = None if model is None else open_model(model, weights=weights, divergence=divergence, device=device)
        found = check(out, original, data, progress)
    from tersor.report.tables import verified_table

    value = {"out": out, "holds": {one.name: one.found for one in found}}
    give(value, verified_table(str(out), found), as_json=as_json, quiet=quiet)
