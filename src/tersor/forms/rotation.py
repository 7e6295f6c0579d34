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
SMALL = 128  # the size up to which a transform is one product


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
    """The orthogonal Walsh-Hadamard transform of the last dimension, a power of two; it is its own inverse.

    As products with small matrices: the transform of size `a b` is that of size `b` and that of size `a` in turn.
    """
    size = x.shape[-1]
    if size <= SMALL:
        return x @ _signs_of_products(size).to(x)
    half = 1 << (size.bit_length() // 2)
    y = _hadamard(x.unflatten(-1, (size // half, half)))
    return _hadamard(y.transpose(-1, -2)).transpose(-1, -2).flatten(-2)


@cache
def _signs_of_products(size: int) -> Tensor:
    """The Hadamard matrix (size, size) in Sylvester's order."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)]) / math.sqrt(2)
    return matrix
