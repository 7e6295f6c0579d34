"""Probability models for the codes of a coded matrix, so that their bits can be compared at the same codes.

Each says how many bits the codes take, what it must tell the decoder included. Adaptive tables start from the table of
their class, worth some number of observations; the length of such a code is that of a Dirichlet-multinomial
distribution, whatever the order of the symbols, so nothing need be coded to know it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.special import gammaln

from tersor.coding import Coded, code_costs
from tersor.coding.tables import FAMILIES, costs

FREQUENCY_BITS = 16
SHIFTS = range(-6, 7)  # quarters of an octave
WORTHS = (8, 32, 128, 512, 2048)  # observations that the table of a class is worth as a prior
BRINKS = (0.6, 1.3)  # of the magnitudes of the neighbours over those expected: where levels of a context end
CHOICE_BITS = 8  # of a number that was chosen: a shift with its family, a worth
Array = np.ndarray[Any, Any]


def bits_by_model(coded: Coded) -> dict[str, float]:
    """Bits of the codes of a matrix under every model; `mixtures` is the one that ships."""
    table, classes = code_costs(coded)
    magnitudes = np.minimum(np.abs(coded.codes), table.shape[1] - 1)
    levels = _levels(magnitudes, classes, table)
    plain = _counts(magnitudes, classes, table.shape)
    split = [_counts(magnitudes[levels == k], classes[levels == k], table.shape) for k in range(len(BRINKS) + 1)]
    return {
        "mixtures (ships)": _static(plain, range(len(FAMILIES))),
        "Gaussians only": _static(plain, range(1)),
        "one table a site": _one_table(coded.codes),
        "a table a class": sum(_own_table(plain[k : k + 2].sum(0)) for k in range(0, len(plain), 2)),
        "mixtures, adaptive": _adaptive([plain], table),
        "contexts, adaptive": _adaptive(split, table),
        "contexts, a shift each": sum(_static(counts, range(len(FAMILIES))) + CHOICE_BITS for counts in split),
    }


def _counts(magnitudes: Array, classes: Array, shape: tuple[int, ...]) -> Array:
    """How often every magnitude comes in every class (classes, magnitudes)."""
    flat = classes.astype(np.int64).ravel() * shape[1] + magnitudes.ravel()
    return np.bincount(flat, minlength=shape[0] * shape[1]).reshape(shape)


def _levels(magnitudes: Array, classes: Array, table: Array) -> Array:
    """The context of every entry (rows, columns): its left and upper neighbours, already decoded, over their means."""
    chances = np.exp2(-table)
    means = 2 * (chances * np.arange(table.shape[1])).sum(1)[classes]
    found, expected = (_left_and_above(values.astype(float)) for values in (magnitudes, means))
    ratio = np.where(expected > 0, found / np.maximum(expected, 1e-12), 1.0)
    return np.searchsorted(BRINKS, ratio.ravel(), side="right").reshape(ratio.shape)


def _left_and_above(values: Array) -> Array:
    out = np.zeros_like(values)
    out[:, 1:] += values[:, :-1]
    out[1:] += values[:-1]
    return out


def _static(counts: Array, families: range) -> float:
    """The best family and shift of the classes; they stand in the header already."""
    rows = np.arange(len(counts))
    shifted = (np.clip(rows + shift, 0, len(counts) - 1) for shift in SHIFTS)
    return min(float((counts * costs(family)[index]).sum()) for index in shifted for family in families)


def _one_table(codes: Array) -> float:
    """One histogram of the codes from the least to the largest, 16 bits a frequency."""
    return _entropy(np.bincount((codes - codes.min()).ravel())) + FREQUENCY_BITS * float(np.ptp(codes) + 1)


def _own_table(counts: Array) -> float:
    """A histogram of magnitudes up to the largest, 16 bits a frequency, and a bit a sign."""
    used = np.flatnonzero(counts)
    if not len(used):
        return 0.0
    return _entropy(counts) + float(counts[1:].sum()) + FREQUENCY_BITS * float(used[-1] + 1)


def _entropy(counts: Array) -> float:
    counts = counts[counts > 0]
    return float((counts * np.log2(counts.sum() / counts)).sum())


def _adaptive(contexts: list[Array], table: Array) -> float:
    """Adaptive tables of magnitudes, one a class and context, with the worth of their priors that is best."""
    chances = np.exp2(-table)
    chances[:, 1:] *= 2  # both signs
    signs = float(sum(counts[:, 1:].sum() for counts in contexts))

    def length(worth: int) -> float:
        total = 0.0
        for counts in contexts:
            named = counts.sum(1)
            prior = worth * chances
            gained = (gammaln(prior + counts) - gammaln(prior)).sum() + (gammaln(worth) - gammaln(worth + named)).sum()
            total -= gained / np.log(2)
        return total

    return min(length(worth) for worth in WORTHS) + signs + CHOICE_BITS
