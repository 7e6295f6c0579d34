"""A second reader of streams, written from `docs/stream.md` alone with plain integers, agrees with ours."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from tersor.coding import Coded, encode
from tersor.coding.tables import TOTAL, frequencies, reach_of

PRECISION = 24


def number(data: bytes, at: int) -> tuple[int, int]:
    """An unsigned number and the place after it."""
    value = shift = 0
    while True:
        value |= (data[at] & 127) << shift
        at, shift = at + 1, shift + 7
        if data[at - 1] < 128:
            return value, at


def signed(value: int) -> int:
    return value // 2 if value % 2 == 0 else -(value + 1) // 2


def parts(table: np.ndarray[Any, Any]) -> list[int]:
    """Where each symbol starts among the 2^24 parts, and their end."""
    free, starts, total = (1 << PRECISION) - len(table), [], 0
    for symbol, frequency in enumerate(table):
        starts.append(int(Fraction(total * free, TOTAL)) + symbol)
        total += int(frequency)
    return [*starts, 1 << PRECISION]


def symbols(words: list[int], classes: list[int], family: int) -> Iterator[tuple[int, int]]:
    """Pop a symbol of every class from the coder: a number of 64 bits over a stack of words of 32."""
    state = 0
    while words and state < 1 << 32:
        state = state << 32 | words.pop()
    for name in classes:
        starts = parts(frequencies(family, name))
        rest = state & ((1 << PRECISION) - 1)
        symbol = max(s for s, start in enumerate(starts[:-1]) if start <= rest)
        state = (state >> PRECISION) * (starts[symbol + 1] - starts[symbol]) + rest - starts[symbol]
        if state < 1 << 32 and words:
            state = state << 32 | words.pop()
        yield name, symbol
    assert state == 0 and not words


def codes(data: bytes, classes: list[int], family: int) -> list[int]:
    """Codes in the order of the classes given, which are sorted."""
    count, at = number(data, 0)
    escapes = []
    for _ in range(count):
        value, at = number(data, at)
        escapes.append(signed(value))
    words = [int.from_bytes(data[i : i + 4], "little") for i in range(at, len(data), 4)]
    out = []
    for name, symbol in symbols(words, classes, family):
        reach = reach_of(name)
        out.append(escapes.pop(0) if symbol == 2 * reach + 1 else symbol - reach)
    assert not escapes
    return out


def read(data: bytes) -> tuple[list[list[int]], list[list[int]]]:
    """The codes, and the steps of both sides."""
    assert data[:4] == b"TSC1"
    at, header = 4, []
    for _ in range(8):
        value, at = number(data, at)
        header.append(value)
    rows, columns, resolution, family, offset, rows_a_chunk = header[:6]
    lengths = []
    for _ in range(-(-rows // rows_a_chunk)):
        value, at = number(data, at)
        lengths.append(value)
    steps = []
    for length, count in zip(header[6:8], (rows, columns), strict=True):
        side, at = data[at : at + length], at + length
        centre, inner = number(side, 0)
        index, inner = number(side, inner)
        steps.append([signed(centre) + c for c in codes(side[inner:], [index - 20] * count, 0)])
    assert data[at : at + 4] == zlib.crc32(data[:at]).to_bytes(4, "little")
    at, matrix = at + 4, [[0] * columns for _ in range(rows)]
    for chunk, length in enumerate(lengths):
        payload, at = data[at : at + length], at + length
        assert data[at : at + 4] == zlib.crc32(payload).to_bytes(4, "little")
        at += 4
        places = [
            (min(max(signed(offset) - 4 * (steps[0][i] + steps[1][j]) // resolution, -20), 28), i, j)
            for i in range(chunk * rows_a_chunk, min(rows, (chunk + 1) * rows_a_chunk))
            for j in range(columns)
        ]
        places.sort()
        found = codes(payload, [name for name, _, _ in places], family)
        for (_, i, j), code in zip(places, found, strict=True):
            matrix[i][j] = code
    assert at == len(data)
    return matrix, steps


@pytest.mark.parametrize("deviation", [0.05, 0.7, 20.0])
@pytest.mark.parametrize("resolution", [4, 8])
def test_the_second_reader_agrees(deviation: float, resolution: int) -> None:
    generator = np.random.default_rng(int(deviation))
    rows, columns = (np.rint(generator.normal(3, 4, n)).astype(int) for n in (13, 17))
    step = np.exp2((rows[:, None] + columns[None]) / resolution)
    matrix = np.rint(deviation * generator.standard_t(3, (13, 17)) / step).astype(np.int32)
    matrix[2, 5] = 99_999
    found, steps = read(encode(Coded(matrix, rows, columns, resolution), chunk=60))
    assert np.array_equal(found, matrix)
    assert np.array_equal(steps[0], rows) and np.array_equal(steps[1], columns)
