"""The stream: every integer matrix round-trips, every damage is found, and the bytes are those of version 1."""

from __future__ import annotations

import hashlib
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from tersor.coding import Coded, StreamError, code_costs, decode, encode

Array = np.ndarray[Any, Any]


def gaussian(rows: int, columns: int, deviation: float = 1.0, seed: int = 0, resolution: int = 4) -> Coded:
    """Gaussian weights of one deviation under steps that differ from row to row and from column to column."""
    generator = np.random.default_rng(seed)
    a, b = (np.rint(generator.normal(0, 3, n)).astype(int) for n in (rows, columns))
    step = np.exp2((a[:, None] + b[None]) / resolution)
    return Coded(np.rint(generator.normal(0, deviation, (rows, columns)) / step).astype(np.int32), a, b, resolution)


def same(one: Coded, other: Coded) -> bool:
    pairs = ((one.codes, other.codes), (one.rows, other.rows), (one.columns, other.columns))
    return one.resolution == other.resolution and all(np.array_equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("deviation", [0.01, 0.3, 1.0, 30.0, 3000.0])
@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (300, 1), (64, 96)])
def test_round_trip(shape: tuple[int, int], deviation: float) -> None:
    coded = gaussian(*shape, deviation)
    assert same(decode(encode(coded)), coded)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_integers_round_trip(data: st.DataObject) -> None:
    shape = data.draw(st.tuples(st.integers(1, 12), st.integers(1, 12)))
    codes = data.draw(arrays(np.int32, shape, elements=st.integers(-(2**20), 2**20)))
    logs = [data.draw(arrays(np.int64, n, elements=st.integers(-400, 400))) for n in shape]
    coded = Coded(codes, *logs, data.draw(st.sampled_from((1, 3, 4, 16))))
    chunk = data.draw(st.integers(1, 150))
    assert same(decode(encode(coded, chunk)), coded)


@pytest.mark.parametrize("value", [0, 1, -7, 100_000])
def test_constant_matrices_take_next_to_nothing_but_escapes(value: int) -> None:
    coded = Coded(np.full((50, 70), value, dtype=np.int32), np.zeros(50, int), np.zeros(70, int), 4)
    stream = encode(coded)
    assert same(decode(stream), coded)
    assert value or len(stream) < 100


@pytest.mark.parametrize("deviation", [0.2, 1.0, 3.0, 6.0])
def test_bits_are_within_a_hundredth_of_the_entropy(deviation: float) -> None:
    """Of the tables' cross-entropy, and for Gaussians of the entropy itself; the steps cost five bits apiece."""
    coded = gaussian(400, 500, deviation)
    bits, classes = code_costs(coded)
    ideal = bits[classes, np.abs(coded.codes)].sum()
    spent = 8 * len(encode(coded)) - 5 * 900
    assert spent <= 1.01 * ideal
    deviations = deviation / np.exp2((coded.rows[:, None] + coded.columns[None]) / 4)
    entropy = sum(_entropy(s) * n for s, n in zip(*np.unique(deviations, return_counts=True), strict=True))
    assert ideal <= 1.01 * entropy + 200


def _entropy(deviation: float) -> float:
    """Bits of a rounded Gaussian."""
    from math import erf, sqrt

    reach = int(12 * deviation) + 3
    edges = [0.5 * erf((k - 0.5) / deviation / sqrt(2)) for k in range(-reach, reach + 2)]
    masses = np.diff(edges)
    masses = masses[masses > 1e-300]
    return float(-(masses * np.log2(masses)).sum())


def test_the_entropy_of_one_bit_changes_little_with_heavy_tails() -> None:
    """Student's weights are no Gaussians; the mixtures take up most of the difference."""
    generator = np.random.default_rng(0)
    codes = np.rint(generator.standard_t(4, (300, 400))).astype(np.int32)
    coded = Coded(codes, np.zeros(300, int), np.zeros(400, int), 4)
    counts = np.unique(codes, return_counts=True)[1] / codes.size
    assert 8 * len(encode(coded)) / codes.size <= -(counts * np.log2(counts)).sum() + 0.03


def test_every_single_byte_of_damage_is_found() -> None:
    coded = gaussian(9, 11)
    stream = bytearray(encode(coded, chunk=40))
    for at in range(len(stream)):
        for flip in range(1, 256):
            stream[at] ^= flip
            with pytest.raises(StreamError):
                decode(bytes(stream))
            stream[at] ^= flip
    assert same(decode(bytes(stream)), coded)


def test_a_stream_cut_short_or_continued_is_refused() -> None:
    stream = encode(gaussian(9, 11, seed=1), chunk=40)
    for length in range(len(stream)):
        with pytest.raises(StreamError):
            decode(stream[:length])
    with pytest.raises(StreamError, match="bytes follow its end"):
        decode(stream + b"\0")


def test_nothing_is_allocated_for_a_shape_that_is_not_due() -> None:
    small = encode(Coded(np.zeros((1, 1), dtype=np.int32), np.zeros(1, int), np.zeros(1, int), 4))
    numbers = bytearray(small[4:10])
    claimed = small[:4] + b"\xff\xff\xff\xff\x7f" + bytes(numbers[1:])
    with pytest.raises(StreamError):
        decode(claimed, (1, 1))
    with pytest.raises(StreamError, match=r"holds \(1, 1\), where \(2, 1\) is due"):
        decode(small, (2, 1))


def resealed(stream: bytes, start: int, stop: int, change: bytes) -> bytes:
    """A stream of one chunk with other bytes from `start` to `stop`, and a checksum that holds."""
    header = 4 + int(
        next(n for n in range(4, len(stream)) if zlib.crc32(stream[:n]).to_bytes(4, "little") == stream[n : n + 4])
    )
    chunk = bytearray(stream[header:-4])
    chunk[start:stop] = change
    return stream[:header] + bytes(chunk) + zlib.crc32(chunk).to_bytes(4, "little")


def test_lies_under_a_checksum_that_holds_are_refused() -> None:
    stream = encode(gaussian(9, 11))
    escaping = encode(Coded(np.full((2, 2), 100_000, dtype=np.int32), np.zeros(2, int), np.zeros(2, int), 4))
    assert same(decode(resealed(stream, 0, 0, b"")), gaussian(9, 11))
    for start, stop, change in ((-4, None, bytes(4)), (-3, None, b"\x01\x01\x01"), (1, 5, b"\x01\x02\x03\x04")):
        with pytest.raises(StreamError):
            decode(resealed(stream, start, stop if stop is not None else 10**9, change))
    with pytest.raises(StreamError):  # three escapes where four are due, in as many bytes
        decode(resealed(escaping, 0, 4, b"\x03\xc0\x9a\x8c"))


def test_codes_and_steps_beyond_all_bounds_are_refused() -> None:
    large = Coded(np.full((2, 2), -(2**31), dtype=np.int32), np.zeros(2, int), np.zeros(2, int), 4)
    with pytest.raises(StreamError, match="the largest that a stream holds"):
        encode(large)


def test_damage_in_a_chunk_is_named() -> None:
    stream = bytearray(encode(gaussian(64, 64), chunk=16 * 64))
    stream[-10] ^= 1
    with pytest.raises(StreamError, match="chunk 4 of 4"):
        decode(bytes(stream))


def test_the_stream_is_that_of_version_1() -> None:
    """The same bytes on any machine, and readable forever."""
    assert hashlib.sha256(encode(gaussian(40, 50))).hexdigest()[:16] == "2163b08856c2a97b"
