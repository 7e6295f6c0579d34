"""Packed codes come back as they were, in exactly the bytes that their bits take."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tersor.forms.packing import PLANES, pack, packed_width, unpack


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(PLANES)), st.integers(1, 5), st.integers(1, 67), st.integers(0, 2**31))
def test_codes_come_back(bits: int, rows: int, columns: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (rows, columns), generator=generator, dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.shape == (rows, packed_width(columns, bits)) and packed.dtype == torch.uint8
    assert torch.equal(unpack(packed, bits, columns), codes)


@pytest.mark.parametrize("bits", sorted(PLANES))
def test_a_code_takes_its_bits(bits: int) -> None:
    assert packed_width(1024, bits) == 1024 * bits // 8
    assert packed_width(1, bits) == len(PLANES[bits])
