"""Units of work in a pool of processes; results come as they finish, and are the same for any number of workers.

A unit is a pure function of picklable arguments. It runs with one thread of PyTorch, wherever it runs, so that sums are
taken in the same order; the pool makes up for the other cores.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from typing import Any

import torch


def map_units(
    function: Callable[..., Any], units: Iterable[tuple[Any, Callable[[], tuple[Any, ...]]]], workers: int | None = None
) -> Iterator[tuple[Any, Any]]:
    """Yield (key, function(*arguments())) for units (key, arguments) in the order in which they finish.

    Arguments are made only when a worker is free, so memory holds a few units at a time.
    """
    workers = workers or os.cpu_count() or 1
    if workers == 1:
        for key, arguments in units:
            with one_thread():
                result = function(*arguments())
            yield key, result
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        waiting: dict[Future[Any], Any] = {}
        queue = iter(units)
        exhausted = False
        try:
            while waiting or not exhausted:
                while not exhausted and len(waiting) < workers + 1:
                    unit = next(queue, None)
                    if unit is None:
                        exhausted = True
                        break
                    with _without_main(), one_thread():
                        waiting[pool.submit(function, *unit[1]())] = unit[0]
                done, _ = wait(waiting, return_when=FIRST_COMPLETED)
                for future in done:
                    yield waiting.pop(future), future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread of PyTorch inside, as many as before afterwards."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _without_main() -> Iterator[None]:
    """Start workers without running the user's script again in each of them, guard or no guard."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
