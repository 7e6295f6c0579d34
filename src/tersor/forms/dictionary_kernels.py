"""The loops of a sparse decomposition, compiled: pursuit of a support, least squares on it, and a sweep over the atoms.

Signals and atoms are rows. All three work on one signal or atom at a time, so that what they touch stays in the cache.
Kept apart because importing the compiler takes half a second, which loading a model need not pay.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

Array = np.ndarray[Any, Any]
TINY = 1e-6  # an atom with less than this share of its norm outside of those already chosen adds nothing


@numba.njit(cache=True, nogil=True, fastmath={"reassoc", "contract", "nsz"})
def pursue(correlations: Array, gram: Array, index: Array, values: Array) -> None:
    """Orthogonal matching pursuit of every signal into `index` and `values` (signals, entries).

    `correlations` (signals, atoms) are the products of signals and atoms, overwritten; `gram` (atoms, atoms) those of
    the atoms. A step takes the atom that lessens the squared error most, found by a Cholesky factorisation that grows
    with the support: row `t` of `factor` holds the products of all atoms with the t-th orthogonalised one.
    """
    atoms, entries = gram.shape[0], index.shape[1]
    factor = np.empty((entries, atoms), dtype=gram.dtype)
    left, along = np.empty(atoms, dtype=gram.dtype), np.empty(entries, dtype=gram.dtype)
    free = np.empty(atoms, dtype=np.bool_)
    for j in range(index.shape[0]):
        correlation = correlations[j]
        for a in range(atoms):
            left[a], free[a] = gram[a, a], True
        size = 0
        while size < entries:
            best, chosen = gram.dtype.type(0), -1
            for a in range(atoms):
                if free[a] and left[a] > TINY * gram[a, a]:
                    gain = correlation[a] * correlation[a] / left[a]
                    if gain > best:
                        best, chosen = gain, a
            if chosen < 0:
                break
            root = np.sqrt(left[chosen])
            row = factor[size]
            for a in range(atoms):
                row[a] = gram[chosen, a]
            for t in range(size):
                share = factor[t, chosen]
                for a in range(atoms):
                    row[a] -= share * factor[t, a]
            along[size] = correlation[chosen] / root
            for a in range(atoms):
                row[a] /= root
                correlation[a] -= along[size] * row[a]
                left[a] -= row[a] * row[a]
            free[chosen] = False
            index[j, size] = chosen
            size += 1
        for t in range(size - 1, -1, -1):
            value = along[t]
            for u in range(t + 1, size):
                value -= factor[t, index[j, u]] * values[j, u]
            values[j, t] = value / factor[t, index[j, t]]
        unused = 0
        for t in range(size, entries):
            while not free[unused]:
                unused += 1
            free[unused] = False
            index[j, t], values[j, t] = unused, 0


@numba.njit(cache=True, nogil=True, fastmath={"reassoc", "contract", "nsz"})
def least_squares(correlations: Array, gram: Array, index: Array, values: Array) -> None:
    """The best `values` (signals, entries) of every signal on its support `index`; atoms that add nothing get zero."""
    entries = index.shape[1]
    lower, along = np.empty((entries, entries), dtype=gram.dtype), np.empty(entries, dtype=gram.dtype)
    for j in range(index.shape[0]):
        support = index[j]
        for t in range(entries):
            for u in range(t + 1):
                rest = gram[support[t], support[u]]
                for v in range(u):
                    rest -= lower[t, v] * lower[u, v]
                if u < t:
                    lower[t, u] = rest / lower[u, u] if lower[u, u] > 0 else 0
                else:
                    lower[t, t] = np.sqrt(rest) if rest > TINY * gram[support[t], support[t]] else 0
            rest = correlations[j, support[t]]
            for v in range(t):
                rest -= lower[t, v] * along[v]
            along[t] = rest / lower[t, t] if lower[t, t] > 0 else 0
        for t in range(entries - 1, -1, -1):
            rest = along[t]
            for u in range(t + 1, entries):
                rest -= lower[u, t] * values[j, u]
            values[j, t] = rest / lower[t, t] if lower[t, t] > 0 else 0


@numba.njit(cache=True, nogil=True, fastmath={"reassoc", "contract", "nsz"})
def sweep(error: Array, atoms: Array, values: Array, weights: Array, order: Array, starts: Array) -> None:
    """One round of approximate K-SVD: every atom in turn, and its values, by one step of a power iteration.

    `error` (signals, n) is what all atoms leave; it, `atoms` (atoms, n) and `values` (signals, entries) are updated.
    `order[starts[a] : starts[a + 1]]` are the flat places in `values` of atom `a`, `weights` (signals,) what squared
    errors of a signal count.
    """
    entries, length = values.shape[1], atoms.shape[1]
    new = np.empty(length, dtype=atoms.dtype)
    for a in range(atoms.shape[0]):
        users, own = order[starts[a] : starts[a + 1]], atoms.dtype.type(0)
        new[:] = 0
        for place in users:
            j = place // entries
            value = values[j, place % entries]
            weight = weights[j] * value
            own += weight * value
            for i in range(length):
                new[i] += weight * error[j, i]
        norm = atoms.dtype.type(0)
        for i in range(length):
            new[i] += own * atoms[a, i]
            norm += new[i] * new[i]
        if norm <= 1e-30:
            continue
        norm = np.sqrt(norm)
        for i in range(length):
            new[i] /= norm
        for place in users:
            j, t = place // entries, place % entries
            value, moved = values[j, t], atoms.dtype.type(0)
            for i in range(length):
                error[j, i] += value * atoms[a, i]
                moved += error[j, i] * new[i]
            values[j, t] = moved
            for i in range(length):
                error[j, i] -= moved * new[i]
        for i in range(length):
            atoms[a, i] = new[i]
