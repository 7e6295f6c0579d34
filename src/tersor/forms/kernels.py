"""The inner loop of rounding, compiled: entries of one tile from the last to the first, each after all that it feels.

Kept apart because importing the compiler takes half a second, which loading a model need not pay.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

Array = np.ndarray[Any, Any]
CELLS = 4096


@numba.njit(cache=True, nogil=True, fastmath={"reassoc", "contract", "nsz"})
def settle(
    target: Array,
    weight: Array,
    scale: Array,
    zero: Array,
    low: float,
    top: float,
    prices: Array,
    classes: Array,
    lower_o: Array,
    lower_i: Array,
    rounded: Array,
    error: Array,
) -> None:
    """Round a tile (rows, columns) into `rounded` and `error`.

    `target` is the weight moved by the errors outside of the tile; `lower_o` (rows, rows) and `lower_i` (columns,
    columns) are the unit lower factors inside it, the first empty where rows do not feel one another. `prices`
    (classes, magnitudes) are what codes cost in units of a squared step, by the class of their entry; with none, a code
    is the nearest. Errors are kept by columns, so that sums over the columns settled before run along the rows.
    """
    rows, columns = target.shape
    of_type, dearest = target.dtype.type, prices.shape[1] - 1
    one, nothing, least, most = of_type(1), of_type(0), of_type(low), of_type(top)
    made = np.empty((columns, rows), dtype=target.dtype)
    along = np.empty(rows, dtype=target.dtype)  # (E L_i) of the columns settled before
    moved = np.empty(rows, dtype=target.dtype)
    for j in range(columns - 1, -1, -1):
        for i in range(rows):
            along[i] = nothing
        for m in range(j + 1, columns):
            factor = lower_i[m, j]
            for i in range(rows):
                along[i] += factor * made[m, i]
        for i in range(rows):
            moved[i] = target[i, j] + along[i]
        for i in range(rows - 1, -1, -1):
            exact = moved[i] / scale[i, j] + zero[i, j]
            code = min(max(np.rint(exact), least), most)
            if dearest > 0 and nothing < abs(code) <= dearest:
                price, magnitude = prices[classes[i, j]], int(abs(code))
                toward = code - one if code > nothing else code + one
                if (exact - toward) ** 2 + price[magnitude - 1] < (exact - code) ** 2 + price[magnitude]:
                    code = toward
            value = (code - zero[i, j]) * scale[i, j]
            rounded[i, j] = value
            made[j, i] = weight[i, j] - value
            if len(lower_o):
                felt = along[i] + made[j, i]
                for k in range(i):
                    moved[k] += felt * lower_o[i, k]
    for i in range(rows):
        for j in range(columns):
            error[i, j] = made[j, i]


@numba.njit(cache=True, nogil=True)
def _place(value: Any, bounds: Array) -> int:
    """How many of the rising `bounds` lie below `value`."""
    low, count = 0, bounds.size
    while count > 0:
        half = count // 2
        if bounds[low + half] < value:
            low += half + 1
            count -= half + 1
        else:
            count = half
    return low


@numba.njit(cache=True, nogil=True, fastmath={"reassoc", "contract", "nsz"})
def settle_levels(
    target: Array,
    weight: Array,
    scale: Array,
    levels: Array,
    bounds: Array,
    lower_o: Array,
    lower_i: Array,
    rounded: Array,
    error: Array,
) -> None:
    """`settle` for the values of a table: an entry takes the nearest of `scale * levels`, which `bounds` part."""
    rows, columns = target.shape
    made = np.empty((columns, rows), dtype=target.dtype)
    along = np.empty(rows, dtype=target.dtype)  # (E L_i) of the columns settled before
    moved = np.empty(rows, dtype=target.dtype)
    for j in range(columns - 1, -1, -1):
        along[:] = 0
        for m in range(j + 1, columns):
            factor = lower_i[m, j]
            for i in range(rows):
                along[i] += factor * made[m, i]
        for i in range(rows):
            moved[i] = target[i, j] + along[i]
        for i in range(rows - 1, -1, -1):
            value = levels[_place(moved[i] / scale[i, j], bounds)] * scale[i, j]
            rounded[i, j] = value
            made[j, i] = weight[i, j] - value
            if len(lower_o):
                felt = along[i] + made[j, i]
                for k in range(i):
                    moved[k] += felt * lower_o[i, k]
    for i in range(rows):
        for j in range(columns):
            error[i, j] = made[j, i]


@numba.njit(cache=True, nogil=True)
def _starts(bounds: Array) -> tuple[Array, Any, Any]:
    """Where a walk to the place of a value may start: for each of `CELLS` equal parts of the range of the bounds.

    With the range's lower end, and the parts to a unit. A value that is rounded into the next part is still reached.
    """
    low, cells = bounds[0], (CELLS - 2) / (bounds[-1] - bounds[0])
    starts = np.empty(CELLS, np.int32)
    for k in range(CELLS):
        starts[k] = _place(low + (k - 1) / cells, bounds)
    return starts, low, bounds.dtype.type(cells)


@numba.njit(cache=True, nogil=True, error_model="numpy")
def best_scales(
    weight: Array, importance: Array, trials: Array, levels: Array, bounds: Array, best: Array, fit: Array
) -> None:
    """Of the scales tried for a group, that of the least importance-weighted error of plain rounding, into `best`.

    `weight` and `importance` are (rows, groups, size), `trials` (rows, groups, count). Into `fit` goes the
    least-squares scale of the levels taken at the best, zero where all of them are zero.
    """
    starts, low, cells = _starts(bounds)
    for i in range(weight.shape[0]):
        for g in range(weight.shape[1]):
            least = np.inf
            best[i, g], fit[i, g] = trials[i, g, 0], 0
            for scale in trials[i, g]:
                error, along, square = 0.0, 0.0, 0.0
                for c in range(weight.shape[2]):
                    w, h = weight[i, g, c], importance[i, g, c]
                    value = w / scale
                    place = starts[int(min(max((value - low) * cells, 0), CELLS - 1))]
                    while place < bounds.size and bounds[place] < value:
                        place += 1
                    level = levels[place]
                    felt = h * level
                    error += h * (w - level * scale) ** 2
                    along += felt * w
                    square += felt * level
                    if error >= least:
                        break
                if error < least:
                    least = error
                    best[i, g], fit[i, g] = scale, (along / square if square > 0 else 0)


@numba.njit(cache=True, nogil=True, fastmath={"reassoc", "contract", "nsz"})
def move_codes(
    felt: Array, support: Array, scale: Array, inner: Array, moment: Array, codes: Array, most: float
) -> None:
    """Move the `codes` of a tile (rows, columns) on the support, each to what is best given all others.

    `felt` (rows, columns) is `R E C` and `inner` the part of R in the tile, or `E C` and empty where no row feels
    another; `moment` (columns, columns) is C, `scale` (rows,) the steps. Codes stay between `-most` and `most`.
    """
    rows, columns = codes.shape
    limit, moved = codes.dtype.type(most), np.empty(columns, codes.dtype)
    for i in range(rows - 1, -1, -1):
        weight = inner[i, i] if len(inner) else codes.dtype.type(1)
        moved[:] = 0
        for j in range(columns - 1, -1, -1):
            curvature = weight * moment[j, j] * scale[i]
            if support[i, j] and curvature > 0:
                best = codes[i, j] + np.rint(felt[i, j] / curvature)
                best = min(max(best, -limit), limit)
                if best != codes[i, j]:
                    step = (best - codes[i, j]) * scale[i]
                    codes[i, j] = best
                    for b in range(columns):
                        moved[b] += step * moment[j, b]
                        felt[i, b] -= weight * step * moment[j, b]
        if len(inner):
            for k in range(i):
                factor = inner[k, i]
                for b in range(columns):
                    felt[k, b] -= factor * moved[b]


@numba.njit(cache=True, nogil=True, fastmath={"reassoc", "contract", "nsz"})
def _code(value: Any, inverse: Any, zero: Any, top: Any) -> Any:
    """The code, from 0 to `top`, nearest to a value on a grid of a scale, here its inverse, and a zero."""
    return min(max(np.rint(value * inverse + zero), type(top)(0)), top)


@numba.njit(cache=True, nogil=True, fastmath={"reassoc", "contract", "nsz"})
def _grid_error(w: Array, h: Array, scale: Any, zero: Any, top: Any) -> Any:
    """The importance-weighted squared error of rounding `w` to `scale (code - zero)`, codes from 0 to `top`."""
    of_type = w.dtype.type
    error, inverse = of_type(0), of_type(1) / scale
    for k in range(w.size):
        missed = w[k] - (_code(w[k], inverse, zero, top) - zero) * scale
        error += h[k] * missed * missed
    return error


@numba.njit(cache=True, nogil=True, fastmath={"reassoc", "contract", "nsz"})
def _slope(w: Array, h: Array, scale: Any, zero: Any, top: Any, from_w: Any, from_code: Any) -> Any:
    """The scale that fits `w - from_w` best by the codes that `w` has at a scale and a zero, less `from_code`."""
    of_type = w.dtype.type
    along, square, inverse = of_type(0), of_type(0), of_type(1) / scale
    for k in range(w.size):
        level = _code(w[k], inverse, zero, top) - from_code
        along += h[k] * level * (w[k] - from_w)
        square += h[k] * level * level
    return max(along / max(square, of_type(1e-20)), of_type(1e-12))


@numba.njit(cache=True, nogil=True, fastmath={"reassoc", "contract", "nsz"})
def _least_squares_grid(
    w: Array, h: Array, scale: Any, zero: Any, top: Any, symmetric: bool, whole: bool
) -> tuple[Any, Any]:
    """The scale and zero that fit `w` best with the codes that it has at a scale and a zero."""
    of_type = w.dtype.type
    nothing, inverse = of_type(0), of_type(1) / scale
    if symmetric:
        return _slope(w, h, scale, zero, top, nothing, zero), zero
    mass, sum_w, sum_c = nothing, nothing, nothing
    for k in range(w.size):
        mass += h[k]
        sum_w += h[k] * w[k]
        sum_c += h[k] * _code(w[k], inverse, zero, top)
    mass = max(mass, of_type(1e-20))
    mean_w, mean_c = sum_w / mass, sum_c / mass
    best = _slope(w, h, scale, zero, top, mean_w, mean_c)
    found = _snapped(mean_c - mean_w / best, top, whole)
    return (_slope(w, h, scale, zero, top, nothing, found) if whole else best), found  # a zero that moved wants another


@numba.njit(cache=True, nogil=True)
def _snapped(zero: Any, top: Any, whole: bool) -> Any:
    """A zero in the range of the grid; a `whole` one is at least 1: a format that others read stores it less 1."""
    one = type(zero)(1)
    return min(max(np.floor(zero + one / 2), one), top) if whole else min(max(zero, one - one), top)


@numba.njit(cache=True, nogil=True)
def search_grids(
    weight: Array,
    importance: Array,
    size: int,
    top: float,
    shares: Array,
    refinements: int,
    symmetric: bool,
    whole: bool,
    half: float,
    scales: Array,
    zeros: Array,
) -> None:
    """Scales and zeros of groups of `size` along the rows of `weight` and `importance` (rows, columns).

    Of the range of the group, of `shares` of it, and of so many refinements by least squares, that of the least error.
    """
    of_type = weight.dtype.type
    nothing, most, middle, two = of_type(0), of_type(top), of_type(half), of_type(2)
    for i in range(weight.shape[0]):
        for g in range(scales.shape[1]):
            w, h = weight[i, g * size : (g + 1) * size], importance[i, g * size : (g + 1) * size]
            low, high = min(w.min(), nothing), max(w.max(), nothing)  # a zero lies within the range
            if symmetric:
                high = max(high, -low)
                low = -high
            centre, radius = (low + high) / two, max((high - low) / two, of_type(1e-12))
            best = two * radius / most
            at = middle if symmetric else _snapped(most / two - centre / best, most, whole)
            least = _grid_error(w, h, best, at, most)
            for share in shares:
                scale = two * radius / most * share
                zero = middle if symmetric else _snapped(most / two - centre / scale, most, whole)
                error = _grid_error(w, h, scale, zero, most)
                if error < least:
                    least, best, at = error, scale, zero
            for _ in range(refinements):
                scale, zero = _least_squares_grid(w, h, best, at, most, symmetric, whole)
                error = _grid_error(w, h, scale, zero, most)
                if not error < least:
                    break
                least, best, at = error, scale, zero
            scales[i, g], zeros[i, g] = best, at
