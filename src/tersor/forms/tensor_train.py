"""The form `tt`: a matrix product operator, a chain of small cores with a mode of the rows and one of the columns each.

`W_hat[abe, cdf] = sum_xy G_1[a, c, x] G_2[x, b, d, y] G_3[y, e, f]`, cut off at a bond dimension (P255 CompactifAI).
Singular value decompositions from the left to the right cut one bond after another (the TT-SVD). Two cores are a sum of
Kronecker products, and two of which one has all rows and the other all columns are a low rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import Tensor

from tersor.errors import TersorError
from tersor.forms.base import Shape
from tersor.forms.lowrank import factorise
from tersor.forms.multilinear import MultilinearForm
from tersor.forms.network import Network

ROWS, COLUMNS, BONDS = "abeg", "cdfh", "xyz"


@dataclass(frozen=True)
class TensorTrainSetting:
    """`bond` is the most that neighbouring cores share; `bits` None keeps the cores in 16-bit floats."""

    cores: int
    bond: int
    bits: int | None = None

    def __post_init__(self) -> None:
        if self.cores not in (2, 3, 4):
            raise TersorError(f"tt: cores is {self.cores!r}, but must be 2, 3 or 4.")
        if not isinstance(self.bond, int) or self.bond < 1:
            raise TersorError(f"tt: bond is {self.bond!r}, but must be a whole number of at least 1.")

    @property
    def label(self) -> str:
        return f"tt {self.cores} cores b{self.bond} {'f16' if self.bits is None else f'int{self.bits}'}"


class TensorTrainForm(MultilinearForm):
    """Chains of 2 to 4 cores in 16-bit floats or integers."""

    name = "tt"
    stores = "the cores of a chain over factored rows and columns"
    wins = "nowhere seen on trained linear layers: low rank does less damage"

    def settings(self, shape: Shape) -> Iterable[TensorTrainSetting]:
        """Three and four cores, the bond of which makes them take an eighth, a quarter and more of the entries."""
        for cores in (3, 4):
            if any(prod(core) < 4 for core in zip(*(split(n, cores) for n in shape), strict=True)):
                continue
            for bits, shares in ((None, (0.06, 0.12, 0.25, 0.5)), (4, (0.25, 0.5, 1.0))):
                bonds = {self._bond(shape, cores, share) for share in shares}
                for bond in sorted(bonds - {0}):
                    yield TensorTrainSetting(cores, bond, bits)

    def _bond(self, shape: Shape, cores: int, share: float) -> int:
        """The largest bond of which the cores have at most a share of the entries of the weight; 0 for none."""
        low, high = 0, min(shape) ** 2 + 1
        while high - low > 1:
            middle = (low + high) // 2
            parameters = self.network(shape, TensorTrainSetting(cores, middle)).parameters
            low, high = (middle, high) if parameters <= share * prod(shape) else (low, middle)
        return low

    def setting(self, values: Mapping[str, Any]) -> TensorTrainSetting:
        return TensorTrainSetting(**values)

    def network(self, shape: Shape, setting: TensorTrainSetting) -> Network:
        return chain(split(shape[0], setting.cores), split(shape[1], setting.cores), setting.bond)

    def decompose(self, prepared: Tensor, network: Network) -> list[Tensor]:
        """Singular value decompositions from the left to the right."""
        d = len(network.operands)
        rest = prepared.permute([axis for k in range(d) for axis in (k, d + k)])
        cores = []
        for shape in network.shapes[:-1]:
            found = factorise(rest.reshape(prod(shape[:-1]), -1))
            bond = shape[-1]
            cores.append(found.left[:, :bond].reshape(shape))
            rest = found.values[:bond, None] * found.right[:bond]
        return [*cores, rest.reshape(network.shapes[-1])]


def chain(rows: tuple[int, ...], columns: tuple[int, ...], bond: int) -> Network:
    """The network of cores with these modes, their bonds no larger than the ranks they can have."""
    d = len(rows)
    sizes = dict(zip(ROWS, rows, strict=False)) | dict(zip(COLUMNS, columns, strict=False))
    entries = [r * c for r, c in zip(rows, columns, strict=True)]
    for k in range(1, d):
        sizes[BONDS[k - 1]] = min(bond, prod(entries[:k]), prod(entries[k:]))
    bonds = ["", *BONDS[: d - 1], ""]
    operands = tuple(bonds[k] + ROWS[k] + COLUMNS[k] + bonds[k + 1] for k in range(d))
    return Network(operands, ROWS[:d], COLUMNS[:d], sizes)


def split(size: int, count: int) -> tuple[int, ...]:
    """`size` as a product of `count` factors, rising, as near to one another as can be."""
    if count == 1:
        return (size,)
    divisors = [n for n in range(1, size + 1) if size % n == 0]
    splits = [tuple(sorted((n, *split(size // n, count - 1)))) for n in divisors if n**count <= size]
    return min(splits, key=lambda s: (s[-1] / s[0], s))
