"""Units of work in a pool of processes; results come as they finish, and are the same for any number of workers.

A unit is a pure function of picklable arguments. It runs with one thread of PyTorch, wherever it runs, so that sums are
taken in the same order; the pool makes up for the other cores.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
import time
import types
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from typing import Any

import torch

ALIVE = 1.0  # seconds between two looks whether the parent is there
_pool: ProcessPoolExecutor | None = None


def map_units(
    function: Callable[..., Any],
    units: Iterable[tuple[Any, Callable[[], tuple[Any, ...]]]],
    workers: int | None = None,
    *,
    in_order: bool = False,
) -> Iterator[tuple[Any, Any]]:
    """Yield (key, function(*arguments())) for units (key, arguments) as they finish, or in their order.

    Arguments are made only when a worker is free, so memory holds a few units at a time.
    """
    workers = workers or os.cpu_count() or 1
    if workers == 1:
        for key, arguments in units:
            with threads(1):
                result = function(*arguments())
            yield key, result
        return
    with pool_of(workers) as pool:
        waiting: dict[Future[Any], Any] = {}  # oldest first
        queue = iter(units)
        exhausted = False
        try:
            while waiting or not exhausted:
                while not exhausted and len(waiting) < workers + 1:
                    unit = next(queue, None)
                    if unit is None:
                        exhausted = True
                        break
                    with _without_main(), threads(1):
                        waiting[pool.submit(function, *unit[1]())] = unit[0]
                done = [next(iter(waiting))] if in_order and waiting else wait(waiting, return_when=FIRST_COMPLETED)[0]
                for future in done:
                    result = future.result()
                    yield waiting.pop(future), result
        finally:
            for future in waiting:
                future.cancel()


@contextmanager
def pool_of(workers: int | None = None) -> Iterator[ProcessPoolExecutor]:
    """A pool of processes, which all inside share, so that they start once; those inside may ask for fewer."""
    global _pool
    if _pool is not None:
        yield _pool
        return
    context = multiprocessing.get_context("spawn")
    count = workers or os.cpu_count() or 1
    _pool = ProcessPoolExecutor(count, mp_context=context, initializer=_begin, initargs=(os.getpid(),))
    try:
        yield _pool
    finally:
        _pool.shutdown(cancel_futures=True)
        _pool = None


def _begin(parent: int) -> None:
    """What a worker does first: one thread, and an end of its own should its parent be killed."""
    torch.set_num_threads(1)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(ALIVE)
    os._exit(1)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """So many threads of PyTorch inside, as many as before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _without_main() -> Iterator[None]:
    """Start workers without running the user's script again in each of them, guard or no guard."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
