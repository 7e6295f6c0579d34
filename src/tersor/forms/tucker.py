"""The form `tucker`: a small core and a basis for each mode of a convolution's kernel (out, in, positions).

`W_hat[a, (b, c)] = sum_rst G[r, s, t] U[a, r] V[b, s] P[c, t]`; a basis of full rank is not stored, so that all kernel
positions kept is Tucker-2. Bases are the higher-order singular vectors, improved in turn (HOOI). The shape of the core
is chosen within a size by the higher-order singular values alone (P365 Approximately Optimal Core Shapes for Tensor
Decompositions).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import gcd, prod
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from tersor.errors import TersorError
from tersor.forms.base import Convolution, Shape
from tersor.forms.lowrank import Factorisation, factorise
from tersor.forms.multilinear import MultilinearForm
from tersor.forms.network import FactoredOperator, Network
from tersor.forms.products import WORTH

KERNELS = (9, 25, 49, 3, 5)  # positions that are tried where they divide the columns
ROUNDS = 3  # of HOOI
RULES = ("surrogate", "ratio")


@dataclass(frozen=True)
class TuckerSetting:
    """Columns are inputs times `kernel` positions, or what they have in common with it.

    The factors have at most `share` of the entries of the weight.

    The rule `surrogate` chooses the core's shape by what each mode would lose, `ratio` keeps the same part of every
    mode. `core` is that shape, filled in by the fit; a setting that has one keeps it. `bits` None is 16-bit floats.
    """

    kernel: int
    share: float
    rule: str = "surrogate"
    bits: int | None = None
    core: tuple[int, int, int] | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.kernel, int) or self.kernel < 1:
            raise TersorError(f"tucker: kernel is {self.kernel!r}, but must be a whole number of positions.")
        if not isinstance(self.share, int | float) or not 0 < self.share <= 4:
            raise TersorError(f"tucker: share is {self.share!r}, but must lie above 0 and not above 4.")
        if self.rule not in RULES:
            raise TersorError(f"tucker: rule is {self.rule!r}, but must be one of {RULES}.")

    @property
    def label(self) -> str:
        marks = "" if self.rule == "surrogate" else f" {self.rule}"
        return f"tucker k{self.kernel} {self.share:.3g}{marks} {'f16' if self.bits is None else f'int{self.bits}'}"


class UnfoldedOperator(FactoredOperator):
    """Factors of a kernel, applied in two steps where one of them turns few channels into all outputs."""

    def two_steps(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """`W` as (rows, rank) and (rank, columns)."""
        place, factors = self._left, self.factors(dtype)
        assert place is not None
        letters = self.network.operands[place]
        others = [i for i in range(len(factors)) if i != place]
        rest = Network(
            tuple(self.network.operands[i] for i in others), letters[1], self.network.columns, self.network.sizes
        )
        return factors[place], rest.matrix([factors[i] for i in others])

    @property
    def _left(self) -> int | None:
        """The factor (outputs, rank), where the outputs have one of their own."""
        return next(
            (i for i, letters in enumerate(self.network.operands) if letters[0] == "a" and len(letters) == 2), None
        )

    @property
    def flops(self) -> int:
        rows, columns = self.shape
        if self._left is None:
            return 2 * rows * columns
        return 2 * min(rows * columns, self.network.shapes[self._left][1] * (rows + columns))

    def forward(self, x: Tensor) -> Tensor:
        if self.flops == 2 * self.shape[0] * self.shape[1]:
            return torch.nn.functional.linear(x, self.dense(x.dtype))
        left, right = self.two_steps(x.dtype)
        return x @ right.T @ left.T

    def convolve(self, x: Tensor, convolution: Convolution) -> Tensor:
        saved = x[:, 0].numel() * (2 * self.shape[0] * self.shape[1] - self.flops)
        if saved < WORTH:  # moving channels about takes longer
            return convolution(x, self.dense(x.dtype))
        left, right = self.two_steps(x.dtype)
        return (convolution(x, right).movedim(1, -1) @ left.T).movedim(-1, 1)


@dataclass(frozen=True)
class Unfoldings:
    """A tensor (out, in, positions) and the singular value decompositions of its three unfoldings."""

    tensor: Tensor
    found: list[Factorisation]

    @property
    def tails(self) -> list[Tensor]:
        """For every mode of size I what ranks 0 to I of it leave out, (I + 1,), squares."""
        tails = []
        for size, of_mode in zip(self.tensor.shape, self.found, strict=True):
            squares = self.tensor.new_zeros(size)
            squares[: len(of_mode.values)] = of_mode.values.square()
            tails.append(torch.cat([squares.flip(0).cumsum(0).flip(0), squares.new_zeros(1)]))
        return tails


class TuckerForm(MultilinearForm):
    """Cores of a size, their shape chosen by the weight."""

    name = "tucker"
    stores = "a core and a factor a mode of a convolution"
    wins = "not yet measured on convolutions beside the others"

    def settings(self, shape: Shape) -> Iterable[TuckerSetting]:
        """Shares of the entries a factor of about 1.6 apart, for the kernels that divide the columns, two at most."""
        for kernel in kernels_of(shape):
            for bits, shares in ((None, (0.1, 0.16, 0.25, 0.4)), (4, (0.25, 0.4, 0.6))):
                for share in shares:
                    if share * prod(shape) >= shape[0] + shape[1] // kernel + kernel + 1:
                        yield TuckerSetting(kernel, share, bits=bits)

    def setting(self, values: Mapping[str, Any]) -> TuckerSetting:
        core = values.get("core")
        return TuckerSetting(**{**values, "core": None if core is None else tuple(core)})

    def empty(self, shape: Shape, setting: TuckerSetting) -> UnfoldedOperator:
        return UnfoldedOperator(shape, setting, self.network(shape, setting))

    def network(self, shape: Shape, setting: TuckerSetting) -> Network:
        """The factors of a core's shape; where the fit has not chosen one, of the one that keeps ratios."""
        dims = modes_of(shape, setting.kernel)
        core = setting.core or core_of_ratio(dims, setting.share * prod(dims))
        if any(not 1 <= r <= n for r, n in zip(core, dims, strict=True)):
            raise TersorError(f"tucker: core is {core!r}, but must lie between 1 and {dims!r}.")
        letters = "".join(bond if r < n else mode for r, n, bond, mode in zip(core, dims, "rst", "abc", strict=True))
        bases = [mode + bond for r, n, bond, mode in zip(core, dims, "rst", "abc", strict=True) if r < n]
        sizes = dict(zip("abcrst", (*dims, *core), strict=True))
        return Network((letters, *bases), "a", "bc", sizes)

    def prepare(self, tensor: Tensor) -> Unfoldings:
        return Unfoldings(tensor, [factorise(_unfold(tensor, mode)) for mode in range(3)])

    def completed(self, prepared: Unfoldings, shape: Shape, setting: TuckerSetting) -> TuckerSetting:
        if setting.core is not None:
            return setting
        dims = modes_of(shape, setting.kernel)
        most = setting.share * prod(dims)
        core = core_of_ratio(dims, most) if setting.rule == "ratio" else best_core(prepared.tails, most)
        return replace(setting, core=core)

    def decompose(self, prepared: Unfoldings, network: Network) -> list[Tensor]:
        """The higher-order singular vectors, each basis then found anew given the others (HOOI), and the core."""
        core = tuple(network.sizes[c] for c in "rst")
        bases = [_leading(f, r) for f, r in zip(prepared.found, core, strict=True)]
        cut = [mode for mode in range(3) if core[mode] < prepared.tensor.shape[mode]]
        for _ in range(ROUNDS if len(cut) > 1 else 0):
            for mode in cut:
                projected = _project(
                    prepared.tensor, [None if m == mode or m not in cut else bases[m] for m in range(3)]
                )
                bases[mode] = _leading(factorise(_unfold(projected, mode)), core[mode])
        kept = [bases[mode] if mode in cut else None for mode in range(3)]
        return [_project(prepared.tensor, kept), *(bases[mode] for mode in cut)]


def modes_of(shape: Shape, kernel: int) -> tuple[int, int, int]:
    """(outputs, inputs, positions), with as many positions as the kernel and the columns have in common."""
    positions = gcd(kernel, shape[1])
    return shape[0], shape[1] // positions, positions


def kernels_of(shape: Shape) -> list[int]:
    """The numbers of positions that a kernel of so many columns may have, two at most."""
    return [k for k in KERNELS if shape[1] % k == 0 and shape[1] > k][:2]


def size_of(dims: Sequence[int], core: Sequence[int]) -> int:
    """Entries of a core and of the bases that are stored, which are those not of full rank."""
    return prod(core) + sum(n * r for n, r in zip(dims, core, strict=True) if r < n)


def core_of_ratio(dims: Sequence[int], most: float) -> tuple[int, int, int]:
    """The largest core that keeps the same part of every mode and whose factors have at most so many entries."""
    ratios = sorted({r / n for n in dims for r in range(1, n + 1)})
    cores = [tuple(max(1, int(ratio * n + 1e-9)) for n in dims) for ratio in ratios]
    within = [c for c in cores if size_of(dims, c) <= most]
    return max(within, key=lambda c: (prod(c), c)) if within else (1, 1, 1)  # type: ignore[return-value]


def best_core(tails: Sequence[Tensor], most: float) -> tuple[int, int, int]:
    """The core's shape of at most so many entries with the least sum of tails.

    The squared error of the best factors of a core lies between the largest of its three tails and their sum, so the
    choice is within a factor of three of the best. All shapes are looked at: where the ranks of two modes are given,
    the third is the largest that there is room for. (1, 1, 1) where there is room for none.
    """
    dims = [len(tail) - 1 for tail in tails]
    last = max(range(3), key=lambda mode: dims[mode])
    first, second = (mode for mode in range(3) if mode != last)
    r, s = torch.meshgrid(*(torch.arange(1, dims[m] + 1) for m in (first, second)), indexing="ij")
    used = torch.where(r < dims[first], r * dims[first], 0) + torch.where(s < dims[second], s * dims[second], 0)
    room = int(most) - used
    third = (room // (r * s + dims[last])).clamp(0, dims[last] - 1)
    third = torch.where(r * s * dims[last] <= room, dims[last], third)
    loss = tails[first][r] + tails[second][s] + tails[last][third]
    loss = torch.where(third > 0, loss, torch.inf)
    place = int(loss.argmin())
    if loss.flatten()[place] == torch.inf:
        return 1, 1, 1
    ranks = {first: r, second: s, last: third}
    return tuple(int(ranks[mode].flatten()[place]) for mode in range(3))  # type: ignore[return-value]


def _leading(found: Factorisation, rank: int) -> Tensor:
    """The first left singular vectors (n, rank), zeros where there are fewer."""
    return pad(found.left[:, :rank], (0, max(0, rank - found.left.shape[1])))


def _unfold(tensor: Tensor, mode: int) -> Tensor:
    return tensor.movedim(mode, 0).flatten(1)


def _project(tensor: Tensor, bases: Sequence[Tensor | None]) -> Tensor:
    """The coefficients of a tensor in orthonormal bases of some of its modes."""
    for mode, basis in enumerate(bases):
        if basis is not None:
            tensor = (tensor.movedim(mode, -1) @ basis).movedim(-1, mode)
    return tensor
