"""The run folder: `run.db` (SQLite) with what was found, and safetensors files with what was measured in bulk.

Every step looks here first and does nothing where its result stands already. A folder belongs to one model, one
calibration set and one set of options, named by a hash; another model is refused in a sentence.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import sqlite3
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from tersor.errors import TersorError
from tersor.foreign import COUNT, LARGEST_JSON, Row, check, parse_json, read_json, reason_of, understood
from tersor.forms import Candidate, Cost, as_values, form_named, setting_of
from tersor.models.files import is_alive, read_tensors, write_safetensors, write_text
from tersor.run.facts import pattern_of
from tersor.run.gains import Gains
from tersor.urls import url_of

WORKER = "worker.json"  # who works in the folder
_SCHEMA = """
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS candidates (
    site TEXT, form TEXT, setting TEXT, stored INTEGER, resident INTEGER, flops INTEGER, predicted REAL,
    PRIMARY KEY (site, form, setting));
CREATE TABLE IF NOT EXISTS drawn (site TEXT, form TEXT, seconds REAL, PRIMARY KEY (site, form));
CREATE TABLE IF NOT EXISTS plans (name TEXT PRIMARY KEY, value TEXT NOT NULL, made REAL);
CREATE TABLE IF NOT EXISTS ledger (plan TEXT, site TEXT, predicted REAL, measured REAL, low REAL, high REAL,
    PRIMARY KEY (plan, site));
"""
_AGAIN = "; remove the run folder and study again"
_LINE = Row((str, str, float, float, float, float))
_WAL = b"\x02\x02"  # bytes 18 and 19 of a database that keeps a log beside it, as a run never does


class Run:
    """An open run folder. Facts are JSON values by name; tensors are safetensors files by name."""

    def __init__(self, folder: Path, *, create: bool = False) -> None:
        self.folder = folder
        path, url = folder / "run.db", url_of(folder)
        if url is not None:
            raise TersorError(f"{url} is no folder here; open it by `with tersor.mirrored({url!r}) as folder:`.")
        if not create and not path.exists():
            raise TersorError(f"{folder} is no run folder: it has no run.db. `tersor study` makes one.")
        self._refuse_strange_file(path)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(path, timeout=30)
            self._db.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, LARGEST_JSON)
            self._db.execute("PRAGMA trusted_schema = OFF")
            self._refuse_strange_tables(path)
            self._db.executescript(_SCHEMA)
        except (sqlite3.DatabaseError, OSError) as error:
            raise TersorError(f"{path} cannot be opened as a run: {reason_of(error)}.") from error

    def _refuse_strange_file(self, path: Path) -> None:
        """A link would have another database written to; a log beside one is written even by reading it."""
        if path.is_symlink():
            raise TersorError(f"{path} is a link; put the file itself in its place.")
        if path.exists() and not path.is_file():
            raise TersorError(f"{path} cannot be opened as a run: it is no regular file.")
        if path.exists():
            with path.open("rb") as file:
                if file.read(20)[18:] == _WAL:
                    raise TersorError(f"{path} cannot be opened as a run: it is another program's database.")

    def _refuse_strange_tables(self, path: Path) -> None:
        """Nothing but the tables of a run, as a run makes them: no view, no trigger, and nothing is added to others."""
        with closing(sqlite3.connect(":memory:")) as fresh:
            fresh.executescript(_SCHEMA)
            known = set(fresh.execute("SELECT type, name, sql FROM sqlite_master"))
        strange = [row for row in self._db.execute("SELECT type, name, sql FROM sqlite_master") if row not in known]
        if strange:
            self._db.close()
            raise TersorError(
                f"{path} cannot be opened as a run: its {strange[0][0]} {strange[0][1]!r} is none of a run."
            )

    def close(self) -> None:
        self._db.close()

    def discard(self) -> None:
        """Close and remove a folder in which nothing was found yet."""
        self.close()
        for name in ("run.db", "run.lock", WORKER):
            (self.folder / name).unlink(missing_ok=True)
        self.folder.rmdir()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Work in the folder as the only one; raises TersorError where another process does.

        A process that is killed lets go of the folder; what it left half-written is removed.
        """
        lock = FileLock(self.folder / "run.lock", blocking=False)
        try:
            lock.acquire()
        except Timeout as error:
            raise TersorError(f"{self.worker() or 'Another process'} works in {self.folder}; wait for it.") from error
        except OSError as error:
            raise TersorError(f"{self.folder / 'run.lock'} could not be written: {error}.") from error
        try:
            for left in self.folder.rglob(".*.tmp"):
                left.unlink(missing_ok=True)
            write_text(self.folder / WORKER, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
            yield
        finally:
            (self.folder / WORKER).unlink(missing_ok=True)
            lock.release()

    def worker(self) -> str | None:
        """The process that works in the folder, None where there is none; one on this machine may have been killed."""
        path = self.folder / WORKER
        if not path.exists():
            return None
        known = check(read_json(path), {"pid": COUNT, "host": str}, path)
        if known["host"] == socket.gethostname() and not is_alive(known["pid"]):
            return None
        return f"Process {known['pid']} on {known['host']}"

    def get(self, name: str, default: Any = None) -> Any:
        rows = self._rows("SELECT value FROM facts WHERE name = ?", name)
        return self._fact(name, rows[0][0]) if rows else default

    def _fact(self, name: str, text: Any) -> Any:
        value = parse_json(str(text), f"{self.folder / 'run.db'}: {name}")
        return check(value, pattern_of(name), self.folder / "run.db", name)

    def facts(self, prefix: str) -> dict[str, Any]:
        """All facts whose names begin with `prefix`, by what follows it, in the order in which they were put."""
        rows = self._rows("SELECT name, value FROM facts WHERE substr(name, 1, ?) = ?", len(prefix), prefix)
        return {name[len(prefix) :]: self._fact(name, value) for name, value in rows}

    def put(self, name: str, value: Any) -> None:
        """Keep a fact; one that stands there as it is writes nothing."""
        self.put_all({name: value})

    def put_all(self, facts: dict[str, Any]) -> None:
        """Keep facts that belong together: all of them or, where the process dies, none."""
        rows = [(name, json.dumps(value)) for name, value in facts.items()]
        new = [row for row in rows if not self._rows("SELECT 1 FROM facts WHERE name = ? AND value = ?", *row)]
        if new:
            with self._write() as db:
                db.executemany("INSERT OR REPLACE INTO facts VALUES (?, ?)", new)

    def _rows(self, query: str, *values: Any) -> list[Any]:
        try:
            return self._db.execute(query, values).fetchall()
        except sqlite3.DatabaseError as error:
            raise TersorError(f"{self.folder / 'run.db'} is damaged: {reason_of(error)}.") from error

    @contextmanager
    def _write(self) -> Iterator[sqlite3.Connection]:
        """One transaction; a full disk or a damaged file is a TersorError."""
        try:
            with self._db as db:
                yield db
        except sqlite3.DatabaseError as error:
            raise TersorError(f"{self.folder / 'run.db'} could not be written: {reason_of(error)}.") from error

    def belongs_to(self, facts: dict[str, Any]) -> None:
        """Claim the folder for these facts, or raise TersorError naming the first that differs."""
        for name, value in facts.items():
            known = self.get(name)
            if known is None:
                self.put(name, value)
            elif known != json.loads(json.dumps(value)):
                shown = f" ({known}, not {value})" if isinstance(value, str | int | float) else ""
                raise TersorError(
                    f"The run folder {self.folder} was made for other {name.replace('_', ' ')}{shown}; "
                    "choose another folder or remove it."
                )

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors stored under `name`; raises TersorError where the file is damaged."""
        path = self._file(name)
        try:
            return read_tensors(path)
        except (OSError, TersorError) as error:
            raise TersorError(f"{path} is missing or damaged{_AGAIN}.") from error

    def _file(self, name: str) -> Path:
        """The file of a name, which may come from a stranger's run: it must lie in the folder."""
        path = self.folder / f"{name}.safetensors"
        if not path.resolve().is_relative_to(self.folder.resolve()):
            raise TersorError(f"{path} lies outside of the run folder {self.folder}.")
        return path

    def reading(self, name: str) -> AbstractContextManager[None]:
        """Inside, whatever goes wrong with the values of these tensors is a TersorError that names their file."""
        return understood(self._file(name), _AGAIN)

    def has_tensors(self, name: str) -> bool:
        """Files are renamed when they are whole, so one that is there was finished."""
        return self._file(name).exists()

    def put_tensors(self, name: str, tensors: dict[str, Tensor]) -> None:
        write_safetensors(self._file(name), tensors)

    def add_candidates(self, site: str, form: str, candidates: Iterable[Candidate], seconds: float) -> None:
        """Store the whole curve of one form at one site, at once."""
        rows = [
            (site, c.form, setting_key(c), c.cost.stored, c.cost.resident, c.cost.flops, c.divergence)
            for c in candidates
        ]
        with self._write() as db:
            db.executemany("INSERT OR REPLACE INTO candidates VALUES (?, ?, ?, ?, ?, ?, ?)", rows)
            db.execute("INSERT OR REPLACE INTO drawn VALUES (?, ?, ?)", (site, form, seconds))

    def undraw(self, forms: Iterable[str], sites: Iterable[str]) -> None:
        """Forget what was drawn of these forms at these sites."""
        pairs = [(site, form) for site in sites for form in forms]
        with self._write() as db:
            db.executemany("DELETE FROM drawn WHERE site = ? AND form = ?", pairs)
            db.executemany("DELETE FROM candidates WHERE site = ? AND form = ?", pairs)

    def is_drawn(self, site: str, form: str) -> bool:
        return bool(self._rows("SELECT 1 FROM drawn WHERE site = ? AND form = ?", site, form))

    def seconds_by_form(self) -> dict[str, float]:
        """Seconds that the curves of each form took, all sites together."""
        return dict(self._rows("SELECT form, SUM(seconds) FROM drawn GROUP BY form ORDER BY form"))

    def candidates(self, site: str) -> Iterator[Candidate]:
        """All candidates of a site, smallest first."""
        query = "SELECT form, setting, stored, resident, flops, predicted FROM candidates WHERE site = ? "
        path = self.folder / "run.db"
        for form, setting, stored, resident, flops, predicted in self._rows(query + "ORDER BY stored, predicted", site):
            check([stored, resident, flops], [COUNT], path, f"the cost of a candidate of {site}")
            check(predicted, float, path, f"the divergence of a candidate of {site}")
            values = parse_json(str(setting), f"{path}: a setting of {site}")
            with understood(path):
                found = setting_of(form_named(form), values)
            yield Candidate(form, found, Cost(stored, resident, flops), predicted)

    def gains(self, site: str) -> Gains:
        return Gains(self.get(f"gain/{site}", {}))

    def gain(self, site: str, form: str, divergence: float = 0.0) -> float:
        """What a form at a site does over what is predicted for it, where that is `divergence`: little if not given."""
        return self.gains(site).of(form, divergence)

    def put_plan(self, name: str, value: dict[str, Any]) -> None:
        with self._write() as db:
            db.execute("INSERT OR REPLACE INTO plans VALUES (?, ?, ?)", (name, json.dumps(value), time.time()))

    def plan(self, name: str) -> dict[str, Any] | None:
        rows = self._rows("SELECT value FROM plans WHERE name = ?", name)
        return parse_json(str(rows[0][0]), f"{self.folder / 'run.db'}: plan {name}") if rows else None

    def plans(self) -> list[str]:
        names = [row[0] for row in self._rows("SELECT name FROM plans ORDER BY made")]
        return check(names, [str], self.folder / "run.db", "plans")  # type: ignore[no-any-return]

    def enter(self, plan: str, site: str, predicted: float, measured: tuple[float, float, float]) -> None:
        """One line of the ledger; the site `*` is the whole model."""
        with self._write() as db:
            db.execute("INSERT OR REPLACE INTO ledger VALUES (?, ?, ?, ?, ?, ?)", (plan, site, predicted, *measured))

    def ledger(self) -> list[tuple[str, str, float, float, float, float]]:
        rows = self._rows("SELECT plan, site, predicted, measured, low, high FROM ledger")
        return check(rows, [_LINE], self.folder / "run.db", "ledger")  # type: ignore[no-any-return]


def setting_key(candidate: Candidate) -> str:
    """A setting as canonical JSON."""
    return json.dumps(as_values(candidate.setting), sort_keys=True)


def fingerprint_of(batches: Iterable[Any]) -> str:
    """A hash of the tensors in batches, however they are nested."""
    digest = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            flat = value.detach().cpu().contiguous()
            digest.update(f"{tuple(flat.shape)}{flat.dtype}".encode())
            digest.update(flat.reshape(-1).view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
        elif isinstance(value, dict):
            for key in sorted(value):
                add(value[key])
        elif isinstance(value, list | tuple):
            for item in value:
                add(item)
        elif hasattr(value, "inputs"):
            add(value.inputs)

    for batch in batches:
        add(batch)
    return digest.hexdigest()[:16]
