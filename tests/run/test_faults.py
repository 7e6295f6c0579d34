"""A study and a build meet a fault at their writes, one after the other; given again, they make the same artifact.

A write is a file before its rename, a rename, or a transaction. Every seventh meets each fault here, every one of them
in `script/test --long`.
"""

from __future__ import annotations

import errno
import os
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tersor.errors import TersorError
from tersor.models import files
from tersor.run import Run
from tersor.steps import build_plan, open_study, study
from tiny_models import small_net
from tiny_models import vector_batches as batches

ARTIFACT = ("model.safetensors", "tersor.json")


class Killed(BaseException):
    """Ends the process as far as the code under test can tell: nothing is tidied up after it."""


class Faults:
    """Counts writes and lets the one of number `at` fail in a way."""

    def __init__(self, at: int | None = None, how: str = "") -> None:
        self.at, self.how, self.count, self.dead = at, how, 0, False

    def meet(self, partly: Callable[[], Any] = lambda: None) -> None:
        """One write more; `partly` does half of it."""
        self.count += 1
        if self.count - 1 != self.at:
            return
        if self.how == "short":
            partly()
        if self.how == "killed":
            partly()
            self.dead = True
            raise Killed
        raise OSError(errno.EIO if self.how == "io" else errno.ENOSPC, os.strerror(errno.ENOSPC))

    @contextmanager
    def installed(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        with monkeypatch.context() as patch:
            replace, write, save, text = os.replace, Run._write, files.save_file, Path.write_text

            def replacing(source: Any, target: Any) -> None:
                self.meet()
                replace(source, target)

            def saving(tensors: Any, path: Any, metadata: Any) -> None:
                save(tensors, path, metadata)
                self.meet(lambda: os.truncate(path, os.path.getsize(path) // 2))

            def writing(path: Path, content: str, **rest: Any) -> int:
                self.meet(lambda: text(path, content[: len(content) // 2], **rest))
                return text(path, content, **rest)

            @contextmanager
            def transaction(run: Run) -> Iterator[sqlite3.Connection]:
                with write(run) as db:
                    try:
                        self.meet()
                    except OSError as error:
                        raise sqlite3.OperationalError(f"database or disk is full ({error})") from error
                    yield db

            patch.setattr(files.os, "replace", replacing)
            patch.setattr(files, "save_file", saving)
            patch.setattr(Path, "write_text", writing)
            patch.setattr(Run, "_write", transaction)
            patch.setattr(Path, "unlink", self._unless_dead(Path.unlink))
            patch.setattr(shutil, "rmtree", self._unless_dead(shutil.rmtree))
            yield

    def _unless_dead(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: None if self.dead else function(*args, **kwargs)


def made(folder: Path, quick: dict[str, Any]) -> dict[str, bytes]:
    """Study and build, and the bytes of the artifact."""
    opened = study(small_net(), batches(), folder / "run", **quick)
    plan = opened.plan("5bits")
    build_plan(opened, plan, folder / "out", workers=1)
    opened.run.close()
    return {name: (folder / "out" / name).read_bytes() for name in ARTIFACT}


def test_every_fault_is_survived(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: dict[str, Any], long: bool
) -> None:
    counting = Faults()
    with counting.installed(monkeypatch):
        whole = made(tmp_path / "whole", quick)
    assert counting.count > 40
    injected = compared = 0
    for how in ("full", "io", "short", "killed"):
        for at in range(0, counting.count, 1 if long else 7):
            folder = tmp_path / f"{how}-{at}"
            faults = Faults(at, how)
            with faults.installed(monkeypatch), pytest.raises(Killed if how == "killed" else TersorError):
                made(folder, quick)
            injected += 1
            _nothing_is_half_written(folder, strays=how == "killed")
            assert made(folder, quick) == whole, f"write {at} of {counting.count}, {how}"
            assert not list(folder.rglob(".*.tmp"))
            compared += sum(map(len, whole.values()))
            shutil.rmtree(folder)
    print(f"{injected} faults at {counting.count} writes, {compared:,} bytes compared")


def _nothing_is_half_written(folder: Path, *, strays: bool) -> None:
    """Every file under its own name is whole; temporary ones are left by the killed alone."""
    names = [path for path in folder.rglob("*") if path.is_file()]
    temporary = [path for path in names if any(part.endswith(".tmp") for part in path.relative_to(folder).parts)]
    assert strays or not temporary
    for path in set(names) - set(temporary):
        if path.suffix == ".safetensors":
            load_file(path)
    if (folder / "out" / "tersor.json").exists():
        assert (folder / "out" / "model.safetensors").exists()


def test_a_second_process_is_told_who_works(quick: dict[str, Any], tmp_path: Path) -> None:
    opened = study(small_net(), batches(), tmp_path / "run", **quick)
    other = Run(tmp_path / "run")
    with other.alone(), pytest.raises(TersorError, match=rf"Process {os.getpid()} on .* works in .*run; wait for it"):
        study(small_net(), batches(), tmp_path / "run", **quick)
    assert other.worker() is None and opened.run.worker() is None
    assert open_study(small_net(), tmp_path / "run").plan("5bits").choices
