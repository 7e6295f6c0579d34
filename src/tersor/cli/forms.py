"""`tersor forms`: the families of cheap operators that a plan may choose from."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from tersor.cli import options as o
from tersor.cli.console import give, progress_shown

EXAMPLE = "tersor forms lowrank"


def forms(
    name: Annotated[str | None, typer.Argument(help="One form, with its settings for a weight of 1024 x 1024.")] = None,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """List the forms with what they store and where they win; or show one of them."""
    with progress_shown(as_json=as_json, quiet=quiet):
        from tersor.forms import FORMS, form_named
        from tersor.report.tables import forms_table, record_table

        if name is None:
            rows = [_row(name) for name in FORMS]
            give(rows, forms_table(rows), as_json=as_json, quiet=quiet)
        else:
            labels = [setting.label for setting in form_named(name).settings((1024, 1024))]
            row = {**_row(name), "settings": labels}
            give(row, record_table(row), as_json=as_json, quiet=quiet)


def _row(name: str) -> dict[str, Any]:
    from tersor.forms import FORMS, USUAL

    form = FORMS[name]
    return {"name": name, "stores": form.stores, "wins": form.wins, "by_default": name in USUAL}
