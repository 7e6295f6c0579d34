"""The inner loops of vector quantisation, compiled: vectors of one tile from the last to the first.

Kept apart because importing the compiler takes half a second.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

Array = np.ndarray[Any, Any]
_compiled = numba.njit(cache=True, nogil=True, fastmath={"reassoc", "contract", "nsz"})
AGAIN = 2  # times that every stage is chosen again, given the others
FIRST_PULL, HARDER = 0.01, 1.4  # towards zero, where the nearest point of the lattice lies outside of the codebook


@_compiled
def settle(
    external: Array,
    weight: Array,
    row_scales: Array,
    column_scales: Array,
    seen_as: Array,
    energies: Array,
    onto: Array,
    back: Array,
    lower_o: Array,
    lower_i: Array,
    roots: Array,
    entries: Array,
    seen: Array,
    offsets: Array,
    steps: Array,
    codes: Array,
    error: Array,
) -> None:
    """Choose the codes of a tile of `weight` (rows, columns), a vector of m columns after the other; leaves its error.

    `external` (rows, columns) is what errors outside of the tile add, `roots` (columns,) roots of the column pivots,
    `seen_as` (vectors, m, m) how the metric sees a vector of a row in units of its scales. With `seen_as = T`,
    `energies` (vectors, m) are the eigenvalues of `T T^T`, `back` its eigenvectors `V` and `onto` is `T^T V`. Without
    `steps`, `codes` (rows, vectors, stages) number `entries` (all, m), which are seen as `seen` (vectors, m, all);
    those of stage `s` start at `offsets[s]`. With `steps` (stages,) `codes` (rows, vectors, stages m) are doubled
    points of E8 of squared norms of at most `offsets[s]`, and `entries` the doubled points next to zero.
    """
    rows, m = weight.shape[0], seen_as.shape[1]
    along, moved = np.empty((rows, m), weight.dtype), np.empty((rows, m), weight.dtype)
    z, made = np.empty(m, weight.dtype), np.empty(m, weight.dtype)
    for j in range(len(seen_as) - 1, -1, -1):
        start, stop = j * m, (j + 1) * m
        for i in range(rows):
            for c in range(m):
                total = weight.dtype.type(0)
                for b in range(stop, weight.shape[1]):
                    total += error[i, b] * lower_i[b, start + c]
                along[i, c] = total
                moved[i, c] = external[i, start + c] + total
        for i in range(rows - 1, -1, -1):
            for c in range(m):
                total = moved[i, c]
                for b in range(c, m):
                    total += weight[i, start + b] * lower_i[start + b, start + c]
                z[c] = total * roots[start + c] / row_scales[i]
            made[:] = 0
            if len(steps):
                eigen = energies[j], onto[j], back[j]
                _lattice_stages(z, seen_as[j], *eigen, entries, seen[j], offsets, steps, codes[i, j], made)
            else:
                _learned_stages(z, entries, seen[j], offsets, codes[i, j], made)
            for c in range(m):
                error[i, start + c] = weight[i, start + c] - made[c] * row_scales[i] * column_scales[start + c]
            if len(lower_o):
                for c in range(m):
                    felt = along[i, c]
                    for b in range(c, m):
                        felt += error[i, start + b] * lower_i[start + b, start + c]
                    for k in range(i):
                        moved[k, c] += felt * lower_o[i, k]


@_compiled
def _learned_stages(z: Array, entries: Array, seen: Array, offsets: Array, codes: Array, made: Array) -> None:
    """Stage after stage the entry nearest to what is left of `z`, then each again given the others."""
    stages = len(offsets) - 1
    distances = np.empty(seen.shape[1], z.dtype)
    for turn in range(1 if stages == 1 else 1 + AGAIN):
        for s in range(stages):
            first, last = offsets[s], offsets[s + 1]
            if turn > 0:
                for c in range(len(z)):
                    z[c] += seen[c, first + codes[s]]
            distances[first:last] = 0
            for c in range(len(z)):
                here = z[c]
                for k in range(first, last):
                    distances[k] += (here - seen[c, k]) * (here - seen[c, k])
            codes[s] = np.argmin(distances[first:last])
            for c in range(len(z)):
                z[c] -= seen[c, first + codes[s]]
    for s in range(stages):
        for c in range(len(z)):
            made[c] += entries[offsets[s] + codes[s], c]


@_compiled
def _lattice_stages(
    z: Array,
    seen_as: Array,
    energies: Array,
    onto: Array,
    back: Array,
    near: Array,
    near_seen: Array,
    radii: Array,
    steps: Array,
    codes: Array,
    made: Array,
) -> None:
    """Stage after stage a point near to what is left of `z`: the nearest as it lies, then the best next to it."""
    m = len(z)
    u, point, other = np.empty(m, z.dtype), np.empty(m, np.int64), np.empty(m, np.int64)
    for s in range(len(steps)):
        half, pull = z.dtype.type(0.5) * steps[s], z.dtype.type(0)
        _pulled(z, energies, onto, back, pull, u)
        _nearest(u, 1 / steps[s], point, other)
        while (point * point).sum() > 4 * radii[s]:
            pull = max(z.dtype.type(HARDER) * pull, z.dtype.type(FIRST_PULL) * energies.mean())
            _pulled(z, energies, onto, back, pull, u)
            _nearest(u, 1 / steps[s], point, other)
        for c in range(m):
            for b in range(c, m):
                z[c] -= half * point[b] * seen_as[b, c]
        best, chosen = z.dtype.type(np.inf), 0
        for k in range(len(near)):
            norm = 0
            distance = z.dtype.type(0)
            for c in range(m):
                norm += (point[c] + near[k, c]) ** 2
                gap = z[c] - steps[s] * near_seen[c, k]
                distance += gap * gap
            if distance < best and norm <= 4 * radii[s]:
                best, chosen = distance, k
        for c in range(m):
            z[c] -= steps[s] * near_seen[c, chosen]
            codes[s * m + c] = point[c] + near[chosen, c]
            made[c] += half * codes[s * m + c]


@_compiled
def _pulled(z: Array, energies: Array, onto: Array, back: Array, pull: float, u: Array) -> None:
    """`u` that makes `|u seen_as - z|^2 + pull |u|^2` least: what the metric sees least gives way first."""
    u[:] = 0
    for k in range(len(z)):
        along = z.dtype.type(0)
        for c in range(len(z)):
            along += z[c] * onto[c, k]
        along /= energies[k] + pull
        for c in range(len(z)):
            u[c] += along * back[c, k]


@_compiled
def _nearest(u: Array, shrink: float, best: Array, other: Array) -> None:
    """The doubled point of E8 nearest to `shrink u`: the better of the two cosets of D8 (Conway and Sloane, 1982)."""
    if _coset(u, shrink, 1, other) < _coset(u, shrink, 0, best):
        best[:] = other


@_compiled
def _coset(u: Array, shrink: float, odd: int, point: Array) -> float:
    """The nearest doubled point whose coordinates are all even, or all odd; returns its squared distance, undoubled."""
    worst, at, away, total, distance = -1.0, 0, 1, 0, 0.0
    for c in range(len(u)):
        x = min(max(shrink * u[c], -99.0), 99.0) - 0.5 * odd
        near = np.rint(x)
        gap = x - near
        distance += gap * gap
        total += int(near)
        if abs(gap) > worst:
            worst, at, away = abs(gap), c, (1 if gap >= 0 else -1)
        point[c] = 2 * int(near) + odd
    if total % 2:
        point[at] += 2 * away
        distance += (1 - worst) ** 2 - worst**2
    return distance


@_compiled
def nearest(vectors: Array, importance: Array, centres: Array) -> Array:
    """The number (n,) of the centre, of `centres` (m, count), nearest to each of `vectors` (n, m), entries weighted."""
    found, distances = np.empty(len(vectors), np.int64), np.empty(centres.shape[1], vectors.dtype)
    for i in range(len(vectors)):
        distances[:] = 0
        for c in range(len(centres)):
            here, weight = vectors[i, c], importance[i, c]
            for k in range(len(distances)):
                distances[k] += weight * (here - centres[c, k]) * (here - centres[c, k])
        found[i] = np.argmin(distances)
    return found
