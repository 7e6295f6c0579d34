"""A layer between the code under test and the file system, in which one write of a given number goes wrong.

A write is a folder or file that is made, a part written to a file, a file of safetensors, a rename, a statement or a
commit of SQLite. Only what lies below a folder is counted. What is not seen here is seen in `unseen`.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from tersor.models import files

WAYS = ("full", "io", "short", "killed")  # no space, a broken disk, half of a write, the end of the process
STATEMENTS = ("INSERT", "DELETE", "UPDATE", "CREATE")


class Killed(BaseException):
    """Ends the process as far as the code under test can tell: nothing is tidied up after it."""


class Faults:
    """Counts the writes below `folder` and lets the one of number `at` go wrong in a way."""

    def __init__(self, folder: Path, at: int | None = None, how: str = "") -> None:
        self.folder, self.at, self.how, self.count, self.dead = folder.resolve(), at, how, 0, False
        self.seen: set[Path] = set()
        self.before: set[Path] = set()
        self.last_rename = 0
        self.what = ""  # the write that went wrong

    def meet(self, what: str, path: Any, partly: Callable[[], Any] = lambda: None, kind: type = OSError) -> None:
        """One write more; `partly` does half of it."""
        if self.dead:
            raise Killed
        self.seen.add(Path(path).absolute())
        self.count += 1
        if self.count - 1 != self.at:
            return
        self.what = f"{what} of {Path(path).name}"
        if self.how in ("short", "killed"):
            partly()
        if self.how == "killed":
            self.dead = True
            raise Killed
        code = errno.EIO if self.how == "io" else errno.ENOSPC
        if kind is sqlite3.OperationalError:
            raise kind("disk I/O error" if self.how == "io" else "database or disk is full")
        raise kind(code, os.strerror(code)) if kind is OSError else kind(f"I/O error: {os.strerror(code)}")

    def has(self, path: Any) -> bool:
        return isinstance(path, str | os.PathLike) and Path(path).absolute().is_relative_to(self.folder)

    def unseen(self) -> list[Path]:
        """Files and folders that are new below the folder and were written past this layer."""
        return [path for path in self.folder.rglob("*") if path not in self.seen and path not in self.before]

    @contextmanager
    def installed(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        self.before = set(self.folder.rglob("*"))
        with monkeypatch.context() as patch:
            for owner, name in ((builtins, "open"), (io, "open")):
                patch.setattr(owner, name, self._opening(getattr(owner, name)))
            patch.setattr(os, "open", self._creating(os.open))
            patch.setattr(os, "mkdir", self._making(os.mkdir))
            patch.setattr(os, "replace", self._replacing(os.replace))
            patch.setattr(files, "save_file", self._saving(files.save_file))
            patch.setattr(sqlite3, "connect", self._connecting(sqlite3.connect))
            for owner, name in ((os, "unlink"), (os, "remove"), (os, "rmdir"), (shutil, "rmtree")):
                patch.setattr(owner, name, self._unless_dead(getattr(owner, name)))
            yield

    def _opening(self, function: Any) -> Any:
        def opened(path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            if not set(mode) & set("wax+") or not self.has(path):
                return function(path, mode, *args, **kwargs)
            self.meet("opening", path)
            return _File(function(path, mode, *args, **kwargs), path, self)

        return opened

    def _creating(self, function: Any) -> Any:
        def opened(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
            if flags & os.O_CREAT and self.has(path):
                self.meet("creation", path)
            return function(path, flags, *args, **kwargs)

        return opened

    def _making(self, function: Any) -> Any:
        def made(path: Any, *args: Any, **kwargs: Any) -> None:
            if self.has(path) and not os.path.exists(path):
                self.meet("creation", path)
            function(path, *args, **kwargs)

        return made

    def _replacing(self, function: Any) -> Any:
        def replaced(source: Any, target: Any) -> None:
            if self.has(target):
                self.last_rename = self.count
                self.meet("renaming", target)
                old, new = Path(source).absolute(), Path(target).absolute()
                self.seen |= {new / path.relative_to(old) for path in self.seen if path.is_relative_to(old)}
            function(source, target)

        return replaced

    def _saving(self, function: Any) -> Any:
        def saved(tensors: Any, path: Path, metadata: Any) -> None:
            function(tensors, path, metadata)
            self.meet("writing", path, lambda: os.truncate(path, path.stat().st_size // 2), SafetensorError)

        return saved

    def _connecting(self, function: Any) -> Any:
        def connected(path: Any, *args: Any, **kwargs: Any) -> Any:
            if not self.has(path):
                return function(path, *args, **kwargs)

            def meet(what: str) -> None:
                self.meet(what, path, kind=sqlite3.OperationalError)

            class Connection(sqlite3.Connection):
                def execute(self, query: str, *rest: Any) -> Any:
                    if query.lstrip().startswith(STATEMENTS):
                        meet("a statement")
                    return super().execute(query, *rest)

                def executemany(self, query: str, *rest: Any) -> Any:
                    meet("statements")
                    return super().executemany(query, *rest)

                def executescript(self, script: str) -> Any:
                    meet("a script")
                    return super().executescript(script)

                def __exit__(self, kind: Any, *rest: Any) -> Any:
                    if kind is None and self.in_transaction:
                        try:
                            meet("a commit")
                        except BaseException:
                            self.rollback()
                            raise
                    return super().__exit__(kind, *rest)

            return function(path, *args, **kwargs, factory=Connection)

        return connected

    def _unless_dead(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: None if self.dead else function(*args, **kwargs)


class _File:
    """A file that is written to through `Faults`; it has no descriptor, by which it could be written past them."""

    def __init__(self, file: Any, path: Any, faults: Faults) -> None:
        self._file, self._path, self._faults = file, path, faults

    def write(self, content: Any) -> Any:
        self._faults.meet("writing", self._path, lambda: self._file.write(content[: len(content) // 2]))
        return self._file.write(content)

    def fileno(self) -> int:
        raise io.UnsupportedOperation("fileno")

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *_: Any) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)
