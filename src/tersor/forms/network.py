"""Matrices that are contractions of small factors: their axes, what they cost, how they are stored and applied.

A network says in letters which axes the factors have: `kac,kbd->abcd` is a sum of Kronecker products, the letters of
the output being modes of the rows and then of the columns. How its factors are found is told in `multilinear.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import combinations, permutations
from typing import Any

import torch
from torch import Tensor, nn

from tersor.forms.base import Operator, Shape
from tersor.forms.integers import IntForm, IntOperator, IntSetting
from tersor.forms.products import HalfOperator
from tersor.metrics import Metric, Side

GROUP = 64  # entries that share a scale where factors are integers


@dataclass(frozen=True)
class Network:
    """A matrix as a contraction: `operands` are the letters of the factors, `rows` and `columns` those of the modes.

    A letter that is no mode is a bond, and is summed over. Every mode is an axis of exactly one factor, and without
    any one factor the others fall apart into parts that share none of its bonds, as in a tree; or all share one bond.
    """

    operands: tuple[str, ...]
    rows: str
    columns: str
    sizes: Mapping[str, int]

    @property
    def modes(self) -> str:
        return self.rows + self.columns

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """The shapes of the factors."""
        return [tuple(self.sizes[c] for c in letters) for letters in self.operands]

    @property
    def parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes)

    def tensor(self, matrix: Tensor) -> Tensor:
        """A matrix (rows, columns) with an axis for every mode."""
        return matrix.reshape([self.sizes[c] for c in self.modes])

    def contract(self, factors: Sequence[Tensor]) -> Tensor:
        """The tensor of the modes."""
        return contract(self.operands, factors, self.modes)

    def matrix(self, factors: Sequence[Tensor]) -> Tensor:
        """The matrix (rows, columns)."""
        return self.contract(factors).reshape(math.prod(self.sizes[c] for c in self.rows), -1)

    def adjoint(self, tensor: Tensor, factors: Sequence[Tensor], i: int) -> Tensor:
        """The derivative of the scalar product of `tensor` and the contraction, by factor `i`."""
        others = [j for j in range(len(factors)) if j != i]
        letters = [self.modes, *(self.operands[j] for j in others)]
        return contract(letters, [tensor, *(factors[j] for j in others)], self.operands[i])

    def grams(self, factors: Sequence[Tensor], i: int) -> dict[str, Tensor]:
        """For every bond of factor `i` the scalar products of what hangs there, (size, size)."""
        return {c: self._gram(factors, i, c) for c in self.operands[i] if c not in self.modes}

    def _gram(self, factors: Sequence[Tensor], i: int, bond: str) -> Tensor:
        part: list[int] = []
        reached = {bond}
        for _ in factors:  # as many rounds as the longest way
            part = [j for j, letters in enumerate(self.operands) if j != i and reached & set(letters)]
            reached |= {c for j in part for c in self.operands[j] if c not in self.modes and c not in self.operands[i]}
        second = ["".join(c if c in self.modes else c.upper() for c in self.operands[j]) for j in part]
        letters, parts = [self.operands[j] for j in part] + second, [factors[j] for j in part] * 2
        return contract(letters, parts, bond + bond.upper())

    @cached_property
    def path(self) -> tuple[tuple[int, ...], int]:
        """The order in which a vector of the columns meets the factors, and the FLOPs of it, the fewest of all."""
        orders = permutations(range(len(self.operands)))
        return min(((order, self._flops(order)) for order in orders), key=lambda found: found[1])

    def _flops(self, order: tuple[int, ...]) -> int:
        held, flops = set(self.columns), 0
        for number, i in enumerate(order):
            flops += 2 * math.prod(self.sizes[c] for c in held | set(self.operands[i]))
            held = self._later(held | set(self.operands[i]), order[number + 1 :])
        return flops

    def _later(self, held: set[str], later: Sequence[int]) -> set[str]:
        return {c for c in held if c in self.rows or any(c in self.operands[j] for j in later)}

    def apply(self, x: Tensor, factors: Sequence[Tensor]) -> Tensor:
        """`x W^T` for `x` (..., columns), along the path."""
        order, held = self.path[0], self.columns
        y = x.reshape(*x.shape[:-1], *(self.sizes[c] for c in held))
        for number, i in enumerate(order):
            left = self._later(set(held) | set(self.operands[i]), order[number + 1 :])
            letters = "".join(sorted(left)) if number + 1 < len(order) else self.rows
            y = torch.einsum(f"...{held},{self.operands[i]}->...{letters}", y, factors[i])
            held = letters
        return y.reshape(*x.shape[:-1], -1)

    def take(self, index: Tensor, factors: Sequence[Tensor]) -> Tensor:
        """The rows at `index` (n,), as (n, columns)."""
        places = dict(zip(self.rows, torch.unravel_index(index, [self.sizes[c] for c in self.rows]), strict=True))
        taken, letters = list(factors), list(self.operands)
        for i, operand in enumerate(self.operands):
            for axis, c in enumerate(operand):
                if c in places:
                    taken[i] = taken[i].index_select(axis, places[c])
                    letters[i] = letters[i].replace(c, "Z")
        return contract(letters, taken, "Z" + self.columns).reshape(len(index), -1)


def contract(operands: Sequence[str], tensors: Sequence[Tensor], output: str) -> Tensor:
    """The contraction of a few tensors by their letters, two at a time, in the order of the fewest FLOPs."""
    sizes = {c: n for letters, t in zip(operands, tensors, strict=True) for c, n in zip(letters, t.shape, strict=True)}
    letters, held = list(operands), list(tensors)
    for i, j in _pairs(tuple(operands), output, tuple(sorted(sizes.items())))[1]:
        kept = _kept(letters, i, j, output)
        pair = torch.einsum(f"{letters[i]},{letters[j]}->{kept}", held[i], held[j])
        letters = [x for k, x in enumerate(letters) if k not in (i, j)] + [kept]
        held = [x for k, x in enumerate(held) if k not in (i, j)] + [pair]
    return torch.einsum(f"{letters[0]}->{output}", held[0])


@lru_cache(1 << 14)
def _pairs(
    operands: tuple[str, ...], output: str, sizes: tuple[tuple[str, int], ...]
) -> tuple[int, tuple[tuple[int, int], ...]]:
    """The fewest FLOPs of a contraction and the pairs that take them; a result stands behind what is left."""
    known, best = dict(sizes), None
    for i, j in combinations(range(len(operands)), 2):
        left = (*(x for k, x in enumerate(operands) if k not in (i, j)), _kept(operands, i, j, output))
        flops, later = _pairs(left, output, sizes)
        flops += 2 * math.prod(known[c] for c in set(operands[i] + operands[j]))
        if best is None or flops < best[0]:
            best = flops, ((i, j), *later)
    return best or (0, ())


def _kept(operands: Sequence[str], i: int, j: int, output: str) -> str:
    """The letters of two tensors that are still wanted once these are contracted."""
    wanted = output + "".join(x for k, x in enumerate(operands) if k not in (i, j))
    return "".join(c for c in dict.fromkeys(operands[i] + operands[j]) if c in wanted)


class FactoredOperator(Operator):
    """The factors of a network, each a matrix (first axis, the other axes) of 16-bit floats or of integers."""

    def __init__(self, shape: Shape, setting: Any, network: Network) -> None:
        super().__init__(shape, setting)
        self.network = network
        self.parts = nn.ModuleList(empty_part(s, setting.bits) for s in network.shapes)

    def factors(self, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        """The factors with the axes that the network gives them."""
        shapes = self.network.shapes
        return [part.dense(dtype).reshape(s) for part, s in zip(self.parts, shapes, strict=True)]  # type: ignore[operator]

    @property
    def flops(self) -> int:
        return min(self.network.path[1], super().flops)

    def decode(self) -> Tensor:
        return self.network.matrix(self.factors())

    def forward(self, x: Tensor) -> Tensor:
        if self.network.path[1] >= super().flops:
            return super().forward(x)
        return self.network.apply(x, self.factors(x.dtype))

    def take(self, index: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        rows = self.network.take(index.reshape(-1), self.factors())
        return rows.reshape(*index.shape, self.shape[1]).to(dtype)


def empty_part(shape: tuple[int, ...], bits: int | None) -> Operator:
    """A factor without data, as the matrix (first axis, the other axes)."""
    flat = shape[0], math.prod(shape[1:])
    return HalfOperator(flat) if bits is None else IntOperator(flat, _part_setting(flat, bits))


def stored_part(factor: Tensor, bits: int | None) -> Operator:
    """A factor rounded to what is stored."""
    flat = factor.flatten(1).float()
    if bits is None:
        return HalfOperator.of(flat)
    rows, columns = flat.shape
    plain = Metric("identity", Side(flat.new_ones(rows)), Side(flat.new_ones(columns)))
    return IntForm().fit(flat, plain, _part_setting((rows, columns), bits))


def _part_setting(flat: Shape, bits: int) -> IntSetting:
    return IntSetting(bits, GROUP if flat[1] > GROUP else None, symmetric=True, rounding="nearest")


def along(matrix: Tensor, tensor: Tensor, axis: int) -> Tensor:
    """A matrix, or the diagonal of one, applied to an axis of a tensor."""
    moved = tensor.movedim(axis, -1)
    matrix = matrix.to(tensor.dtype)
    return (moved * matrix if matrix.dim() == 1 else moved @ matrix.T).movedim(-1, axis)
