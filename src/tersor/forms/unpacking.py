"""The inner loops of decoding on a CPU, compiled: packed codes of a row to floats in one pass, without temporaries.

Kept apart because importing the compiler takes half a second. Every loop runs along a single row, which is what lets
the compiler turn it into vector instructions.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

Array = np.ndarray[Any, Any]
_compiled = numba.njit(cache=True, nogil=True, error_model="numpy", fastmath={"contract", "nsz"})
_summing = numba.njit(cache=True, nogil=True, error_model="numpy", fastmath={"contract", "nsz", "reassoc"})


@_compiled
def _spread(row: Array, bits: int, columns: int, codes: Array) -> None:
    """The bytes of a packed row as codes (a multiple of 8), a byte each; see `packing.py` for the planes.

    The codes of one byte are moved apart inside a wider word: 2 of 4 bits in 16, 4 of 2 bits in 32, 8 of 1 bit in 64.
    """
    if bits == 8:
        for k in range(row.size):
            codes[k] = row[k]
        return
    start, shift = 0, 0
    codes[:] = 0
    if bits >= 4:
        start, shift = (columns + 1) // 2, 4
        _pairs(row[:start], codes.view(np.uint16))
    if bits in (2, 3, 6):
        width = (columns + 3) // 4
        _fours(row[start : start + width], shift, codes.view(np.uint32))
        start, shift = start + width, shift + 2
    if bits in (1, 3, 5):
        _eights(row[start:], shift, codes.view(np.uint64))


@_compiled
def _pairs(row: Array, codes: Array) -> None:
    for k in range(row.size):
        b = np.uint16(row[k])
        codes[k] = (b | (b << np.uint16(4))) & np.uint16(0x0F0F)


@_compiled
def _fours(row: Array, shift: int, codes: Array) -> None:
    up = np.uint32(shift)
    for k in range(row.size):
        b = np.uint32(row[k])
        b = (b | (b << np.uint32(12))) & np.uint32(0x000F000F)
        codes[k] |= ((b | (b << np.uint32(6))) & np.uint32(0x03030303)) << up


@_compiled
def _eights(row: Array, shift: int, codes: Array) -> None:
    up = np.uint64(shift)
    for k in range(row.size):
        b = np.uint64(row[k])
        b = (b | (b << np.uint64(28))) & np.uint64(0x0000000F0000000F)
        b = (b | (b << np.uint64(14))) & np.uint64(0x0003000300030003)
        codes[k] |= ((b | (b << np.uint64(7))) & np.uint64(0x0101010101010101)) << up


@_compiled
def _in_groups(codes: Array, size: int, scales: Array, zeros: Array, out: Array) -> None:
    width, length = np.uint64(size), np.uint64(out.size)  # unsigned, or each index is checked for being negative
    for g in range(np.uint64(scales.size)):
        scale, zero = scales[g], zeros[g]
        for c in range(g * width, min((g + np.uint64(1)) * width, length)):
            out[c] = (np.float32(codes[c]) - zero) * scale


@_compiled
def _varying(codes: Array, zeros: Array, scales: Array, out: Array) -> None:
    for c in range(out.size):
        out[c] = (np.float32(codes[c]) - zeros[c]) * scales[c]


@_compiled
def _stepped(codes: Array, half: Any, row: Any, columns: Array, out: Array) -> None:
    for c in range(out.size):
        out[c] = (np.float32(codes[c]) - half) * row * columns[c]


@_summing
def _dots(row: Array, x: Array, i: int, out: Array) -> None:
    """`x row` as the column `i` of `out`."""
    for p in range(x.shape[0]):
        at, total = x[p], np.float32(0)
        for c in range(np.uint64(row.size)):
            total += row[c] * at[c]
        out[p, i] = total


@_compiled
def grouped(packed: Array, bits: int, size: int, scales: Array, zeros: Array, out: Array) -> None:
    """`scale (code - zero)` with scales and zeros (rows, groups) of `size` columns each."""
    columns = out.shape[1]
    codes = np.empty(columns // 8 * 8 + 8, np.uint8)
    for i in range(out.shape[0]):
        _spread(packed[i], bits, columns, codes)
        _in_groups(codes, size, scales[i], zeros[i], out[i])


@_compiled
def logarithmic(
    packed: Array, bits: int, size: int, scales: Array, ends: Array, zeros: Array, step: float, half: float, out: Array
) -> None:
    """`grouped` with scales and zeros in 8 bits: codes of logarithms between `ends`, and `step` times a code.

    A `half` of 0 or more is the one zero of a symmetric grid.
    """
    columns, table = out.shape[1], _between(ends)
    codes = np.empty(columns // 8 * 8 + 8, np.uint8)
    row_scales, row_zeros = np.empty(scales.shape[1], np.float32), np.empty(scales.shape[1], np.float32)
    for i in range(out.shape[0]):
        _grid(table, scales[i], zeros[i], step, half, row_scales, row_zeros)
        _spread(packed[i], bits, columns, codes)
        _in_groups(codes, size, row_scales, row_zeros, out[i])


@_compiled
def _between(ends: Array) -> Array:
    """The 256 scales whose logarithms lie evenly from the lowest on; `ends` has the bits of that and of the step."""
    low_and_step = ends.view(np.float32)
    table = np.empty(256, np.float32)
    power, ratio = 2.0 ** np.float64(low_and_step[0]), 2.0 ** np.float64(low_and_step[1])
    for k in range(256):  # in 64 bits, where a product of 256 factors stays exact to 32
        table[k] = power
        power *= ratio
    return table


@_compiled
def _grid(
    table: Array, scales: Array, zeros: Array, step: float, half: float, row_scales: Array, row_zeros: Array
) -> None:
    """The scales and zeros of a row from their codes."""
    for g in range(scales.size):
        row_scales[g] = table[scales[g]]
        row_zeros[g] = half if half >= 0 else step * zeros[g]


@_compiled
def logarithmic_product(
    packed: Array, bits: int, size: int, scales: Array, ends: Array, zeros: Array, step: float, half: float,
    x: Array, out: Array,
) -> None:  # fmt: skip
    """`x W^T` (positions, rows) for `W` as in `logarithmic`, a row of which is in the cache at a time."""
    columns, table = x.shape[1], _between(ends)
    codes, row = np.empty(columns // 8 * 8 + 8, np.uint8), np.empty(columns, np.float32)
    row_scales, row_zeros = np.empty(scales.shape[1], np.float32), np.empty(scales.shape[1], np.float32)
    for i in range(out.shape[1]):
        _grid(table, scales[i], zeros[i], step, half, row_scales, row_zeros)
        _spread(packed[i], bits, columns, codes)
        _in_groups(codes, size, row_scales, row_zeros, row)
        _dots(row, x, i, out)


@_compiled
def grouped_product(packed: Array, bits: int, size: int, scales: Array, zeros: Array, x: Array, out: Array) -> None:
    """`x W^T` (positions, rows) for `W` as in `grouped`, a row of which is in the cache at a time."""
    columns = x.shape[1]
    codes, row = np.empty(columns // 8 * 8 + 8, np.uint8), np.empty(columns, np.float32)
    for i in range(out.shape[1]):
        _spread(packed[i], bits, columns, codes)
        _in_groups(codes, size, scales[i], zeros[i], row)
        _dots(row, x, i, out)


@_compiled
def looked_up(packed: Array, bits: int, size: int, table: Array, scales: Array, out: Array) -> None:
    """`scale table[code]` with scales (rows, groups) of `size` columns each."""
    columns = out.shape[1]
    codes = np.empty(columns // 8 * 8 + 8, np.uint8)
    for i in range(out.shape[0]):
        _spread(packed[i], bits, columns, codes)
        for g in range(scales.shape[1]):
            for c in range(g * size, min((g + 1) * size, columns)):
                out[i, c] = table[codes[c]] * scales[i, g]


@_compiled
def by_columns(packed: Array, bits: int, group_of: Array, scales: Array, zeros: Array, out: Array) -> None:
    """`scale (code - zero)` with scales and zeros (groups, columns), and the group of every row."""
    columns = out.shape[1]
    codes = np.empty(columns // 8 * 8 + 8, np.uint8)
    for i in range(out.shape[0]):
        _spread(packed[i], bits, columns, codes)
        _varying(codes, zeros[group_of[i]], scales[group_of[i]], out[i])


@_compiled
def _powers(logs: Array, resolution: int) -> Array:
    """Two to the power of logarithms in units of 1 / resolution."""
    low = logs.min()
    table = np.empty(logs.max() - low + 1, np.float32)
    for k in range(table.size):
        table[k] = 2.0 ** ((low + k) / resolution)
    powers = np.empty(logs.size, np.float32)
    for k in range(logs.size):
        powers[k] = table[logs[k] - low]
    return powers


@_compiled
def stepped(
    packed: Array,
    bits: int,
    whole: bool,
    index: Array,
    row_logs: Array,
    column_logs: Array,
    resolution: int,
    positions: Array,
    escapes: Array,
    out: Array,
) -> None:
    """`row step * code * column step` of all rows, or of those at `index`, which `row_logs` are of.

    Escapes lie at sorted positions of the whole matrix.
    """
    length, half = column_logs.size, np.float32(1 << (bits - 1))
    if out.size == 0:
        return
    columns, powers = _powers(column_logs, resolution), _powers(row_logs, resolution)
    codes = np.empty(length // 8 * 8 + 8, np.uint8)
    e: Any = 0  # the next escape, were `following` the next row
    following = 0
    for k in range(out.shape[0]):
        i = k if whole else index[k]
        row = powers[k]
        _spread(packed[i], bits, length, codes)
        _stepped(codes, half, row, columns, out[k])
        start = i * length
        if i != following:
            e = np.searchsorted(positions, start)
        while e < positions.size and positions[e] < start + length:
            c = positions[e] - start
            out[k, c] = np.float32(escapes[e]) * row * columns[c]
            e += 1
        following = i + 1


@_compiled
def stepped_product(
    packed: Array, bits: int, row_logs: Array, column_logs: Array, resolution: int, positions: Array, escapes: Array,
    x: Array, out: Array,
) -> None:  # fmt: skip
    """`x W^T` (positions, rows) for `W` as in `stepped`, a row of which is in the cache at a time."""
    length, half = column_logs.size, np.float32(1 << (bits - 1))
    if out.size == 0:
        return
    columns, powers = _powers(column_logs, resolution), _powers(row_logs, resolution)
    codes, row = np.empty(length // 8 * 8 + 8, np.uint8), np.empty(length, np.float32)
    e: Any = 0
    for i in range(out.shape[1]):
        _spread(packed[i], bits, length, codes)
        _stepped(codes, half, powers[i], columns, row)
        while e < positions.size and positions[e] < (i + 1) * length:
            c = positions[e] - i * length
            row[c] = np.float32(escapes[e]) * powers[i] * columns[c]
            e += 1
        _dots(row, x, i, out)
