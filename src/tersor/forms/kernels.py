"""The inner loop of rounding, compiled: entries of one tile from the last to the first, each after all that it feels.

Kept apart because importing the compiler takes half a second, which loading a model need not pay.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

Array = np.ndarray[Any, Any]


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
