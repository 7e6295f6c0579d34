"""A study and a build meet a fault at their writes, one after the other; given again, they make the same artifact.

What a write is, and how one goes wrong, says `faulty.py`. Some of the writes meet each fault here, every one of them in
`script/test --long`.
"""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from faulty import WAYS, Faults, Killed
from safetensors.torch import load_file

from tersor.errors import TersorError
from tersor.run import Run
from tersor.steps import build_plan, open_study, reopen, study
from tiny_models import small_net, write_model, write_texts
from tiny_models import vector_batches as batches

SIZES = (0, 1 << 10, 30 << 10)  # bytes that no file may pass


class Module:
    """The study of a module in memory, and a build of it."""

    every = 16  # so many writes lie between two that meet a fault, but in a long run

    def __init__(self, home: Path, quick: dict[str, Any]) -> None:
        self.quick = quick

    def begin(self, folder: Path) -> None:
        """What is there before the work begins."""

    def do(self, folder: Path) -> None:
        opened = study(small_net(), batches(), folder / "run", **self.quick)
        build_plan(opened, opened.plan("5bits"), folder / "out", workers=1)
        opened.run.close()

    def made(self, folder: Path) -> dict[str, bytes]:
        """Do the work and return the files of its artifact."""
        self.do(folder)
        return {str(p.relative_to(folder)): p.read_bytes() for p in sorted((folder / "out").rglob("*")) if p.is_file()}


class Checkpoint(Module):
    """A build in shards of a checkpoint that stays on disk, where an artifact in one file lies already."""

    every = 20

    def __init__(self, home: Path, quick: dict[str, Any]) -> None:
        pytest.importorskip("transformers")
        write_model(home / "model", intermediate_size=96)
        write_texts(home / "text.txt", 8, 0)
        self.before = home / "before"
        options = {**quick, "exclude": ["*self_attn*"], "sequence_length": 16, "memory": "4GB"}
        opened = study(home / "model", home / "text.txt", self.before / "run", **options)
        build_plan(opened, opened.plan("8bits"), self.before / "out", workers=1)
        opened.run.close()

    def begin(self, folder: Path) -> None:
        shutil.copytree(self.before, folder)

    def do(self, folder: Path) -> None:
        opened = reopen(folder / "run", memory="4GB")
        build_plan(opened, opened.plan("10bits"), folder / "out", workers=1, shard_size="50KB")
        opened.run.close()


@pytest.mark.parametrize("kind", [Module, Checkpoint])
def test_every_fault_is_survived(
    kind: type[Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: dict[str, Any], long: bool,
    counted: Callable[[str], None],
) -> None:  # fmt: skip
    work, counting, every = kind(tmp_path, quick), Faults(tmp_path / "whole"), 1 if long else kind.every
    work.begin(tmp_path / "whole")
    with counting.installed(monkeypatch):
        whole = work.made(tmp_path / "whole")
    assert counting.count > 40 and not counting.unseen()
    injected = compared = 0
    for number, how in enumerate(WAYS):
        for at in {*range(number * every // len(WAYS), counting.count, every), counting.last_rename}:
            folder = tmp_path / f"{how}-{at}"
            work.begin(folder)
            faults = Faults(folder, at, how)
            with faults.installed(monkeypatch), pytest.raises(Killed if how == "killed" else TersorError):
                work.do(folder)
            injected += 1
            _nothing_is_half_written(folder, strays=how == "killed")
            assert work.made(folder) == whole, f"{faults.what}, {at} of {counting.count}, {how}"
            assert not list(folder.rglob(".*.tmp"))
            compared += sum(map(len, whole.values()))
            shutil.rmtree(folder)
    counted(f"{injected} faults at {counting.count} writes, {compared:,} bytes compared")


def _nothing_is_half_written(folder: Path, *, strays: bool) -> None:
    """Every file under its own name is whole; temporary ones are left by the killed alone."""
    names = [path for path in folder.rglob("*") if path.is_file()]
    temporary = [path for path in names if any(part.endswith(".tmp") for part in path.relative_to(folder).parts)]
    assert strays or not temporary
    for path in set(names) - set(temporary):
        if path.suffix == ".safetensors":
            load_file(path)
    if (folder / "out" / "tersor.json").exists():
        assert list((folder / "out").glob("model*.safetensors"))


def test_files_that_may_not_grow(quick: dict[str, Any], tmp_path: Path, counted: Callable[[str], None]) -> None:
    """The system itself refuses to let a file grow beyond a size, whoever writes it."""
    work, usual = Module(tmp_path, quick), resource.getrlimit(resource.RLIMIT_FSIZE)
    whole = work.made(tmp_path / "whole")
    for size in SIZES:
        folder = tmp_path / str(size)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, usual[1]))
        try:
            with pytest.raises(TersorError):
                work.do(folder)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, usual)
        _nothing_is_half_written(folder, strays=False)
        assert work.made(folder) == whole
    counted(f"{len(SIZES)} sizes that no file may pass, {len(SIZES) * sum(map(len, whole.values())):,} bytes compared")


def test_a_second_process_is_told_who_works(quick: dict[str, Any], tmp_path: Path) -> None:
    opened = study(small_net(), batches(), tmp_path / "run", **quick)
    other = Run(tmp_path / "run")
    with other.alone(), pytest.raises(TersorError, match=rf"Process {os.getpid()} on .* works in .*run; wait for it"):
        study(small_net(), batches(), tmp_path / "run", **quick)
    assert other.worker() is None and opened.run.worker() is None
    assert open_study(small_net(), tmp_path / "run").plan("5bits").choices
