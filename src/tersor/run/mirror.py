"""A run folder in an object store, or wherever else fsspec reaches: a copy here, sent there while steps work in it.

Files are sent before the database that speaks of them, so what lies there is a run of some seconds ago that any machine
can go on from. One process at a time: a lease there names it, and runs out some time after its machine was lost.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import socket
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any

from tersor.errors import TersorError
from tersor.foreign import COUNT, Row, check, parse_json, read_json, reason_of
from tersor.models.files import is_alive, write_text

EVERY = 20.0  # seconds from one sending to the next
LASTS = 6.0  # times as long a lease holds without being renewed
DATABASE, LEASE = "run.db", "lease.json"
HERE_ALONE = ("run.lock", "worker.json", LEASE)
_HELD = {"pid": COUNT, "host": str, "until": float}
_NOTE = Row((str, COUNT, COUNT))
_MARKS = ("ETag", "etag", "md5Hash", "mtime", "LastModified", "last_modified", "updated", "created")


@contextmanager
def mirrored(url: str, cache: Path | None = None, every: float = EVERY) -> Iterator[Path]:
    """The folder here with the run at `url`, such as `s3://bucket/run`; what changes in it is sent there.

    The copy stays in `cache` (default: `tersor/runs` in the user's cache), so that little is fetched the next time.
    Raises TersorError where another process works in the run, and where the store cannot be reached.
    """
    mirror = Mirror(url, cache or _user_cache(), every)
    mirror.take()
    ended = threading.Event()
    sending = threading.Thread(target=mirror.send_until, args=(ended,), daemon=True)
    sending.start()
    try:
        yield mirror.folder
    except BaseException:
        ended.set()
        sending.join()
        with suppress(TersorError):  # what went wrong first is what is told
            mirror.give_back()
        raise
    ended.set()
    sending.join()
    mirror.give_back()


class Mirror:
    """The copy of a run and what is known of it there: of every file its mark there, and what it was here by then."""

    def __init__(self, url: str, cache: Path, every: float) -> None:
        self.url, self.every = url, every
        self.folder = cache / hashlib.sha256(url.encode()).hexdigest()[:16]
        self._notes = self.folder.with_suffix(".json")
        self._renewed = -math.inf
        try:
            import fsspec

            self._files, root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise TersorError(f"{url} cannot be reached: {reason_of(error)}.") from error
        self._root = str(root).rstrip("/")
        self._known: dict[str, list[Any]] = {}
        self._failed: Exception | None = None

    def take(self) -> None:
        """Take the lease, and bring the copy here to what lies there."""
        with self._reaching():
            self._renew()
            try:
                self._bring()
            except BaseException:
                self._files.rm_file(f"{self._root}/{LEASE}")
                raise

    def _bring(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        if self._notes.exists():
            self._known = check(read_json(self._notes), {str: _NOTE}, self._notes)
        there = self._listed()
        left = self._known.get(DATABASE, [None])[0]
        if there.get(DATABASE) != left or (left is not None and not self._at(DATABASE).exists()):
            self._fetch(there)

    def _fetch(self, there: dict[str, str]) -> None:
        """Another machine was the last to work there, or somebody removed it: what is there is what counts."""
        for name in self._here() - set(there):
            self._at(name).unlink()
        self._known = {name: known for name, known in self._known.items() if name in there}
        for name, mark in there.items():
            path = self._at(name)
            if self._known.get(name, [None])[0] != mark or not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                part = path.with_name(f".{path.name}.tmp")
                self._files.get_file(f"{self._root}/{name}", str(part))
                part.replace(path)
                self._known[name] = [mark, *_state_of(path)]
        self._keep()

    def send_until(self, ended: threading.Event) -> None:
        """Send what changed, again and again; what fails is tried again the next time, at the latest by `give_back`."""
        while not ended.wait(self.every):
            try:
                self.send()
                self._failed = None
            except Exception as error:
                self._failed = error
                if isinstance(error, TersorError):
                    return

    def give_back(self) -> None:
        """Send what is left and end the lease; raises TersorError where that cannot be done."""
        if isinstance(self._failed, TersorError):
            raise self._failed
        with self._reaching(f"; what was found is in {self.folder}, and the same command sends it"):
            self.send()
            self._files.rm_file(f"{self._root}/{LEASE}")

    def send(self) -> None:
        """Renew the lease and send what changed since the last time, the database last, as it was before the files."""
        self._renew()
        snapshot = self._snapshot()
        try:
            here = {name: self._at(name) for name in sorted(self._here() - {DATABASE})}
            if snapshot is not None:
                here[DATABASE] = snapshot
            sent = {name: state for name, path in here.items() if (state := self._sent(name, path)) is not None}
        finally:
            if snapshot is not None:
                snapshot.unlink(missing_ok=True)
        for name in self._known.keys() - here.keys():
            with suppress(FileNotFoundError):
                self._files.rm_file(f"{self._root}/{name}")
            del self._known[name]
        if sent:
            there = self._listed()
            self._known |= {name: [there[name], *state] for name, state in sent.items()}
        self._keep()

    def _sent(self, name: str, path: Path) -> list[int] | None:
        """Send a file that is not there as it is here; returns what it was by then, None where nothing was sent."""
        if time.monotonic() > self._renewed + self.every:  # what came before took long
            self._renew()
        try:
            state = _state_of(path)
            if self._known.get(name, [None])[1:] == state:
                return None
            self._files.put_file(str(path), f"{self._root}/{name}")
        except FileNotFoundError:
            return None  # it was there a moment ago: the next sending will see that it is gone
        return state

    def _snapshot(self) -> Path | None:
        """A copy of the database as it is between two transactions, dated by what it holds."""
        if not self._at(DATABASE).exists():
            return None
        path = self.folder.with_suffix(".db")
        with closing(sqlite3.connect(self._at(DATABASE), timeout=30)) as found, closing(sqlite3.connect(path)) as copy:
            found.backup(copy)
        number = int.from_bytes(hashlib.sha256(path.read_bytes()).digest()[:7], "big")
        os.utime(path, ns=(number, number))
        return path

    def _renew(self) -> None:
        """Say there who works in the run; raises TersorError where another process does."""
        path = f"{self._root}/{LEASE}"
        self._files.invalidate_cache()
        if self._files.exists(path):
            what = f"{self.url}/{LEASE}"
            held = check(parse_json(self._files.cat_file(path), what), _HELD, what)
            wait, here = held["until"] - time.time(), held["host"] == socket.gethostname()
            if wait > 0 and held["pid"] != os.getpid() and (not here or is_alive(held["pid"])):
                who = f"Process {held['pid']} on {held['host']}"
                raise TersorError(f"{who} works in {self.url}; wait for it, or {wait:.0f} s if its machine was lost.")
        self._renewed = time.monotonic()
        until = time.time() + LASTS * self.every
        lease = {"pid": os.getpid(), "host": socket.gethostname(), "until": until}
        self._files.makedirs(self._root, exist_ok=True)
        self._files.pipe_file(path, json.dumps(lease).encode())

    def _listed(self) -> dict[str, str]:
        """The marks of the files there by name; raises TersorError for a name that lies outside."""
        self._files.invalidate_cache()
        found = {}
        for path, info in self._files.find(self._root, detail=True).items():
            name = str(path)[len(self._root) + 1 :]
            parts = PurePosixPath(name).parts
            if not parts or ".." in parts or name.startswith("/") or "\\" in name:
                raise TersorError(f"{self.url} has a file {name!r}, which lies outside of it.")
            if name not in HERE_ALONE:
                found[name] = _mark(info)
        return found

    def _here(self) -> set[str]:
        paths = (p for p in self.folder.rglob("*") if p.is_file() and not p.name.startswith("."))
        return {p.relative_to(self.folder).as_posix() for p in paths}.difference(HERE_ALONE)

    def _at(self, name: str) -> Path:
        return self.folder / name

    def _keep(self) -> None:
        write_text(self._notes, json.dumps(self._known))

    @contextmanager
    def _reaching(self, more: str = "") -> Iterator[None]:
        """Inside, whatever a store raises is a TersorError that names it."""
        try:
            yield
        except TersorError:
            raise
        except Exception as error:
            raise TersorError(f"{self.url} cannot be reached: {reason_of(error)}{more}.") from error


def _mark(info: dict[str, Any]) -> str:
    """What tells one version of a file from another."""
    found = next((info[name] for name in _MARKS if info.get(name) is not None), "")
    return f"{info.get('size')} {found}"


def _state_of(path: Path) -> list[int]:
    found = path.stat()
    return [found.st_size, found.st_mtime_ns]


def _user_cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "tersor" / "runs"
