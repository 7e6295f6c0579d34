"""`tersor show`: what an engineer wants to know first of a small model, a plan or a study."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tersor.cli import options as o
from tersor.cli.console import give, progress_shown

EXAMPLE = "tersor show demo/small"


def show(
    what: Annotated[Path, typer.Argument(metavar="RUN|OUT", help="A run folder, or a small model that Tersor wrote.")],
    as_json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Show bytes and damage before and after, where the bytes went, what hurts most and what was left alone."""
    with progress_shown(as_json=as_json, quiet=quiet):
        from tersor.errors import TersorError
        from tersor.report import account, tables
        from tersor.steps import open_run

        if (what / "tersor.json").exists():
            found = account.account_of_artifact(what)
        elif (what / "run.db").exists():
            run = open_run(what)
            if not run.plans():
                facts = account.study_facts(run)
                give(facts, tables.study_table(facts), as_json=as_json, quiet=quiet)
                return
            found = account.account_of_run(run, account.plan_to_show(run))
        else:
            raise TersorError(f"{what} is neither a run folder (no run.db) nor an artifact of Tersor (no tersor.json).")
    head, *rest = tables.account_tables(found)
    judged = [tables.judgement_table(found.judgement)] if found.judgement else []
    give(found.as_json(), head, *judged, *rest, as_json=as_json, quiet=quiet)
