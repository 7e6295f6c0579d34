"""Run folders that are damaged or hostile."""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
from pathlib import Path

import torch
from safetensors.torch import save_file
from spoiling import (
    DEEP,
    case,
    change_fact,
    change_run,
    change_tensor,
    link,
)


@case
def run_no_database(folder: Path) -> tuple[str, str]:
    """The database of a run is text."""
    (folder / "study.run" / "run.db").write_text("no database" * 500)
    return "show study.run", "run.db"


@case
def run_cut_short(folder: Path) -> tuple[str, str]:
    """The database of a run ends in the middle."""
    path = folder / "study.run" / "run.db"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return "show study.run", "run.db"


@case
def run_of_another_program(folder: Path) -> tuple[str, str]:
    """The database is that of another program, which must stay as it is."""
    (folder / "study.run" / "run.db").unlink()
    change_run(folder, "CREATE TABLE moz_places (id INTEGER)", "INSERT INTO moz_places VALUES (1)")
    return "front study.run", "moz_places"


@case
def run_of_another_program_with_a_log(folder: Path) -> tuple[str, str]:
    """The database keeps a log, which even reading would write."""
    with contextlib.closing(sqlite3.connect(folder / "study.run" / "run.db")) as db:
        db.execute("PRAGMA journal_mode = WAL")
    return "front study.run", "run.db"


@case
def run_linked_from_elsewhere(folder: Path) -> tuple[str, str]:
    """The database is a link to another one, which would be written to."""
    shutil.move(folder / "study.run" / "run.db", folder / "elsewhere.db")
    link(folder / "study.run" / "run.db", folder / "elsewhere.db")
    return "plan study.run --budget 50%", "run.db"


@case
def run_with_a_trigger(folder: Path) -> tuple[str, str]:
    """Making a plan would set off what a stranger wrote."""
    change_run(folder, "CREATE TRIGGER t AFTER INSERT ON plans BEGIN DELETE FROM facts; END")
    return "plan study.run --budget 50%", "trigger"


@case
def run_with_a_view(folder: Path) -> tuple[str, str]:
    """A table is a view that never ends."""
    endless = "WITH RECURSIVE c(plan) AS (SELECT 1 UNION ALL SELECT plan + 1 FROM c) SELECT plan, 1, 1, 1, 1, 1 FROM c"
    change_run(folder, "DROP TABLE ledger", f"CREATE VIEW ledger AS {endless}")
    return "show study.run", "view"


@case
def run_without_a_layout(folder: Path) -> tuple[str, str]:
    """The layout of the model is not there."""
    change_run(folder, "DELETE FROM facts WHERE name = 'layout'")
    return "front study.run", "layout"


@case
def run_of_a_strange_layout(folder: Path) -> tuple[str, str]:
    """A site of the layout has a negative shape."""
    change_fact(folder, "layout", lambda v: v["sites"][0].update(shape=[-1, -1]) or v)
    return "front study.run", "layout.sites.0.shape.0"


@case
def run_of_an_unknown_dtype(folder: Path) -> tuple[str, str]:
    """A site of the layout has a dtype that is none."""
    change_fact(folder, "layout", lambda v: v["sites"][0].update(dtype="F7") or v)
    return "front study.run", "layout"


@case
def run_of_facts_nested_deeply(folder: Path) -> tuple[str, str]:
    """A fact opens two hundred thousand lists."""
    change_run(folder, f"UPDATE facts SET value = '{DEEP}' WHERE name = 'untouched'")
    return "show study.run", "untouched"


@case
def run_of_negative_candidates(folder: Path) -> tuple[str, str]:
    """Candidates take fewer bytes than none."""
    change_run(folder, "UPDATE candidates SET stored = -1000000")
    return "plan study.run --budget 50%", "run.db"


@case
def run_of_candidates_of_texts(folder: Path) -> tuple[str, str]:
    """The predicted damage of a candidate is a text."""
    change_run(folder, "UPDATE candidates SET predicted = 'none'")
    return "plan study.run --budget 50%", "run.db"


@case
def run_of_an_unknown_form(folder: Path) -> tuple[str, str]:
    """A candidate is of a form that is none."""
    change_run(folder, "UPDATE candidates SET form = 'magic'")
    return "plan study.run --budget 50%", "magic"


@case
def run_of_an_empty_plan(folder: Path) -> tuple[str, str]:
    """A plan is an object without anything."""
    change_run(folder, "UPDATE plans SET value = '{}'")
    return "show study.run", "run.db"


@case
def run_of_a_ledger_of_texts(folder: Path) -> tuple[str, str]:
    """The ledger has texts in the place of numbers."""
    change_run(folder, "INSERT INTO ledger VALUES ('a', '*', 'x', x'00ff', 'y', 'z')")
    return "report study.run --out new.html", "ledger"


@case
def run_that_leads_out_of_its_folder(folder: Path) -> tuple[str, str]:
    """A site is named so that its spectra lie out of the run."""
    change_fact(folder, "layout", lambda v: v["sites"][0].update(name="../../../elsewhere") or v)
    return "front study.run", "elsewhere"


@case
def run_with_a_spoiled_fit(folder: Path) -> tuple[str, str]:
    """A fit is cut short."""
    for path in (folder / "study.run" / "fits").iterdir():
        path.write_bytes(path.read_bytes()[:-100])
    name = next(iter(plans_of(folder)))
    return f"build study.run --plan {name} --out new", "fits"


@case
def run_with_an_empty_fit(folder: Path) -> tuple[str, str]:
    """A fit holds none of the tensors that it should."""
    for path in (folder / "study.run" / "fits").iterdir():
        save_file({"x": torch.zeros(3)}, path)
    name = next(iter(plans_of(folder)))
    return f"build study.run --plan {name} --out new", "fits"


@case
def run_with_spoiled_spectra(folder: Path) -> tuple[str, str]:
    """The energies of a site are NaN."""
    for path in (folder / "study.run" / "spectra").iterdir():
        change_tensor(path, "energies", lambda t: t.fill_(float("nan")))
    return "front study.run", "spectra"


@case
def run_that_brings_code(folder: Path) -> tuple[str, str]:
    """The run names a factory that lies in itself as its model."""
    (folder / "study.run" / "net.py").write_text("open('it-ran', 'w')\n\ndef net():\n    pass\n")
    model = f"{folder / 'study.run' / 'net.py'}:net"
    change_fact(folder, "opening", lambda v: {**v, "model": model})
    name = next(iter(plans_of(folder)))
    return f"build study.run --plan {name} --out new", "net.py"


def plans_of(folder: Path) -> list[str]:
    with contextlib.closing(sqlite3.connect(folder / "study.run" / "run.db")) as db:
        return [name for (name,) in db.execute("SELECT name FROM plans ORDER BY made")]
