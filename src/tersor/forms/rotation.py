"""A random rotation that costs next to nothing: signs, then a Hadamard transform, then a cosine transform.

The Hadamard transform takes the largest power of two in a size, the cosine transform what is left of it, so any size
has one; it mixes all entries of a vector, after which a weight looks Gaussian and no direction of a metric stands out.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

ODD = 512  # the largest odd part of a size that is transformed


@cache
def _signs(size: int) -> Tensor:
    generator = torch.Generator().manual_seed(size)
    return torch.randint(0, 2, (size,), generator=generator).float() * 2 - 1


@cache
def _cosines(size: int) -> Tensor:
    """The orthogonal cosine transform (size, size)."""
    k, n = torch.arange(size, dtype=torch.float64)[:, None], torch.arange(size, dtype=torch.float64)
    matrix = torch.cos(math.pi * (2 * n + 1) * k / (2 * size)) * math.sqrt(2 / size)
    matrix[0] /= math.sqrt(2)
    return matrix.float()


def rotatable(size: int) -> bool:
    """Whether vectors of this size are worth rotating: more than one entry, and a small odd part."""
    return size > 1 and size // (size & -size) <= ODD


def rotate(x: Tensor) -> Tensor:
    """The rotation of the last dimension of `x` (..., size)."""
    size = x.shape[-1]
    power = size & -size
    odd = size // power
    y = _hadamard((x * _signs(size).to(x)).reshape(*x.shape[:-1], odd, power))
    if odd > 1:
        y = torch.einsum("ab,...bp->...ap", _cosines(odd).to(x), y)
    return y.reshape(x.shape)


def rotate_back(x: Tensor) -> Tensor:
    """The inverse of `rotate`."""
    size = x.shape[-1]
    power = size & -size
    odd = size // power
    y = x.reshape(*x.shape[:-1], odd, power)
    if odd > 1:
        y = torch.einsum("ab,...ap->...bp", _cosines(odd).to(x), y)
    return _hadamard(y).reshape(x.shape) * _signs(size).to(x)


def turned_back(matrix: Tensor, of_rows: bool, of_columns: bool) -> Tensor:
    """A matrix as it was before its rows, its columns or both were rotated."""
    matrix = rotate_back(matrix) if of_columns else matrix
    return rotate_back(matrix.T).T.contiguous() if of_rows else matrix


def _hadamard(x: Tensor) -> Tensor:
    """The orthogonal Walsh-Hadamard transform of the last dimension, a power of two; it is its own inverse."""
    shape, size = x.shape, x.shape[-1]
    half = 1
    while half < size:
        x = x.reshape(*shape[:-1], size // (2 * half), 2, half)
        a, b = x[..., 0, :], x[..., 1, :]
        x = torch.stack([a + b, a - b], -2)
        half *= 2
    return x.reshape(shape) / math.sqrt(size)
