"""Bootstrap intervals: how far a mean, or a difference of two scores, could have come out by chance of the sample.

Samples are resampled whole (windows, texts, images), and both models on the same resample, so differences are paired.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

RESAMPLES = 1000


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


def bootstrap(
    statistic: Callable[[np.ndarray], float], count: int, seed: int = 0, resamples: int = RESAMPLES
) -> Estimate:
    """`statistic` of indices into `count` samples: its value on all of them and its interval."""
    generator = np.random.default_rng(seed)
    draws = [statistic(generator.integers(0, count, count)) for _ in range(resamples)]
    low, high = np.nanpercentile(draws, (2.5, 97.5))
    return Estimate(float(statistic(np.arange(count))), float(low), float(high))


def mean_estimate(values: np.ndarray, seed: int = 0) -> Estimate:
    """The mean of values (samples,)."""
    return bootstrap(lambda index: float(values[index].mean()), len(values), seed)
