"""The integer tables: exact where the mathematics is known, and the same on every machine."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import pytest

from tersor.coding.tables import FAMILIES, HIGHEST, LOWEST, TOTAL, costs, frequencies, reach_of

INDICES = (LOWEST, -9, -1, 0, 1, 7, 16, HIGHEST)


def gaussian_masses(deviation: float, reach: int) -> np.ndarray:
    """The masses of -reach to reach of a rounded Gaussian."""

    def below(x: float) -> float:
        return 0.5 * math.erfc(-x / deviation / math.sqrt(2))

    return np.array([below(k + 0.5) - below(k - 0.5) for k in range(-reach, reach + 1)])


@pytest.mark.parametrize("index", INDICES)
@pytest.mark.parametrize("family", range(len(FAMILIES)))
def test_a_table_is_a_distribution(family: int, index: int) -> None:
    table = frequencies(family, index)
    assert table.sum() == TOTAL and table.min() >= 1
    assert len(table) == 2 * reach_of(index) + 2
    assert np.array_equal(table[:-1], table[:-1][::-1])


@pytest.mark.parametrize("index", INDICES)
def test_the_first_family_is_the_rounded_gaussian(index: int) -> None:
    table, reach = frequencies(0, index), reach_of(index)
    exact = TOTAL * gaussian_masses(2 ** (index / 4), reach)
    sides = np.arange(2 * reach + 1) != reach
    assert np.abs(table[:-1] - np.maximum(exact, 1))[sides].max() <= 0.5 + 1e-6  # what is left over is the middle's
    assert abs(table[reach] - exact[reach]) <= 2 * reach + 1


@pytest.mark.parametrize("family", range(1, len(FAMILIES)))
def test_mixtures_have_nearly_the_variance_of_their_index(family: int) -> None:
    table, reach = frequencies(family, 16), reach_of(16)
    values = np.arange(-reach, reach + 1)
    assert (table[:-1] * values**2).sum() / TOTAL == pytest.approx(4.0**4, rel=0.1)


def test_costs_are_those_of_the_tables() -> None:
    table, reach = frequencies(1, 3), reach_of(3)
    assert costs(1)[3 - LOWEST, : reach + 1] == pytest.approx(-np.log2(table[reach:-1] / TOTAL))
    assert (costs(1)[3 - LOWEST, reach + 1 :] > 20).all()


def test_the_tables_are_those_of_version_1() -> None:
    """A file of version 1 is read with these tables forever."""
    every = [
        frequencies(f, i).astype("<u4").tobytes() for f in range(len(FAMILIES)) for i in range(LOWEST, HIGHEST + 1)
    ]
    assert hashlib.sha256(b"".join(every)).hexdigest()[:16] == "a059771d0899477e"
