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
    turned_o: Array,
    turned_i: Array,
    coupled: bool,
    rounded: Array,
    error: Array,
) -> None:
    """Round a tile (rows, columns) in place into `rounded` and `error`.

    `target` is the weight moved by the errors outside of the tile; `turned_o` and `turned_i` are the transposed unit
    lower factors inside it, `coupled` says whether rows feel one another. `prices` (classes, magnitudes) are what codes
    cost in units of a squared step, by the class of their entry; with none, a code is the nearest.
    """
    rows, columns = target.shape
    dearest = prices.shape[1] - 1
    along = np.zeros(rows, dtype=target.dtype)  # (E L_i) of the settled part of each row
    felt = np.zeros(rows, dtype=target.dtype)
    for j in range(columns - 1, -1, -1):
        for i in range(rows):
            total = along.dtype.type(0)
            for m in range(j + 1, columns):
                total += error[i, m] * turned_i[j, m]
            along[i] = total
        for i in range(rows - 1, -1, -1):
            moved = target[i, j] + along[i]
            if coupled:
                for k in range(i + 1, rows):
                    moved += turned_o[i, k] * felt[k]
            exact = moved / scale[i, j] + zero[i, j]
            code = min(max(np.rint(exact), low), top)
            if dearest > 0 and 0 < abs(code) <= dearest:
                price, toward = prices[classes[i, j]], code - np.sign(code)
                kept = (exact - code) ** 2 + price[int(abs(code))]
                if (exact - toward) ** 2 + price[int(abs(toward))] < kept:
                    code = toward
            value = (code - zero[i, j]) * scale[i, j]
            rounded[i, j] = value
            error[i, j] = weight[i, j] - value
            felt[i] = along[i] + error[i, j]
