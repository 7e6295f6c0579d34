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
    norms: Array,
    gram: Array,
    offsets: Array,
    steps: Array,
    codes: Array,
    error: Array,
) -> None:
    """Choose the codes of a tile of `weight` (rows, columns), a vector of m columns after the other; leaves its error.

    `external` (rows, columns) is what errors outside of the tile add, `roots` (columns,) roots of the column pivots,
    `seen_as` (vectors, m, m) how the metric sees a vector of a row in units of its scales. With `seen_as = T`,
    `energies` (vectors, m) are the eigenvalues of `T T^T`, `back` its eigenvectors `V` and `onto` is `T^T V`. Without
    `steps`, `codes` (rows, vectors, stages) number `entries` (m, all), which are seen as `seen` (vectors, m, all);
    those of stage `s` start at `offsets[s]`. With `steps` (stages,) `codes` (rows, vectors, stages m) are doubled
    points of E8 of squared norms of at most `offsets[s]`, and `entries` the doubled points next to zero. `norms`
    (vectors, all) are the halved squared norms of `seen`, `gram` (vectors, all, all) its inner products, or empty.
    """
    rows, m = weight.shape[0], seen_as.shape[1]
    along, moved = np.empty((m, rows), weight.dtype), np.empty((m, rows), weight.dtype)
    z, made = np.empty(m, weight.dtype), np.empty(m, weight.dtype)
    none = np.empty((0, 0), weight.dtype)
    for j in range(len(seen_as) - 1, -1, -1):
        start, stop = j * m, (j + 1) * m
        for i in range(rows):
            for c in range(m):
                total = weight.dtype.type(0)
                for b in range(stop, weight.shape[1]):
                    total += error[i, b] * lower_i[b, start + c]
                along[c, i] = total
                moved[c, i] = external[i, start + c] + total
        for i in range(rows - 1, -1, -1):
            for c in range(m):
                total = moved[c, i]
                for b in range(c, m):
                    total += weight[i, start + b] * lower_i[start + b, start + c]
                z[c] = total * roots[start + c] / row_scales[i]
            made[:] = 0
            if len(steps):
                eigen = energies[j], onto[j], back[j]
                _lattice_stages(z, seen_as[j], *eigen, entries, seen[j], norms[j], offsets, steps, codes[i, j], made)
            else:
                products = gram[j] if len(gram) else none
                _learned_stages(z, entries, seen[j], norms[j], products, offsets, codes[i, j], made)
            for c in range(m):
                error[i, start + c] = weight[i, start + c] - made[c] * row_scales[i] * column_scales[start + c]
            if len(lower_o):
                for c in range(m):
                    felt = along[c, i]
                    for b in range(c, m):
                        felt += error[i, start + b] * lower_i[start + b, start + c]
                    for k in range(i):
                        moved[c, k] += felt * lower_o[i, k]


@_compiled
def _learned_stages(
    z: Array, entries: Array, seen: Array, norms: Array, gram: Array, offsets: Array, codes: Array, made: Array
) -> None:
    """Stage after stage the entry nearest to what is left of `z`, then each again given the others, until none changes.

    Half of `|z - sum_s x_s|^2` is, but for what stage `s` does not change, `|x_s|^2 / 2 - z x_s + sum_t x_t x_s`.
    """
    stages = len(offsets) - 1
    alone, given = norms.copy(), np.empty_like(norms)
    _take_products(alone, z, seen)
    for turn in range(1 if stages == 1 else 1 + AGAIN):
        changed = False
        for s in range(stages):
            first, last = offsets[s], offsets[s + 1]
            distances = given[first:last]
            distances[:] = alone[first:last]
            for t in range(stages if turn > 0 else s):
                if t != s:
                    _add_products(distances, seen, gram, offsets[t] + codes[t], first)
            best = _least(distances)
            changed = changed or turn == 0 or best != codes[s]
            codes[s] = best
        if not changed:
            break
    for s in range(stages):
        for c in range(len(z)):
            made[c] += entries[c, offsets[s] + codes[s]]


@_compiled
def _add_products(distances: Array, seen: Array, gram: Array, code: int, first: int) -> None:
    """Add the inner products of entry `code` with those from `first` on."""
    if len(gram):
        for k in range(len(distances)):
            distances[k] += gram[code, first + k]
        return
    _take_products(distances, -seen[:, code], seen[:, first:])


@_compiled
def _take_products(distances: Array, z: Array, seen: Array) -> None:
    """Take `z seen` from the distances, for `z` (m,) and `seen` (m, all), four coordinates at a time."""
    whole = len(z) // 4 * 4
    for c in range(0, whole, 4):
        z0, z1, z2, z3 = z[c], z[c + 1], z[c + 2], z[c + 3]
        for k in range(len(distances)):
            distances[k] -= (z0 * seen[c, k] + z1 * seen[c + 1, k]) + (z2 * seen[c + 2, k] + z3 * seen[c + 3, k])
    for c in range(whole, len(z)):
        here = z[c]
        for k in range(len(distances)):
            distances[k] -= here * seen[c, k]


@_compiled
def _least(v: Array) -> int:
    """The first place of the smallest value: that of the eight in which it stands, and then its own."""
    whole, best, at = len(v) // 8 * 8, v.dtype.type(np.inf), 0
    for k in range(0, whole, 8):
        left = min(min(v[k], v[k + 1]), min(v[k + 2], v[k + 3]))
        right = min(min(v[k + 4], v[k + 5]), min(v[k + 6], v[k + 7]))
        if min(left, right) < best:
            best, at = min(left, right), k
    for k in range(whole, len(v)):
        if v[k] < best:
            best, at = v[k], k
    while at < len(v) - 1 and v[at] > best:
        at += 1
    return at


@_compiled
def _lattice_stages(
    z: Array,
    seen_as: Array,
    energies: Array,
    onto: Array,
    back: Array,
    near: Array,
    near_seen: Array,
    norms: Array,
    radii: Array,
    steps: Array,
    codes: Array,
    made: Array,
) -> None:
    """Stage after stage a point near to what is left of `z`: the nearest as it lies, then the best next to it."""
    m = len(z)
    u, point, other = np.empty(m, z.dtype), np.empty(m, np.int64), np.empty(m, np.int64)
    distances, size = np.empty(len(norms), z.dtype), np.empty(len(norms), z.dtype)
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
        distances[:] = steps[s] * norms
        _take_products(distances, z, near_seen)
        size[:] = 0
        for c in range(m):
            for k in range(len(norms)):
                size[k] += (point[c] + near[c, k]) ** 2
        for k in range(len(norms)):
            distances[k] = distances[k] if size[k] <= 4 * radii[s] else np.inf
        chosen = _least(distances)
        for c in range(m):
            z[c] -= steps[s] * near_seen[c, chosen]
            codes[s * m + c] = point[c] + np.int64(near[c, chosen])
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
        found[i] = _least(distances)
    return found
