"""`tersor methods`: the published methods that `compress --method` runs."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from tersor.cli import options as o
from tersor.cli.console import give, progress_shown

EXAMPLE = "tersor methods gptq"


def methods(
    name: Annotated[str | None, typer.Argument(help="One method, with everything about it.")] = None,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """List the published methods with their paper, form, metric and allocation; or show one of them."""
    with progress_shown(as_json=as_json, quiet=quiet):
        from tersor.methods import METHODS, method_named
        from tersor.report.tables import methods_table, record_table

        if name is None:
            rows = [asdict(m) for m in METHODS.values()]
            give(rows, methods_table(rows), as_json=as_json, quiet=quiet)
        else:
            row = asdict(method_named(name))
            give(row, record_table(row), as_json=as_json, quiet=quiet)
