"""Timing calls on the device of a model, two of them in turn so that a busy machine slows both."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray


def seconds_of(device: torch.device, run: Callable[[], Any]) -> float:
    """Seconds until a call is done, on the device too."""
    _synchronise(device)
    start = time.perf_counter()
    run()
    _synchronise(device)
    return time.perf_counter() - start


def in_turn(
    device: torch.device,
    first: Callable[[], Any],
    second: Callable[[], Any],
    rounds: int,
    longest: float = float("inf"),
) -> NDArray[np.float64]:
    """Seconds (2, rounds) of two calls in turn, after one of each that does not count; fewer rounds, but three at the
    least, where they take longer than `longest` seconds."""
    first(), second()
    times: list[tuple[float, float]] = []
    start = time.perf_counter()
    while len(times) < min(3, rounds) or (len(times) < rounds and time.perf_counter() - start < longest):
        times.append((seconds_of(device, first), seconds_of(device, second)))
    return np.array(times).T


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
