"""Codes of 1 to 8 bits, packed so that `bits` bits in the file hold one code.

A code is split into planes of 4, 2 and 1 bits (3 = 2 + 1, 5 = 4 + 1, 6 = 4 + 2); every plane of a row is packed into
whole bytes, so packing and unpacking are a few shifts over whole tensors, and single rows can be decoded.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 8: (8,)}


class Arrays:
    """The memory of tensors as numpy arrays, kept because making them takes longer than decoding a small matrix.

    They are made anew where a tensor is another or lies elsewhere, and never copied with what holds them.
    """

    def __init__(self) -> None:
        self._known: tuple[tuple[tuple[Tensor, int], ...], tuple[np.ndarray[Any, Any], ...]] = ((), ())

    def of(self, *tensors: Tensor) -> tuple[np.ndarray[Any, Any], ...]:
        places, arrays = self._known
        if len(places) != len(tensors) or any(
            tensor is not one or tensor.data_ptr() != place
            for tensor, (one, place) in zip(tensors, places, strict=True)
        ):
            arrays = tuple(tensor.contiguous().numpy() for tensor in tensors)
            self._known = tuple((tensor, tensor.data_ptr()) for tensor in tensors), arrays  # at once, for threads
        return arrays

    def __deepcopy__(self, memo: Any) -> Arrays:
        return Arrays()

    def __reduce__(self) -> Any:
        return Arrays, ()


def in_reach(tensor: Tensor) -> bool:
    """Whether compiled loops can read a tensor now: plain memory of this machine, outside of torch.compile."""
    return type(tensor) is Tensor and tensor.is_cpu and not torch.compiler.is_compiling()


def packed_width(columns: int, bits: int) -> int:
    """Bytes that a row of `columns` codes takes."""
    return sum(-(-columns * plane // 8) for plane in PLANES[bits])


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes (rows, columns) of integers below `2**bits` as bytes (rows, packed_width)."""
    rest, planes = codes.to(torch.uint8), []
    for plane in PLANES[bits]:
        per_byte = 8 // plane
        part = rest & (2**plane - 1)
        rest = rest >> plane if plane < 8 else rest
        part = torch.nn.functional.pad(part, (0, -part.shape[1] % per_byte))
        part = part.reshape(part.shape[0], -1, per_byte)
        packed = part[..., 0].clone()
        for k in range(1, per_byte):
            packed |= part[..., k] << (k * plane)
        planes.append(packed)
    return torch.cat(planes, 1)


def unpack(packed: Tensor, bits: int, columns: int) -> Tensor:
    """The codes (rows, columns), uint8, of bytes made by `pack`."""
    codes, start, shift = None, 0, 0
    for plane in PLANES[bits]:
        width = -(-columns * plane // 8)
        part = packed[:, start : start + width]
        if plane < 8:
            mask = 2**plane - 1
            part = torch.stack([(part >> s) & mask for s in range(0, 8, plane)], -1).flatten(1)[:, :columns]
        codes = part if codes is None else codes | (part << shift)
        start, shift = start + width, shift + plane
    assert codes is not None
    return codes
