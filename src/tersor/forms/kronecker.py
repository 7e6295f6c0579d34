"""The form `kronecker`: a sum of a few Kronecker products of small matrices.

`W_hat = sum_k A_k (x) B_k`. Rearranged so that every block of the weight is a row, the weight is a matrix in which each
product is an outer product, so that one singular value decomposition gives the best sums of any number of terms
(Van Loan, Pitsianis). The layers of P086 PHNNs are these sums with `A_k` of n x n and n terms, about 1/n of the weight.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import gcd, log
from typing import Any

from torch import Tensor
from torch.nn.functional import pad

from tersor.errors import TersorError
from tersor.forms.base import Shape
from tersor.forms.lowrank import Factorisation, factorise
from tersor.forms.multilinear import MultilinearForm
from tersor.forms.network import Network


@dataclass(frozen=True)
class KroneckerSetting:
    """`terms` products with `A_k` of (rows, columns), or of what these have in common with those of the weight.

    `bits` None keeps both factors in 16-bit floats.
    """

    rows: int
    columns: int
    terms: int
    bits: int | None = None

    def __post_init__(self) -> None:
        for name in ("rows", "columns", "terms"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise TersorError(f"kronecker: {name} is {value!r}, but must be a whole number of at least 1.")

    @property
    def label(self) -> str:
        return f"kronecker {self.rows}x{self.columns} n{self.terms} {'f16' if self.bits is None else f'int{self.bits}'}"


class KroneckerForm(MultilinearForm):
    """Sums of Kronecker products, their factors in 16-bit floats or integers."""

    name = "kronecker"
    stores = "the factors of a sum of Kronecker products"
    wins = "nowhere seen on trained linear layers: low rank does less damage"

    def settings(self, shape: Shape) -> Iterable[KroneckerSetting]:
        """Hypercomplex layers of n = 2 and 4, and more and more terms of the shapes that make a term cheap."""
        for n in (2, 4):
            if shape[0] % n == shape[1] % n == 0 and min(shape) > n:
                yield KroneckerSetting(n, n, n)
        for bits, shares in ((None, (0.1, 0.2, 0.4)), (4, (0.25, 0.5, 1.0))):
            for rows, columns in shapes_of(shape):
                inner, entries = rows * columns, shape[0] * shape[1]
                counts = {int(share * entries / (inner + entries / inner)) for share in shares}
                for count in sorted(counts - {0}):
                    yield KroneckerSetting(rows, columns, min(count, inner, entries // inner), bits)

    def setting(self, values: Mapping[str, Any]) -> KroneckerSetting:
        return KroneckerSetting(**values)

    def network(self, shape: Shape, setting: KroneckerSetting) -> Network:
        a, c = gcd(setting.rows, shape[0]), gcd(setting.columns, shape[1])
        sizes = {"k": setting.terms, "a": a, "b": shape[0] // a, "c": c, "d": shape[1] // c}
        return Network(("kac", "kbd"), "ab", "cd", sizes)

    def prepare(self, tensor: Tensor) -> Factorisation:
        """The singular value decomposition of the weight with a row for every block, (a c, b d)."""
        a, b, c, d = tensor.shape
        return factorise(tensor.permute(0, 2, 1, 3).reshape(a * c, b * d))

    def decompose(self, prepared: Factorisation, network: Network) -> list[Tensor]:
        """The best sum of so many terms."""
        count = min(network.sizes["k"], len(prepared.values))
        root = prepared.values[:count].sqrt()
        left, right = (prepared.left[:, :count] * root).T, root[:, None] * prepared.right[:count]
        missing = network.sizes["k"] - count
        return [pad(f, (0, 0, 0, missing)).reshape(s) for f, s in zip((left, right), network.shapes, strict=True)]


def shapes_of(shape: Shape) -> list[tuple[int, int]]:
    """Shapes of `A_k` of which a term is cheapest, that is, about as many entries as `B_k` has: two at most.

    Of those within a factor of two of the cheapest, the one that keeps the proportions of the weight, and the tallest.
    A column beside a row, which is a rank, is left to `lowrank`.
    """
    entries = shape[0] * shape[1]
    divisors = [[n for n in range(1, size + 1) if size % n == 0] for size in shape]
    pairs = [(r, c) for r in divisors[0] for c in divisors[1]]
    pairs = [(r, c) for r, c in pairs if (r, c) not in ((shape[0], 1), (1, shape[1])) and 1 < r * c < entries]
    if not pairs:
        return []
    cheapest = min(r * c + entries / (r * c) for r, c in pairs)
    cheap = [(r, c) for r, c in pairs if r * c + entries / (r * c) <= 2 * cheapest]
    square = min(cheap, key=lambda p: abs(log(p[0] ** 2 / shape[0])) + abs(log(p[1] ** 2 / shape[1])))
    tallest = max(cheap, key=lambda p: (p[0] / p[1], -p[1]))
    return list(dict.fromkeys((square, tallest)))
