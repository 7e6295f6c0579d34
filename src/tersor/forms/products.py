"""Operators made of operators: the 16-bit matrix, the product and the sum.

They hold no mathematics of fitting; forms compose them. A product applies its factors one after the other, so that its
FLOPs are those of the factors, on vectors, on look-ups and on convolutions alike.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tersor.forms.base import Convolution, Operator, Shape, bits_of, from_bits

WORTH = 1 << 22  # FLOPs that a convolution in two steps must save


class HalfOperator(Operator):
    """A matrix in 16-bit floats."""

    values: Tensor

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape, None)  # type: ignore[arg-type]
        self.register_buffer("values", torch.zeros(shape, dtype=torch.int16))

    @classmethod
    def of(cls, matrix: Tensor) -> HalfOperator:
        operator = cls((matrix.shape[0], matrix.shape[1]))
        operator.values = bits_of(matrix).contiguous()
        return operator

    def decode(self) -> Tensor:
        return from_bits(self.values)

    def take(self, index: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        return from_bits(self.values[index]).to(dtype)


class ProductOperator(Operator):
    """`left @ right`: (rows, rank) times (rank, columns)."""

    left: Operator
    right: Operator

    def __init__(self, left: Operator, right: Operator, setting: Any) -> None:
        super().__init__((left.shape[0], right.shape[1]), setting)
        self.left, self.right = left, right

    @property
    def flops(self) -> int:
        return self.left.flops + self.right.flops

    def decode(self) -> Tensor:
        return self.left.dense() @ self.right.dense()

    def forward(self, x: Tensor) -> Tensor:
        return self.left.forward(self.right.forward(x))

    def take(self, index: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.left.take(index, dtype) @ self.right.dense(dtype)

    def convolve(self, x: Tensor, convolution: Convolution) -> Tensor:
        if self._saved_flops(x) < WORTH:  # moving channels about takes longer
            return convolution(x, self.dense(x.dtype))
        return self.left(self.right.convolve(x, convolution).movedim(1, -1)).movedim(-1, 1)

    def _saved_flops(self, x: Tensor) -> int:
        """FLOPs less than with the whole matrix, at about as many positions as the input has."""
        positions = x[:, 0].numel()
        whole, rank = 2 * self.shape[0] * self.shape[1], self.left.shape[1]
        return positions * (whole - self.flops) + rank * whole


class SumOperator(Operator):
    """`first + second`, both (rows, columns)."""

    first: Operator
    second: Operator

    def __init__(self, first: Operator, second: Operator, setting: Any) -> None:
        super().__init__(first.shape, setting)
        self.first, self.second = first, second

    @property
    def flops(self) -> int:
        return self.first.flops + self.second.flops

    def decode(self) -> Tensor:
        return self.first.dense() + self.second.dense()

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) + self.second(x)

    def take(self, index: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.first.take(index, dtype) + self.second.take(index, dtype)

    def convolve(self, x: Tensor, convolution: Convolution) -> Tensor:
        return self.first.convolve(x, convolution) + self.second.convolve(x, convolution)
