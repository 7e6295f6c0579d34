"""The stream of a coded matrix: bytes from which any machine decodes the same integers (`docs/stream.md`).

A code is drawn from a Gaussian whose scale the file knows: that of the weights over the step of its row and column. So
entries fall into classes of like scale, every class has an integer table, and one ANS coder (constriction) takes a
class after the other. Chunks of rows stand alone, each with its length and checksum.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from tersor.coding.tables import FAMILIES, HIGHEST, LOWEST, TOTAL, costs, frequencies, reach_of
from tersor.errors import TersorError

MAGIC = b"TSC1"
CHUNK = 1 << 20  # entries of a chunk, at least a row
LARGEST = 1 << 20  # the magnitude of a code
FARTHEST = 4000  # the magnitude of a side's logarithm, in units of the resolution
SEARCHED = 6  # quarters of an octave around the deviation of the weights
Array = np.ndarray[Any, Any]


class StreamError(TersorError):
    """A stream that is damaged or none; the message says where."""


@dataclass(frozen=True)
class Coded:
    """Codes (rows, columns) int32; `rows` and `columns` are the binary logarithms of the steps' factors.

    They are integers in units of 1 / `resolution`: the step of an entry is 2^((rows[i] + columns[j]) / resolution).
    Codes lie within 2^20 of zero, logarithms within 4000.
    """

    codes: Array
    rows: Array
    columns: Array
    resolution: int


@dataclass(frozen=True)
class _Model:
    """A family of tables and the index, in quarters of an octave, of an entry whose step is 1."""

    family: int
    offset: int


def encode(coded: Coded, chunk: int = CHUNK) -> bytes:
    """The stream of a matrix; the probability model is the one under which it takes the fewest bits."""
    codes = np.ascontiguousarray(coded.codes, dtype=np.int32)
    if codes.max(initial=0) > LARGEST or codes.min(initial=0) < -LARGEST:
        raise StreamError(f"A code lies beyond {LARGEST:,}, the largest that a stream holds.")
    levels = _levels(coded.rows, coded.columns, coded.resolution)
    model = _best_model(codes, levels)
    sides = [_encode_side(side) for side in (coded.rows, coded.columns)]
    rows_a_chunk = max(1, chunk // max(1, codes.shape[1]))
    chunks = []
    for start in range(0, codes.shape[0], rows_a_chunk):
        part = slice(start, start + rows_a_chunk)
        chunks.append(_encode_classes(codes[part].ravel(), _classes(levels, model, part), model.family))
    numbers = [*codes.shape, coded.resolution, model.family, _zigzag(model.offset), rows_a_chunk]
    numbers += [len(side) for side in sides] + [len(c) for c in chunks]
    header = MAGIC + b"".join(_varint(number) for number in numbers) + b"".join(sides)
    return _summed(header) + b"".join(_summed(c) for c in chunks)


def decode(stream: bytes | memoryview, shape: tuple[int, int] | None = None) -> Coded:
    """The matrix of a stream; raises StreamError where it is damaged, naming the part, or not of the shape that is due.

    A stranger's stream may claim any shape, so give the one that is due: nothing is allocated for another.
    """
    reader = _Reader(bytes(stream))
    if reader.take(4) != MAGIC:
        raise StreamError("This is no coded stream of version 1.")
    rows, columns, resolution, family, offset, rows_a_chunk = (reader.varint() for _ in range(6))
    if family >= len(FAMILIES) or rows_a_chunk < 1 or not 1 <= resolution <= 64:
        raise StreamError("The header of a coded stream is damaged.")
    count = -(-rows // rows_a_chunk)
    if count > len(reader.data):
        raise StreamError("The header of a coded stream is damaged.")
    lengths = [reader.varint() for _ in range(2 + count)]
    sides = [reader.take(length) for length in lengths[:2]]
    reader.check("header")
    if shape is not None and (rows, columns) != tuple(shape):
        raise StreamError(f"A coded stream holds {(rows, columns)}, where {tuple(shape)} is due.")
    row_logs, column_logs = (_decode_side(side, n) for side, n in zip(sides, (rows, columns), strict=True))
    levels = _levels(row_logs, column_logs, resolution)
    model = _Model(family, _bounded(offset, 1 << 16))
    codes = np.empty((rows, columns), dtype=np.int32)
    for number, length in enumerate(lengths[2:]):
        payload = reader.take(length)
        reader.check(f"chunk {number + 1} of {count}")
        part = slice(number * rows_a_chunk, (number + 1) * rows_a_chunk)
        codes[part] = _decode_classes(payload, _classes(levels, model, part), family).reshape(codes[part].shape)
    reader.end()
    return Coded(codes, row_logs, column_logs, resolution)


def code_costs(coded: Coded) -> tuple[Array, Array]:
    """Bits of every magnitude in every class (classes, magnitudes) under the best model of a matrix, and the class of
    every entry (rows, columns), as a price list for rounding."""
    levels = _levels(coded.rows, coded.columns, coded.resolution)
    model = _best_model(coded.codes, levels)
    classes = _classes(levels, model, slice(None)).reshape(levels.shape)
    return costs(model.family), classes


def _levels(rows: Array, columns: Array, resolution: int) -> Array:
    """How many quarters of an octave the step of every entry lies above 1, rounded down (rows, columns), int16."""
    total = np.add.outer(rows.astype(np.int32), columns.astype(np.int32))
    total *= 4
    total //= resolution
    return total.astype(np.int16)


def _classes(levels: Array, model: _Model, part: slice) -> Array:
    """The index of the table of every entry of some rows, as an unsigned byte counted from the lowest."""
    index = model.offset - levels[part].astype(np.int32)
    return (np.clip(index, LOWEST, HIGHEST) - LOWEST).astype(np.uint8).ravel()


def _best_model(codes: Array, levels: Array) -> _Model:
    """The family and offset with the least cross-entropy."""
    low, span = int(levels.min()), int(levels.max()) - int(levels.min()) + 1
    width = costs(0).shape[1]
    counts = np.zeros((span, width), dtype=np.int64)
    rows_at_once = max(1, CHUNK // codes.shape[1])
    for start in range(0, len(codes), rows_at_once):
        part = slice(start, start + rows_at_once)
        flat = (levels[part].astype(np.int64) - low) * width + np.minimum(np.abs(codes[part]), width - 1)
        counts += np.bincount(flat.ravel(), minlength=span * width).reshape(span, width)
    used = np.flatnonzero(counts.sum(0))[-1] + 1
    rows = np.flatnonzero(counts.sum(1))
    counts = counts[rows][:, :used]
    energy = (counts * np.arange(used) ** 2.0 * np.exp2((rows[:, None] - rows[-1]) / 2)).sum() / codes.size
    near = low + int(rows[-1]) + (round(2 * np.log2(energy)) if energy > 0 else LOWEST)  # the deviation of the weights
    best: tuple[float, _Model] | None = None
    for family in range(len(FAMILIES)):
        table = costs(family)[:, :used]
        for offset in range(near - SEARCHED, near + SEARCHED + 1):
            index = np.clip(offset - low - rows, LOWEST, HIGHEST) - LOWEST
            bits = float((counts * table[index]).sum())
            if best is None or bits < best[0]:
                best = bits, _Model(family, offset)
    assert best is not None
    return best[1]


def _encode_side(logs: Array) -> bytes:
    """Logarithms of one side: their median, the index of their spread, and their Gaussian codes."""
    centre = int(np.median(logs)) if len(logs) else 0
    codes = (logs - centre).astype(np.int32)
    table = costs(0)
    magnitudes = np.minimum(np.abs(codes), table.shape[1] - 1)
    index = int(table[:, magnitudes].sum(1).argmin())
    payload = _encode_classes(codes, np.full(len(codes), index, dtype=np.uint8), 0)
    return _varint(_zigzag(centre)) + _varint(index) + payload


def _decode_side(payload: bytes, count: int) -> Array:
    reader = _Reader(payload)
    centre, index = _bounded(reader.varint(), FARTHEST), reader.varint()
    if index > HIGHEST - LOWEST:
        raise StreamError("The header of a coded stream is damaged.")
    logs: Array = centre + _decode_classes(reader.rest(), np.full(count, index, dtype=np.uint8), 0)
    if np.abs(logs).max(initial=0) > FARTHEST:
        raise StreamError("The header of a coded stream is damaged.")
    return logs


def _encode_classes(codes: Array, classes: Array, family: int) -> bytes:
    """Codes (n,) of classes (n,): escapes first, as numbers, then the words of the coder."""
    import constriction

    coder = constriction.stream.stack.AnsCoder()
    order = np.argsort(classes, kind="stable")
    symbols = codes[order]
    escapes: list[int] = []
    for name, start, stop in reversed(list(_spans(classes))):
        reach = reach_of(name + LOWEST)
        part = symbols[start:stop]
        strange = np.abs(part) > reach
        if strange.any():
            escapes = [int(value) for value in part[strange]] + escapes
            part = np.where(strange, reach + 1, part)
        coder.encode_reverse((part + reach).astype(np.int32), _model(family, name))
    numbers = [len(escapes), *(_zigzag(value) for value in escapes)]
    words: bytes = coder.get_compressed().astype("<u4").tobytes()
    return b"".join(_varint(number) for number in numbers) + words


def _decode_classes(payload: bytes, classes: Array, family: int) -> Array:
    import constriction

    reader = _Reader(payload)
    count = reader.varint()
    if count > len(classes):
        raise StreamError("A coded stream is damaged: it has more escapes than entries.")
    escapes = np.array([_bounded(reader.varint(), LARGEST) for _ in range(count)], dtype=np.int32)
    words = reader.rest()
    if len(words) % 4:
        raise StreamError("A coded stream is damaged: a chunk ends within a word.")
    try:
        coder = constriction.stream.stack.AnsCoder(np.frombuffer(words, dtype="<u4").astype(np.uint32))
    except ValueError as error:
        raise StreamError("A coded stream is damaged: the words of a chunk are none of the coder's.") from error
    order = np.argsort(classes, kind="stable")
    symbols = np.empty(len(classes), dtype=np.int32)
    used = 0
    for name, start, stop in _spans(classes):
        reach = reach_of(name + LOWEST)
        part = coder.decode(_model(family, name), stop - start) - reach
        strange = np.flatnonzero(part > reach)
        if len(strange) > count - used:
            raise StreamError("A coded stream is damaged: it has fewer escapes than are due.")
        if len(strange):
            part[strange] = escapes[used : used + len(strange)]
            used += len(strange)
        symbols[start:stop] = part
    if used != count or not coder.is_empty():
        raise StreamError("A coded stream is damaged: a chunk does not end where it should.")
    codes = np.empty_like(symbols)
    codes[order] = symbols
    return codes


def _spans(classes: Array) -> Iterator[tuple[int, int, int]]:
    """(class, start, stop) of every class in the sorted order of the entries."""
    stop = 0
    for name, count in enumerate(np.bincount(classes)):
        if count:
            start, stop = stop, stop + int(count)
            yield name, start, stop


@cache
def _model(family: int, name: int) -> Any:
    """The coder's table of a class. Frequencies over 2^20 are exact floats, so nothing is rounded on the way."""
    import constriction

    return constriction.stream.model.Categorical(frequencies(family, name + LOWEST) / TOTAL, perfect=False)


def _summed(data: bytes) -> bytes:
    return data + zlib.crc32(data).to_bytes(4, "little")


def _zigzag(value: int) -> int:
    return 2 * value if value >= 0 else -2 * value - 1


def _unzigzag(value: int) -> int:
    return value // 2 if value % 2 == 0 else -(value // 2) - 1


def _bounded(value: int, largest: int) -> int:
    """A signed number of a stream; beyond `largest` in magnitude it is damage."""
    if abs(signed := _unzigzag(value)) > largest:
        raise StreamError("A coded stream is damaged: a number in it is too large.")
    return signed


def _varint(value: int) -> bytes:
    """Seven bits a byte, the lowest first; the eighth says that more follow."""
    out = bytearray()
    while value >= 128:
        out.append(value % 128 + 128)
        value //= 128
    out.append(value)
    return bytes(out)


class _Reader:
    """Reads a stream from its start and keeps account of what the next checksum covers."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at, self.summed = data, 0, 0

    def take(self, length: int) -> bytes:
        if length > len(self.data) - self.at:
            raise StreamError("A coded stream is damaged or cut short.")
        self.at += length
        return self.data[self.at - length : self.at]

    def rest(self) -> bytes:
        return self.take(len(self.data) - self.at)

    def varint(self) -> int:
        value = shift = 0
        while True:
            (byte,) = self.take(1)
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7
            if shift > 35:
                raise StreamError("A coded stream is damaged: a number in it is too long.")

    def check(self, what: str) -> None:
        """The checksum of all that was read since the last one."""
        found = zlib.crc32(self.data[self.summed : self.at])
        if self.take(4) != found.to_bytes(4, "little"):
            raise StreamError(f"A coded stream is damaged: the checksum of its {what} does not hold.")
        self.summed = self.at

    def end(self) -> None:
        if self.at != len(self.data):
            raise StreamError("A coded stream is damaged: bytes follow its end.")
