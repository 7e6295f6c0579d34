"""`tersor report`: a run as one page of HTML that needs nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tersor.cli import options as o
from tersor.cli.console import give, progress_shown

EXAMPLE = "tersor report demo/small.run --out demo/report.html"


def report(
    run: o.RunFolder,
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="The page to write.")] = Path("report.html"),
    as_json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Write a run as one self-contained page: the front, where the bytes went, the damage, predicted and measured."""
    with progress_shown(as_json=as_json, quiet=quiet) as progress:
        from tersor.report.html import write_report
        from tersor.steps import open_run

        opened = open_run(run)
        progress("report", "", 0, 0)
        write_report(opened, out)
    give({"report": out, "bytes": out.stat().st_size}, f"Written to {out}.", as_json=as_json, quiet=quiet)
