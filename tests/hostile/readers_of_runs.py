"""Readers of a run: its database, its tensors, who works in it, and what a study keeps in case that it is killed."""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from reading import Reader, encoded, of_file, reader
from torch import nn

from tersor.build.fits import load_fit
from tersor.build.layout import Layout
from tersor.curves.draw import site_metrics
from tersor.foreign import parse_json
from tersor.models.passage import Spool
from tersor.models.sites import Site
from tersor.observe.store import captured_share, load_metrics, load_output_metric
from tersor.report.account import account_of_run, plan_to_show, study_facts
from tersor.report.front import front_points
from tersor.report.tables import account_tables
from tersor.run import Run
from tersor.run.listing import runs_under
from tersor.steps import build_plan, limit_of, open_run, plan_named, planner_of, study

LADDER = {"int": [{"bits": 2, "group_size": 32}, {"bits": 4, "group_size": 32}]}
DAMPING = {"inputs": 0.03, "gradients": 0.3, "frequencies": 0.3}


def studied(folder: Path) -> Path:
    """A study of a small module in memory, with a plan and a fit."""
    run = folder / "run"
    if not run.exists():
        torch.manual_seed(0)
        data = [torch.randn(8, 64) for _ in range(5)]
        options: dict[str, Any] = {"forms": ("int",), "settings": LADDER, "damping": DAMPING, "gains": False}
        opened = study(nn.Sequential(nn.Linear(64, 64)), data, run, workers=1, **options)
        plan = opened.plan("20%")
        build_plan(opened, plan, folder / "out", workers=1)
        opened.run.enter(plan.name, "*", 0.1, (0.1, 0.0, 0.2))
        opened.run.close()
    return run


def show(run_folder: Path) -> None:
    """All that is shown of a run without its model."""
    runs_under(run_folder)
    run = open_run(run_folder)
    try:
        study_facts(run)
        run.seconds_by_form()
        run.ledger()
        front_points(planner_of(run), run.get("stored_bytes"), limit=limit_of(run))
        if run.plans():
            account = account_of_run(run, plan_to_show(run))
            json.dumps(account.as_json())
            account_tables(account)
    finally:
        run.close()


@reader
def run_database(folder: Path) -> Reader:
    run = studied(folder)

    def read() -> None:
        (run / "run.db-journal").unlink(missing_ok=True)
        show(run)

    return of_file(run / "run.db", read, ((run / "run.db").read_bytes(),))


def rows_of(database: Path) -> list[Any]:
    """Every value of a run as `[table, row, column, value]`; facts and plans as JSON has them."""
    with contextlib.closing(sqlite3.connect(database)) as db:
        db.row_factory = sqlite3.Row
        return [
            [table, row["rowid"], column, json.loads(row[column]) if column == "value" else row[column]]
            for (table,) in list(db.execute("SELECT name FROM sqlite_master WHERE type = 'table'"))
            for row in list(db.execute(f"SELECT rowid, * FROM {table}"))
            for column in row.keys()[1:]
        ]


@reader
def rows_of_a_run(folder: Path) -> Reader:
    """A run in which a value of a table is another."""
    run = studied(folder)
    whole, sound = (run / "run.db").read_bytes(), rows_of(run / "run.db")
    known = {(table, row, column) for table, row, column, _ in sound}

    def read(content: bytes) -> None:
        found = parse_json(content, "it")
        if not isinstance(found, list) or len(found) != 4 or not any(found[:3] == list(place) for place in known):
            return
        table, row, column, value = found
        plain = isinstance(value, str | float | None) or (isinstance(value, int) and abs(value) < 1 << 62)
        (run / "run.db").write_bytes(whole)
        with contextlib.closing(sqlite3.connect(run / "run.db")) as db, contextlib.suppress(sqlite3.IntegrityError), db:
            given = value if plain and column != "value" else json.dumps(value)
            db.execute(f"UPDATE {table} SET {column} = ? WHERE rowid = ?", (given, row))
        show(run)

    return Reader(read, encoded(*sound), "json")


def of_tensors(folder: Path, name: str, read: Callable[[Run], Any]) -> Reader:
    """A reader of the first file of tensors under a name in a run."""
    run = studied(folder)
    path = min((run / name).rglob("*.safetensors"))

    def opened() -> None:
        found = open_run(run)
        try:
            read(found)
        finally:
            found.close()

    return of_file(path, opened, (path.read_bytes(),), "safetensors")


@reader
def summaries(folder: Path) -> Reader:
    def read(run: Run) -> None:
        (at,) = sites_of(run)
        for kind in ("identity", "diagonal", "input", "output", "kronecker"):
            load_metrics(run, at, kind)
        load_output_metric(run, at)
        captured_share(run, at)
        site_metrics(run, at)

    return of_tensors(folder, "summaries/fit", read)


@reader
def spectra(folder: Path) -> Reader:
    def read(run: Run) -> None:
        limit = limit_of(run)
        assert limit is not None
        limit.divergence(10_000)

    return of_tensors(folder, "spectra", read)


@reader
def fits(folder: Path) -> Reader:
    def read(run: Run) -> None:
        (at,) = sites_of(run)
        load_fit(run, at, plan_named(run, run.plans()[0]).choices[0]).matrices()

    return of_tensors(folder, "fits", read)


def sites_of(run: Run) -> tuple[Site, ...]:
    return Layout.from_json(run.get("layout")).sites


@reader
def worker(folder: Path) -> Reader:
    run = studied(folder)

    def read() -> None:
        runs_under(run)
        found = Run(run)
        try:
            found.worker()
        finally:
            found.close()

    return of_file(run / "worker.json", read, encoded({"pid": 1, "host": "a"}), "json")


def spooled(folder: Path) -> Path:
    """A spool whose work was cut short, with a tree in it; its file."""
    spool = Spool(folder, "key")
    spool.put("a", 0, ({"x": torch.ones(2), "y": None}, [torch.zeros(1), 3, "z"]))
    spool.mark("begun")
    return next(folder.glob("*.safetensors"))


@reader
def spool(folder: Path) -> Reader:
    path = spooled(folder / "spool")
    return of_file(path, lambda: Spool(path.parent, "key").get("a", 0), (path.read_bytes(),), "safetensors")


@reader
def steps_of_a_spool(folder: Path) -> Reader:
    path = folder / "spool" / "done.json"
    return of_file(path, lambda: Spool(path.parent, "key").is_begun, encoded({"key": "key", "done": ["a"]}), "json")
