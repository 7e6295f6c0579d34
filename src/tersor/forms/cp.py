"""The form `cp`: a convolution's kernel (out, in, positions) as a sum of outer products of three vectors.

`W_hat[a, (b, c)] = sum_r U[a, r] V[b, r] P[c, r]`, the canonical polyadic decomposition, found by alternating least
squares from the higher-order singular vectors. It is Tucker with a diagonal core: fewer entries a rank, no closed form.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from tersor.errors import TersorError
from tersor.forms.base import Shape
from tersor.forms.lowrank import factorise
from tersor.forms.multilinear import MultilinearForm, solve
from tersor.forms.network import Network
from tersor.forms.tucker import UnfoldedOperator, kernels_of, modes_of
from tersor.metrics import Metric, Side

SWEEPS, WORK = 100, 4e9  # of alternating least squares; FLOPs of them, of which large weights get fewer sweeps


@dataclass(frozen=True)
class CPSetting:
    """Columns are inputs times `kernel` positions, or what they have in common with it.

    `bits` None keeps the factors in 16-bit floats.
    """

    kernel: int
    rank: int
    bits: int | None = None

    def __post_init__(self) -> None:
        for name in ("kernel", "rank"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise TersorError(f"cp: {name} is {value!r}, but must be a whole number of at least 1.")

    @property
    def label(self) -> str:
        return f"cp k{self.kernel} r{self.rank} {'f16' if self.bits is None else f'int{self.bits}'}"


class CPForm(MultilinearForm):
    """Sums of outer products, their vectors in 16-bit floats or integers."""

    name = "cp"
    stores = "a vector a mode and term of a convolution"
    wins = "not yet measured on convolutions beside the others"

    def settings(self, shape: Shape) -> Iterable[CPSetting]:
        """Ranks of which the factors have a twentieth, a tenth and more of the entries."""
        for kernel in kernels_of(shape):
            for bits, shares in ((None, (0.05, 0.1, 0.2, 0.4)), (4, (0.2, 0.4))):
                ranks = {int(share * prod(shape) / sum(modes_of(shape, kernel))) for share in shares}
                for rank in sorted(ranks - {0}):
                    yield CPSetting(kernel, rank, bits)

    def setting(self, values: Mapping[str, Any]) -> CPSetting:
        return CPSetting(**values)

    def empty(self, shape: Shape, setting: CPSetting) -> UnfoldedOperator:
        return UnfoldedOperator(shape, setting, self.network(shape, setting))

    def network(self, shape: Shape, setting: CPSetting) -> Network:
        sizes = dict(zip("abcr", (*modes_of(shape, setting.kernel), setting.rank), strict=True))
        return Network(("ar", "br", "cr"), "a", "bc", sizes)

    def decompose(self, prepared: Tensor, network: Network) -> list[Tensor]:
        """Alternating least squares; vectors that the singular ones of a mode do not suffice for start at random."""
        generator = torch.Generator().manual_seed(0)
        rank, size = network.sizes["r"], prepared.norm().clamp_min(1e-300)
        factors = []
        for mode, n in enumerate(prepared.shape):
            vectors = torch.randn(n, rank, generator=generator, dtype=torch.float64).to(prepared.device)
            vectors /= vectors.norm(dim=0)
            found = factorise(prepared.movedim(mode, 0).flatten(1)).left[:, :rank]
            vectors[:, : found.shape[1]] = found
            factors.append(vectors)
        rows, columns = prepared.shape[0], prepared[0].numel()
        plain = Metric("identity", Side(prepared.new_ones(rows)), Side(prepared.new_ones(columns)))
        residual = prepared.reshape(rows, columns) / size - network.matrix(factors)
        for _ in range(int(min(SWEEPS, WORK / (12 * rank * prepared.numel())))):
            for i in range(3):
                residual = solve(network, residual, plain, factors, i, steps=1)
        return [f * size ** (1 / 3) for f in factors]
