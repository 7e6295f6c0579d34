"""Processes killed at random moments: the same command goes on, and ends with the same artifact to the byte.

Three kills here, fifty in `script/test --long`.
"""

from __future__ import annotations

import multiprocessing
import random
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from tersor.steps import build_plan, study
from tiny_models import small_net
from tiny_models import vector_batches as batches


def work(folder: Path, options: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    opened = study(small_net(), batches(), folder / "run", **options)
    build_plan(opened, opened.plan("5bits"), folder / "out", workers=1)


def begun(folder: Path, options: dict[str, Any]) -> BaseProcess:
    """The work, in a process forked from one that has imported what takes long."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tersor.steps"])
    process = context.Process(target=work, args=(folder, options))
    process.start()
    return process


def artifact(folder: Path) -> list[bytes]:
    return [(folder / "out" / name).read_bytes() for name in ("model.safetensors", "tersor.json")]


def test_killed_at_any_moment_it_goes_on(
    quick: dict[str, Any], tmp_path: Path, long: bool, counted: Callable[[str], None]
) -> None:
    options = {**quick, "gains": True}
    begun(tmp_path / "first", options).join()  # the compiler's cache is filled
    start = time.monotonic()
    begun(tmp_path / "whole", options).join()
    seconds = time.monotonic() - start
    whole, compared = artifact(tmp_path / "whole"), 0
    chance, kills, finished, wanted = random.Random(0), 0, 0, 50 if long else 3
    while kills < wanted or finished == 0:
        folder = tmp_path / str(finished)
        process = begun(folder, options)
        process.join(chance.uniform(0, seconds / 2) if kills < wanted else None)
        if process.is_alive():
            process.kill()
            kills += 1
        process.join()
        if process.exitcode == 0:
            assert artifact(folder) == whole
            finished, compared = finished + 1, compared + sum(map(len, whole))
    counted(f"{kills} kills, {finished} artifacts of {seconds:.1f} s each, {compared:,} bytes compared")
