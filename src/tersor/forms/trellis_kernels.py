"""The compiled loops of the trellis form: the search for the best bits, the walk over a matrix, and reading it back.

The search is the Viterbi algorithm: of the states that lead to a state the cheapest is kept. Costs are integers whose
low six bits say which one that was, so that one minimum finds both; everything else is adding.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numba
import numpy as np

from tersor.coding.trellis import HEADER, MOST_BITS, SIDE_BITS, UNIT, WINDOW

Array = np.ndarray[Any, Any]
HEAD = HEADER.size
LOW = np.int32(63)  # the bits of a cost that say where it comes from
SCALE = np.float32(1024.0)  # of a value in costs: its square is 2^20
FAR = np.float32(5.0)  # beyond which a target is as good as there
NEAR = 24  # entries on both sides of where a ring is closed
SPAN = 4096  # entries of a column that are searched at a time
quick = {"reassoc", "contract", "nsz"}


def _stepper(bits: int) -> Callable[..., Any]:
    branches = 1 << bits

    @numba.njit(cache=True, nogil=True, fastmath=quick, inline="never")
    def step(cost: Array, best: Array, back: Array, table: Array, target: Any, states: int) -> None:
        """One entry of `bits` bits: from the costs of all states before it to those after, and where they come from."""
        groups, least = states >> bits, np.int32(0x7FFFFFFF)
        for u in range(groups):
            cheapest = cost[u]
            for a in range(1, branches):
                cheapest = min(cheapest, np.int32(cost[a * groups + u] + np.int32(a)))
            best[u] = cheapest
            back[u] = np.uint8(cheapest & LOW)
            least = min(least, cheapest)
        least = least & ~LOW
        for u in range(groups):
            so_far = (best[u] & ~LOW) - least
            for b in range(branches):
                away = table[u * branches + b] - target
                cost[u * branches + b] = so_far + (np.int32(away * away) & ~LOW)

    return step


_one, _two, _three, _four = (_stepper(bits) for bits in range(1, 5))


@numba.njit(cache=True, nogil=True, fastmath=quick)
def _more(cost: Array, best: Array, back: Array, table: Array, target: Any, bits: int) -> None:
    """One entry of more bits, which are rare enough to do without a loop of their own."""
    groups, branches = len(table) >> bits, 1 << bits
    best[:groups] = cost[:groups]
    for a in range(1, branches):
        for u in range(groups):
            best[u] = min(best[u], np.int32(cost[a * groups + u] + np.int32(a)))
    least = best[:groups].min() & ~LOW
    for u in range(groups):
        back[u] = np.uint8(best[u] & LOW)
        so_far = (best[u] & ~LOW) - least
        for s in range(u * branches, (u + 1) * branches):
            away = table[s] - target
            cost[s] = so_far + (np.int32(away * away) & ~LOW)


@numba.njit(cache=True, nogil=True)
def search(
    targets: Array, rates: Array, table: Array, start: int, end: int, room: tuple[Array, Array, Array], states: Array
) -> int:
    """The states (n,) nearest to `targets` (n,) in all, from `start` to `end`, which is any where -1; returns the last.

    `table` has the values of all states times SCALE; `room` is space for costs, the best and where they came from.
    """
    cost, best, back = room
    count = len(table)
    cost[:] = 0 if start < 0 else 1 << 29
    if start >= 0:
        cost[start] = 0
    for t in range(len(targets)):
        target = min(max(targets[t], -FAR), FAR) * SCALE
        if rates[t] == 1:
            _one(cost, best, back[t], table, target, count)
        elif rates[t] == 2:
            _two(cost, best, back[t], table, target, count)
        elif rates[t] == 3:
            _three(cost, best, back[t], table, target, count)
        elif rates[t] == 4:
            _four(cost, best, back[t], table, target, count)
        elif rates[t] > 4:
            _more(cost, best, back[t], table, target, rates[t])
    last = int(np.argmin(cost)) if end < 0 else end
    state = last
    for t in range(len(targets) - 1, -1, -1):
        states[t] = state
        if rates[t] > 0:
            before = state >> rates[t]
            state = int(back[t, before]) * (count >> rates[t]) + before
    return last


@numba.njit(cache=True, nogil=True)
def _meeting(targets: Array, rates: Array, table: Array, room: tuple[Array, Array, Array], states: Array) -> int:
    """The state at which the end of a ring of entries best meets its beginning."""
    count = len(targets)
    near = min(count // 2, NEAR)
    around, of_them = np.empty(2 * near, np.float32), np.empty(2 * near, np.int64)
    around[:near], around[near:] = targets[count - near :], targets[:near]
    of_them[:near], of_them[near:] = rates[count - near :], rates[:near]
    search(around, of_them, table, -1, -1, room, states)
    return int(states[near - 1])


@numba.njit(cache=True, nogil=True)
def _append(bits: Array, at: int, state: int, rate: int) -> int:
    """Write the lowest `rate` bits of a state at a position, the highest of them first."""
    for k in range(rate - 1, -1, -1):
        if (state >> k) & 1:
            bits[at >> 3] |= np.uint8(128 >> (at & 7))
        at += 1
    return at


@numba.njit(cache=True, nogil=True)
def _rate(row: int, fine: int) -> int:
    return min(max((row * 64 + fine + 2048) >> 12, 0), MOST_BITS)


@numba.njit(cache=True, nogil=True, fastmath=quick)
def walk_diagonals(
    weight: Array, turned_o: Array, turned_i: Array, sides: tuple[Array, Array, Array, Array], shrink: Array,
    table: Array, error: Array, bits: Array,
) -> None:  # fmt: skip
    """Code a matrix (rows, columns) along its diagonals, each entry after all that it feels (P147).

    `turned_o` and `turned_i` are the transposed unit lower factors; `sides` are the rates of rows (1/64 bits) and
    columns (1/4096) and the scales of both. Fills `error`, zeros before, and `bits`. Entries of a diagonal do not feel
    one another.
    """
    rows, columns = weight.shape
    row_rates, fine, row_scales, column_scales = sides
    longest, count = min(rows, columns), len(table)
    room = (np.empty(count, np.int32), np.empty(count, np.int32), np.empty((longest, count >> 1), np.uint8))
    targets, along = np.empty(longest, np.float32), np.empty(longest, np.float32)
    rates, states = np.empty(longest, np.int64), np.empty(longest, np.int64)
    spread = np.zeros((columns, rows), np.float32)
    scaled = table * SCALE
    state, at = 0, WINDOW
    for diagonal in range(rows + columns - 2, -1, -1):
        first, last = max(0, diagonal - columns + 1), min(rows - 1, diagonal)
        taken = 0
        for i in range(first, last + 1):
            j, t = diagonal - i, i - first
            felt = np.float32(0)
            for m in range(j + 1, columns):
                felt += error[i, m] * turned_i[j, m]
            along[t] = felt
            for k in range(i + 1, rows):
                felt += turned_o[i, k] * spread[j, k]
            rates[t] = _rate(row_rates[i], fine[j])
            taken += rates[t]
            scale = row_scales[i] * column_scales[j] * shrink[rates[t]]
            targets[t] = (weight[i, j] + felt) / scale if scale > 0 else np.float32(0)
        length, end = last + 1 - first, -1
        if taken >= WINDOW and length > 1:
            state = end = _meeting(targets[:length], rates[:length], scaled, room, states)
        state = search(targets[:length], rates[:length], scaled, state, end, room, states)
        for i in range(first, last + 1):
            j, t = diagonal - i, i - first
            value = np.float32(0)
            if rates[t] > 0:
                value = table[states[t]] * (row_scales[i] * column_scales[j] * shrink[rates[t]])
                at = _append(bits, at, states[t], rates[t])
            error[i, j] = weight[i, j] - value
            spread[j, i] = along[t] + error[i, j]


@numba.njit(cache=True, nogil=True, fastmath=quick)
def walk_columns(
    weight: Array, turned_i: Array, coupled: bool, order: Array, sides: tuple[Array, Array, Array, Array],
    shrink: Array, table: Array, error: Array, bits: Array,
) -> None:  # fmt: skip
    """The same down the columns, from the last to the first, rows in `order`: they do not feel one another."""
    rows, columns = weight.shape
    row_rates, fine, row_scales, column_scales = sides
    longest = min(rows, SPAN)
    room = (
        np.empty(len(table), np.int32),
        np.empty(len(table), np.int32),
        np.empty((longest, len(table) >> 1), np.uint8),
    )
    targets = np.empty(longest, np.float32)
    rates, states = np.empty(longest, np.int64), np.empty(longest, np.int64)
    scaled = table * SCALE
    state, at = 0, WINDOW
    for j in range(columns - 1, -1, -1):
        for begin in range(0, rows, longest):
            count = min(longest, rows - begin)
            for t in range(count):
                i = order[begin + t]
                felt = np.float32(0)
                if coupled:
                    for m in range(j + 1, columns):
                        felt += error[i, m] * turned_i[j, m]
                rates[t] = _rate(row_rates[i], fine[j])
                scale = row_scales[i] * column_scales[j] * shrink[rates[t]]
                targets[t] = (weight[i, j] + felt) / scale if scale > 0 else np.float32(0)
            state = search(targets[:count], rates[:count], scaled, state, -1, room, states)
            for t in range(count):
                i, value = order[begin + t], np.float32(0)
                if rates[t] > 0:
                    value = table[states[t]] * (row_scales[i] * column_scales[j] * shrink[rates[t]])
                    at = _append(bits, at, states[t], rates[t])
                error[i, j] = weight[i, j] - value


@numba.njit(cache=True, nogil=True)
def _state(bits: Array, end: int) -> int:
    """The state that ends before the bit `end`."""
    begin = end - WINDOW
    byte = begin >> 3
    word = (int(bits[byte]) << 16) | (int(bits[byte + 1]) << 8) | int(bits[byte + 2])
    return (word >> (24 - WINDOW - (begin & 7))) & ((1 << WINDOW) - 1)


@numba.njit(cache=True, nogil=True)
def _code(packed: Array, number: int) -> int:
    """The code of a row or column among those of its side."""
    at = number * SIDE_BITS
    word = int(packed[at >> 3]) << 8
    if (at & 7) + SIDE_BITS > 8:
        word |= int(packed[(at >> 3) + 1])
    return (word >> (16 - SIDE_BITS - (at & 7))) & ((1 << SIDE_BITS) - 1)


@numba.njit(cache=True, nogil=True)
def _side(packed: Array, size: int, base: int, step: int) -> Array:
    """The logarithms of a side (size,)."""
    logs = np.empty(size, np.int64)
    for k in range(size):
        logs[k] = base + step * _code(packed, k)
    return logs


@numba.njit(cache=True, nogil=True)
def _scale(log: int, fractions: Array) -> Any:
    return np.float32(math.ldexp(fractions[log & (UNIT - 1)], log >> 6))


@numba.njit(cache=True, nogil=True)
def _opened(stream: Array, rows: int, columns: int, numbers: Array, fractions: Array) -> Any:
    """The rates and scales of the columns, and what is left of the stream: the codes of rows for both, and the bits."""
    of_rows, of_columns = (rows * SIDE_BITS + 7) >> 3, (columns * SIDE_BITS + 7) >> 3
    at = HEAD
    row_rates = stream[at : at + of_rows]
    fine = _side(stream[at + of_rows : at + of_rows + of_columns], columns, numbers[1, 0], numbers[1, 1])
    for j in range(columns):
        fine[j] = fine[j] * UNIT + (j * 40503) % (16 * UNIT)
    at += of_rows + of_columns
    row_scales = stream[at : at + of_rows]
    logs = _side(stream[at + of_rows : at + of_rows + of_columns], columns, numbers[3, 0], numbers[3, 1])
    scales = np.empty(columns, np.float32)
    for j in range(columns):
        scales[j] = _scale(logs[j], fractions)
    return fine, scales, row_rates, row_scales, stream[at + of_rows + of_columns :]


@numba.njit(cache=True, nogil=True)
def read_diagonals(stream: Array, numbers: Array, fractions: Array, shrink: Array, table: Array, out: Array) -> None:
    """The matrix (rows, columns) of what `walk_diagonals` wrote; `numbers` are base and step of the four sides.

    A diagonal of a window of bits or more is a ring: it begins in the state it ends in.
    """
    rows, columns = out.shape
    fine, column_scales, rate_codes, scale_codes, bits = _opened(stream, rows, columns, numbers, fractions)
    row_rates = _side(rate_codes, rows, numbers[0, 0], numbers[0, 1])
    logs = _side(scale_codes, rows, numbers[2, 0], numbers[2, 1])
    row_scales = np.empty(rows, np.float32)
    for i in range(rows):
        row_scales[i] = _scale(logs[i], fractions)
    at, state = WINDOW, 0
    for diagonal in range(rows + columns - 2, -1, -1):
        first, last = max(0, diagonal - columns + 1), min(rows - 1, diagonal)
        taken = 0
        for i in range(first, last + 1):
            taken += _rate(row_rates[i], fine[diagonal - i])
        if taken >= WINDOW and last > first:
            state = _state(bits, at + taken)
        for i in range(first, last + 1):
            j = diagonal - i
            rate = _rate(row_rates[i], fine[j])
            value = np.float32(0)
            if rate > 0:
                byte = at >> 3
                word = (int(bits[byte]) << 8) | int(bits[byte + 1])
                new = (word >> (16 - rate - (at & 7))) & ((1 << rate) - 1)
                state = ((state << rate) | new) & ((1 << WINDOW) - 1)
                at += rate
                value = table[state] * (row_scales[i] * column_scales[j] * shrink[rate])
            out[i, j] = value


@numba.njit(cache=True, nogil=True)
def read_rows(
    index: Array, rank: Array, begins: Array, stream: Array, numbers: Array, fractions: Array, shrink: Array,
    table: Array, out: Array,
) -> None:  # fmt: skip
    """The rows at `index` of what `walk_columns` wrote: `begins` (levels, columns) say where rows of a code begin."""
    rows, columns = len(rank), out.shape[1]
    fine, column_scales, rate_codes, scale_codes, bits = _opened(stream, rows, columns, numbers, fractions)
    for n in range(len(index)):
        i = index[n]
        level = _code(rate_codes, i)
        row_rate = numbers[0, 0] + numbers[0, 1] * level
        row_scale = _scale(numbers[2, 0] + numbers[2, 1] * _code(scale_codes, i), fractions)
        for j in range(columns):
            rate = _rate(row_rate, fine[j])
            value = np.float32(0)
            if rate > 0:
                state = _state(bits, begins[level, j] + (rank[i] + 1) * rate)
                value = table[state] * (row_scale * column_scales[j] * shrink[rate])
            out[n, j] = value
