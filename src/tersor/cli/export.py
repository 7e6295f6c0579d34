"""`tersor export`: write a small model in a format that loads without Tersor."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tersor.cli import options as o
from tersor.cli.console import give, progress_shown
from tersor.errors import TersorError

DTYPES = ("float32", "float16", "bfloat16")
EXAMPLE = "tersor export demo/small demo/small-dense --to dense"


def export(
    out: Annotated[Path, typer.Argument(help="A small model that Tersor wrote.")],
    folder: Annotated[Path, typer.Argument(help="Where the export goes.")],
    to: Annotated[str, typer.Option("--to", metavar="FORMAT", help="dense, compressed-tensors or gptq.")],
    rest: Annotated[
        str | None,
        typer.Option(metavar="dense", help="Store what the format cannot hold dense, instead of refusing."),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Dtype of dense weights: float32, float16, bfloat16 (the original's)."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", metavar="FACTORY", help="The factory of a module of your own, as given to compress."),
    ] = None,
    shard_size: o.ShardSize = None,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Write a small model as plain weights, or as the packed integers that other stacks read.

    Those hold integers with whole zeros only: study with --forms portable.
    """
    if dtype is not None and dtype not in DTYPES:
        raise TersorError(f"There is no dtype {dtype!r} to export in; choose one of {', '.join(DTYPES)}.")
    with progress_shown(as_json=as_json, quiet=quiet) as progress:
        import torch

        from tersor.export import export as write

        progress("export", f"to {to}", 0, 0)
        kept = None if dtype is None else getattr(torch, dtype)
        found = write(out, to, folder, model=model, rest=rest, dtype=kept, shard_size=shard_size)
    from tersor.report.tables import export_table

    value = {"out": out, "folder": folder, **found.as_json()}
    give(value, export_table(found), f"Written to {folder}.", as_json=as_json, quiet=quiet)
