"""The run folder keeps what it is given, belongs to one model, and names what is damaged."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest
import torch

from tersor.errors import TersorError
from tersor.forms import FORMS, Candidate, cost_of
from tersor.run import Run, fingerprint_of


def test_facts_tensors_candidates_plans_and_ledger_come_back(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", create=True)
    run.put("damping", {"inputs": 0.1})
    run.put_tensors("fits/a.b", {"x": torch.arange(3)})
    candidates = [
        Candidate(name, setting, cost_of(form, (256, 512), setting), 0.25)
        for name, form in FORMS.items()
        for setting in form.settings((256, 512))
    ]
    for name in FORMS:
        run.add_candidates("site", name, [c for c in candidates if c.form == name], 1.5)
    run.put_plan("35%", {"a": 1})
    run.enter("35%", "*", 0.1, (0.2, 0.15, 0.25))
    run.close()
    again = Run(tmp_path / "run")
    assert again.get("damping") == {"inputs": 0.1} and again.get("none", 3) == 3
    assert torch.equal(again.tensors("fits/a.b")["x"], torch.arange(3))
    assert again.has_tensors("fits/a.b") and not again.has_tensors("fits/other")
    found = list(again.candidates("site"))
    assert sorted(map(str, found)) == sorted(map(str, candidates))
    assert [c.cost.stored for c in found] == sorted(c.cost.stored for c in candidates)
    assert again.is_drawn("site", "int") and not again.is_drawn("other", "int")
    assert again.plan("35%") == {"a": 1} and again.plan("x") is None and again.plans() == ["35%"]
    assert again.ledger() == [("35%", "*", 0.1, 0.2, 0.15, 0.25)]


def test_it_belongs_to_one_model(tmp_path: Path) -> None:
    run = Run(tmp_path, create=True)
    run.belongs_to({"model": "abc", "seed": 0})
    run.belongs_to({"model": "abc"})
    with pytest.raises(TersorError, match=rf"{tmp_path} was made for other model \(abc, not xyz\)"):
        run.belongs_to({"model": "xyz"})


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TersorError, match="is no run folder"):
        Run(tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


@pytest.mark.parametrize(
    "content", [b"no database at all, but long enough to be read as one" * 40, b"SQLite format 3\0" + b"x" * 5000]
)
def test_a_damaged_database_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "run.db").write_bytes(content)
    with pytest.raises(TersorError, match=r"run\.db (cannot be opened|is damaged)"):
        Run(tmp_path).get("model")


def test_damage_after_opening_is_named(tmp_path: Path) -> None:
    run = Run(tmp_path, create=True)
    run._db.execute("DROP TABLE facts")
    with pytest.raises(TersorError, match=r"run\.db is damaged"):
        run.get("model")
    with pytest.raises(TersorError, match=r"run\.db is damaged"):
        run.put("model", 1)


def test_a_full_disk_while_writing_facts_is_named(tmp_path: Path) -> None:
    run = Run(tmp_path, create=True)
    pages = run._db.execute("PRAGMA page_count").fetchone()[0]
    run._db.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(TersorError, match=r"run\.db could not be written: .*full"):
        run.put("large", "x" * 100_000)
    assert run.get("large") is None


def test_damaged_tensors_are_named(tmp_path: Path) -> None:
    run = Run(tmp_path, create=True)
    run.put_tensors("summaries/fit/a", {"x": torch.ones(100)})
    path = tmp_path / "summaries" / "fit" / "a.safetensors"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(TersorError, match=r"a\.safetensors is missing or damaged"):
        run.tensors("summaries/fit/a")


def test_the_database_is_plain_sqlite(tmp_path: Path) -> None:
    Run(tmp_path, create=True).put("model", "abc")
    with sqlite3.connect(tmp_path / "run.db") as db:
        assert db.execute("SELECT value FROM facts").fetchall() == [('"abc"',)]


def test_fingerprints_tell_data_apart() -> None:
    x = torch.arange(6.0)
    prints = [fingerprint_of(b) for b in ([{"a": x}], [{"a": x + 1}], [{"a": x.view(2, 3)}], [{"a": x.long()}], [])]
    assert len(set(prints)) == 5
    assert fingerprint_of([{"a": x.clone()}]) == prints[0]


def test_what_a_damaged_database_says_is_one_line(tmp_path: Path) -> None:
    Run(tmp_path / "run", create=True).close()
    path = tmp_path / "run" / "run.db"
    path.write_bytes(path.read_bytes().replace(b"resident", b"resi\xffent", 1))
    with pytest.raises(TersorError, match="cannot be opened as a run") as caught:
        Run(tmp_path / "run")
    assert str(caught.value).isprintable()
