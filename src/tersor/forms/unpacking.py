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


@_compiled
def _spread(row: Array, bits: int, columns: int, codes: Array) -> None:
    """The bytes of a packed row as codes (a multiple of 8), a byte each; see `packing.py` for the planes.

    The codes of one byte are moved apart inside a wider word: 2 of 4 bits in 16, 4 of 2 bits in 32, 8 of 1 bit in 64.
    """
    if bits == 8:
        codes[:columns] = row
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
    columns, low_and_step = out.shape[1], ends.view(np.float32)
    table = np.empty(256, np.float32)
    power, ratio = 2.0 ** np.float64(low_and_step[0]), 2.0 ** np.float64(low_and_step[1])
    for k in range(256):  # in 64 bits, where a product of 256 factors stays exact to 32
        table[k] = power
        power *= ratio
    codes = np.empty(columns // 8 * 8 + 8, np.uint8)
    row_scales, row_zeros = np.empty(scales.shape[1], np.float32), np.empty(scales.shape[1], np.float32)
    for i in range(out.shape[0]):
        for g in range(scales.shape[1]):
            row_scales[g] = table[scales[i, g]]
            row_zeros[g] = half if half >= 0 else step * zeros[i, g]
        _spread(packed[i], bits, columns, codes)
        _in_groups(codes, size, row_scales, row_zeros, out[i])


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
