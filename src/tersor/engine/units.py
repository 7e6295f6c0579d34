"""Units of work on an engine; results come as they finish, and are the same for any engine and number of workers.

A unit is a pure function of picklable arguments. It runs with one thread of PyTorch, wherever it runs, so that sums are
taken in the same order; the pool makes up for the other cores.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from tersor.engine.local import LocalPool
from tersor.engine.ray import RayPool
from tersor.errors import TersorError

ENGINES = ("local", "ray")


class Pool(Protocol):
    """Workers, wherever they are."""

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]: ...

    def share(self, value: Any) -> Any: ...

    def close(self) -> None: ...


_pool: Pool | None = None


def map_units(
    function: Callable[..., Any],
    units: Iterable[tuple[Any, Callable[[], tuple[Any, ...]]]],
    workers: int | None = None,
    *,
    in_order: bool = False,
    shared: tuple[Any, ...] = (),
) -> Iterator[tuple[Any, Any]]:
    """Yield (key, function(*shared, *arguments())) for units (key, arguments) as they finish, or in their order.

    Arguments are made only when a worker is free, so memory holds a few units at a time; those `shared` by all units
    are handed over once. A single worker of this machine is this process.
    """
    workers = workers or os.cpu_count() or 1
    if workers == 1 and not isinstance(_pool, RayPool):
        for key, arguments in units:
            with threads(1):
                result = function(*shared, *arguments())
            yield key, result
        return
    with pool_of(workers) as pool:
        shared = tuple(pool.share(value) for value in shared)
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
                    with threads(1):
                        waiting[pool.submit(function, *shared, *unit[1]())] = unit[0]
                done = [next(iter(waiting))] if in_order and waiting else wait(waiting, return_when=FIRST_COMPLETED)[0]
                for future in done:
                    result = future.result()
                    yield waiting.pop(future), result
        finally:
            for future in waiting:
                future.cancel()


@contextmanager
def pool_of(workers: int | None = None, engine: str = "local", address: str | None = None) -> Iterator[Pool]:
    """A pool of workers, which all inside share, so that they start once; those inside may ask for fewer.

    `address` is that of a Ray cluster, by default one on this machine that ends with the pool. Raises TersorError for
    an engine that is none or cannot be reached.
    """
    global _pool
    if engine not in ENGINES:
        raise TersorError(f"There is no engine {engine!r}; choose {' or '.join(ENGINES)}.")
    if _pool is not None:
        yield _pool
        return
    count = workers or os.cpu_count() or 1
    _pool = RayPool(count, address) if engine == "ray" else LocalPool(count)
    try:
        yield _pool
    finally:
        _pool.close()
        _pool = None


@contextmanager
def threads(count: int) -> Iterator[None]:
    """So many threads of PyTorch inside, as many as before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
