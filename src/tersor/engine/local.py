"""The local engine: a pool of processes of this machine, which end when the one that started them does."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch

ALIVE = 1.0  # seconds between two looks whether the parent is there


class LocalPool:
    """Processes with one thread of PyTorch each, made when the first unit comes: often none does."""

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._processes: ProcessPoolExecutor | None = None

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        if self._processes is None:
            context, started = multiprocessing.get_context("spawn"), (os.getpid(),)
            self._processes = ProcessPoolExecutor(
                self._workers, mp_context=context, initializer=_begin, initargs=started
            )
        with _without_main():
            return self._processes.submit(function, *arguments)

    def share(self, value: Any) -> Any:
        """An argument of many units; a tensor moves to shared memory when it is first sent, and stays there."""
        return value

    def close(self) -> None:
        if self._processes is not None:
            self._processes.shutdown(cancel_futures=True)


def _begin(parent: int) -> None:
    """What a worker does first: one thread, and an end of its own should its parent be killed."""
    torch.set_num_threads(1)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(ALIVE)
    os._exit(1)


@contextmanager
def _without_main() -> Iterator[None]:
    """Start workers without running the user's script again in each of them, guard or no guard."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
