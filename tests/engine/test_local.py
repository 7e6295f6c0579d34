"""Units give the same results for any number of workers, and arguments are made only when they are needed."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tersor.curves.draw import draw_unit
from tersor.engine import map_units
from tersor.errors import TersorError
from tersor.metrics import Metric, Side


def units(count: int) -> Iterator[tuple[str, Callable[[], tuple[Any, ...]]]]:
    for number in range(count):
        yield f"site {number}", partial(arguments, number)


def arguments(number: int) -> tuple[Tensor, list[Metric], list[str]]:
    generator = torch.Generator().manual_seed(number)
    moments = [torch.randn(n, 2 * n, generator=generator) for n in (48, 64)]
    rows, columns = (Side(m @ m.T / m.shape[1]) for m in moments)
    return torch.randn(1, 48, 64, generator=generator), [Metric("kronecker", rows, columns, 0.5)], ["int", "lowrank"]


def test_one_worker_and_two_agree_to_the_bit() -> None:
    alone, together = (
        {key: {name: curve for name, (curve, _) in curves.items()} for key, curves in map_units(draw_unit, units(3), n)}
        for n in (1, 2)
    )
    assert alone == together and set(alone) == {"site 0", "site 1", "site 2"}
    assert all(len(curve) > 3 for curves in alone.values() for curve in curves.values())


def threads() -> int:
    return torch.get_num_threads()


def test_a_unit_runs_with_one_thread_and_gives_them_back() -> None:
    torch.set_num_threads(2)
    assert list(map_units(threads, [("unit", tuple)], 1)) == [("unit", 1)]
    assert torch.get_num_threads() == 2


def test_arguments_are_made_one_at_a_time() -> None:
    made: list[int] = []

    def lazily(number: int) -> tuple[int]:
        made.append(number)
        return (number,)

    results = map_units(abs, ((k, partial(lazily, k)) for k in range(-5, 0)), 1)
    assert next(results) == (-5, 5)
    assert made == [-5]


def failing(number: int) -> int:
    raise TersorError(f"unit {number} is bad")


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_of_a_unit_is_raised_as_it_is(workers: int) -> None:
    with pytest.raises(TersorError, match="unit 7 is bad"):
        list(map_units(failing, [("one", partial(tuple, [7]))], workers))


PARENT = """
import os, time
from functools import partial
from tersor.engine import map_units, pool_of

with pool_of(2):
    print(*{pid for _, pid in map_units(os.getpid, ((n, tuple) for n in range(20)), 2)}, flush=True)
    list(map_units(time.sleep, ((n, partial(tuple, [600])) for n in range(2)), 2))
"""


def test_workers_do_not_outlive_a_parent_that_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(PARENT, encoding="utf8")
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        workers = [int(pid) for pid in parent.stdout.readline().split()]
        parent.kill()
    assert workers
    for _ in range(300):
        if not any(alive(pid) for pid in workers):
            return
        time.sleep(0.1)
    pytest.fail("a worker is still there")


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended but is not waited for does not."""
    state = Path(f"/proc/{pid}/stat")
    if not Path("/proc").exists():
        pytest.skip("this system has no /proc")
    return state.exists() and state.read_text(encoding="utf8").rpartition(")")[2].split()[0] != "Z"
