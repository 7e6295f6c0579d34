"""`tersor runs`: the run folders below a folder and how far each got; `tersor runs clean` removes some."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from tersor.cli import options as o
from tersor.cli.console import give, progress_shown

EXAMPLE = "tersor runs demo"
CLEAN_EXAMPLE = "tersor runs clean demo --older-than 30 --yes"
DAY = 86400
Folder = Annotated[Path, typer.Argument(help="Where to look for run folders, itself and all below.")]


class ListedByDefault(TyperGroup):
    """`tersor runs DIR` is `tersor runs list DIR`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args or args[0] not in (*self.commands, *ctx.help_option_names):
            args = ["list", *args]
        return super().parse_args(ctx, args)


def runs(folder: Folder = Path("."), as_json: o.Json = False, quiet: o.Quiet = False) -> None:
    """List run folders with their model, how far they got, their plans, age and size."""
    with progress_shown(as_json=as_json, quiet=quiet):
        from tersor.report.tables import runs_table
        from tersor.run.listing import runs_under

        found = runs_under(folder)
    give([run.as_json() for run in found], runs_table(found, time.time()), as_json=as_json, quiet=quiet)


def clean(
    folder: Folder,
    older_than: Annotated[float, typer.Option(min=0, metavar="DAYS", help="Only those not changed for so long.")] = 0,
    unfinished: Annotated[bool, typer.Option("--unfinished", help="Only those whose study is not whole.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Remove run folders: of no use any more once their models are built, but every new budget would be a new study.

    Small models that were built stay. A run in which a process works is left alone.
    """
    with progress_shown(as_json=as_json, quiet=quiet):
        from tersor.report.tables import runs_table
        from tersor.run.listing import remove, runs_under

        old = time.time() - older_than * DAY
        found = [run for run in runs_under(folder) if run.worker is None and run.changed <= old]
        found = [run for run in found if not (unfinished and run.is_finished)]
    shown = runs_table(found, time.time())
    if found and not yes:
        give([], shown, as_json=as_json, quiet=quiet)
        typer.confirm(f"Remove these {len(found)} folders?", abort=True, err=True)
    for run in found:
        remove(run)
    told = f"{len(found)} run folders removed, {sum(run.size for run in found):,} bytes."
    give([run.as_json() for run in found], *([shown] if yes else []), told, as_json=as_json, quiet=quiet)
