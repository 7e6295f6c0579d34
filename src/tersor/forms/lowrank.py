"""The form `lowrank`: two thin factors, the best of their rank under the metric.

The singular values of the whitened weight `L_r^T W L_c` give the error of every rank at once; under the `input` metric
this is the principal part of the outputs (P041 LORD, P047), under diagonal ones it is weighted SVD (P455, P195).
Factors are 16-bit floats or themselves integers, each rounded under the metric that its errors see. Components
stand in the order of the singular values, so that a fit of a rank holds those of all smaller ranks (`cut`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tersor.errors import TersorError
from tersor.forms.base import Candidate, Operator, Shape, cost_of
from tersor.forms.integers import IntForm, IntOperator, IntSetting
from tersor.forms.packing import pack, unpack
from tersor.forms.products import HalfOperator, ProductOperator, SumOperator
from tersor.metrics import Metric, Side


@dataclass(frozen=True)
class LowRankSetting:
    """`bits` None keeps the factors in 16-bit floats."""

    rank: int
    bits: int | None = None

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise TersorError(f"lowrank: rank is {self.rank}, but must be at least 1.")

    @property
    def label(self) -> str:
        return f"lowrank r{self.rank} {'f16' if self.bits is None else f'int{self.bits}'}"

    def factors(self) -> tuple[IntSetting, IntSetting]:
        """The settings of the left factor (rows, rank) and of the right one (rank, columns)."""
        assert self.bits is not None
        rounding = "two-sided" if self.bits < 6 else "nearest"
        left = IntSetting(self.bits, None if self.rank <= 160 else 128, symmetric=True, rounding=rounding)
        return left, IntSetting(self.bits, 128, symmetric=True, rounding=rounding)


@dataclass(frozen=True)
class Factorisation:
    """Left and right singular vectors and singular values of a whitened weight, all float64, values falling."""

    left: Tensor
    values: Tensor
    right: Tensor

    def tail(self, rank: int) -> float:
        """The squared norm of what a rank leaves out."""
        return float(self.values[rank:].square().sum())


def factorise(matrix: Tensor) -> Factorisation:
    """The singular value decomposition of `matrix` by an eigendecomposition of its smaller Gram matrix, in float64.

    Sixteen times faster than `torch.linalg.svd` at 2048 x 2048; singular values below 1e-8 of the first are noise.
    """
    matrix = matrix.double()
    if matrix.shape[0] > matrix.shape[1]:
        flipped = factorise(matrix.T)
        return Factorisation(flipped.right.T, flipped.values, flipped.left.T)
    left = torch.linalg.eigh(matrix @ matrix.T).eigenvectors.flip(-1)
    projected = left.T @ matrix
    values = projected.norm(dim=1)  # more accurate than the square roots of the eigenvalues
    return Factorisation(left, values, projected / values[:, None].clamp_min(1e-300))


class LowRankForm:
    """Factors of a rank, in 16-bit floats or integers."""

    name = "lowrank"
    stores = "two thin factors, 16-bit floats or integers"
    wins = "where time counts, and on weights of low rank"

    def __init__(self, factor_bits: tuple[int | None, ...] = (None, 4)) -> None:
        self.factor_bits = factor_bits

    def settings(self, shape: Shape) -> Iterable[LowRankSetting]:
        """Ranks a factor of 1.5 apart, as long as the factors are smaller than the matrix in the same precision."""
        largest = int(0.9 * shape[0] * shape[1] / sum(shape))
        for bits in self.factor_bits:
            rank = 4.0 if max(shape) < 1000 else 8.0
            while rank <= (largest if bits is None else min(shape)):
                yield LowRankSetting(int(rank), bits)
                rank = max(rank + 1, rank * 1.5)

    def setting(self, values: Mapping[str, Any]) -> LowRankSetting:
        return LowRankSetting(**values)

    def probe(self, shape: Shape, curve: Sequence[Candidate]) -> LowRankSetting:
        return LowRankSetting(max(1, min(shape) // 4), 4)

    def empty(self, shape: Shape, setting: LowRankSetting) -> ProductOperator:
        left, right = (shape[0], setting.rank), (setting.rank, shape[1])
        if setting.bits is None:
            return ProductOperator(HalfOperator(left), HalfOperator(right), setting)
        of_left, of_right = setting.factors()
        return ProductOperator(IntOperator(left, of_left), IntOperator(right, of_right), setting)

    def curve(
        self, weight: Tensor, metric: Metric, settings: Iterable[LowRankSetting] | None = None
    ) -> list[Candidate]:
        shape: Shape = (weight.shape[0], weight.shape[1])
        found = factorise(metric.whiten(weight.detach()))
        sample = metric.sampled_rows()
        if sample is not None:  # the factors of all of a table, but only some rows of the left one
            weight, metric = weight[sample[0]], metric.of_rows(*sample)
            found = replace(found, left=found.left[sample[0]])
        candidates = []
        for setting in self.settings(shape) if settings is None else settings:
            operator = self.of_factorisation(weight, metric, setting, found)
            divergence = metric.distance(weight.float() - operator.dense())
            candidates.append(Candidate(self.name, setting, cost_of(self, shape, setting), divergence))
        return candidates

    def fit(self, weight: Tensor, metric: Metric, setting: LowRankSetting) -> Operator:
        return self.of_factorisation(weight, metric, setting, factorise(metric.whiten(weight.detach())))

    def of_factorisation(
        self, weight: Tensor, metric: Metric, setting: LowRankSetting, found: Factorisation
    ) -> ProductOperator:
        """The factors of a rank from the factorisation of the whitened weight."""
        rank = min(setting.rank, len(found.values))
        root = found.values[:rank].clamp_min(1e-30).sqrt()
        left = metric.rows.unwhiten(found.left[:, :rank] * root)
        right = metric.columns.unwhiten((root[:, None] * found.right[:rank]).T).T
        if rank < setting.rank:
            left = torch.nn.functional.pad(left, (0, setting.rank - rank))
            right = torch.nn.functional.pad(right, (0, 0, 0, setting.rank - rank))
        if setting.bits is None:
            balance = (right.abs().amax(1) / left.abs().amax(0).clamp_min(1e-30)).clamp(1e-12, 1e12).sqrt()
            return ProductOperator(
                HalfOperator.of((left * balance).float()), HalfOperator.of((right / balance[:, None]).float()), setting
            )
        of_left, of_right = setting.factors()
        integers = IntForm()
        # L^T R L is the diagonal of the singular values, for the left factor is whitened singular vectors.
        seen = Metric(
            "kronecker", Side(torch.nn.functional.pad(root.square(), (0, setting.rank - rank))), metric.columns
        )
        coded_right = integers.fit(right, seen, of_right)
        basis = coded_right.dense().double()
        gram = metric.columns.compress(basis.T).damped(1e-6)
        cross = metric.columns.apply(basis.T)  # (columns, rank)
        refitted = torch.linalg.solve(gram.moment, (weight.double() @ cross).T).T
        coded_left = integers.fit(refitted, Metric("kronecker", metric.rows, gram), of_left)
        return ProductOperator(coded_left, coded_right, setting)


def ranks_within(setting: LowRankSetting) -> list[int]:
    """The ranks, rising, to which a fit of a setting can be cut: those whose integers have the same groups."""

    def groups(rank: int) -> int | None:
        return None if setting.bits is None else replace(setting, rank=rank).factors()[0].group_size

    size = groups(setting.rank)
    ranks = range(1, setting.rank + 1)
    return [rank for rank in ranks if size is None or rank <= size or groups(rank) == size]


def low_rank_part(operator: Operator) -> ProductOperator | None:
    """What of a fit can be cut: itself, or the second term of a sum; None where that has no rank."""
    if isinstance(operator, SumOperator):
        return low_rank_part(operator.second)
    is_low_rank = isinstance(operator, ProductOperator) and isinstance(operator.setting, LowRankSetting)
    return operator if is_low_rank else None  # type: ignore[return-value]


def cut(operator: Operator, rank: int) -> None:
    """Keep the first `rank` components of the low-rank part of a fit, in place; one of `ranks_within`.

    With 16-bit factors this is what a fit of that rank is, to the bit; integers keep the steps they were rounded with.
    """
    operator._decoded = None
    if isinstance(operator, SumOperator):
        cut(operator.second, rank)
        operator.setting = replace(operator.setting, second=operator.second.setting)
        return
    assert isinstance(operator, ProductOperator)
    setting = replace(operator.setting, rank=rank)
    of_left, of_right = (None, None) if setting.bits is None else setting.factors()
    operator.left = _corner(operator.left, (operator.shape[0], rank), of_left)
    operator.right = _corner(operator.right, (rank, operator.shape[1]), of_right)
    operator.setting = setting


def _corner(factor: Operator, shape: Shape, setting: IntSetting | None) -> Operator:
    """The first rows and columns of a factor, `shape` of them; `setting` is that of integers."""
    rows, columns = shape
    if setting is None:
        assert isinstance(factor, HalfOperator)
        half = HalfOperator(shape)
        half.values = factor.values[:rows, :columns].contiguous()
        return half
    assert isinstance(factor, IntOperator)
    integers = IntOperator(shape, setting)
    codes = unpack(factor.codes[:rows], setting.bits, factor.shape[1])[:, :columns]
    integers.codes = pack(codes.contiguous(), setting.bits)
    integers.scale = factor.scale[:rows, : integers.scale.shape[1]].contiguous()
    integers.scale_range = factor.scale_range
    return integers


def tails(operator: ProductOperator, metric: Metric) -> Tensor:
    """What cutting a fit to each rank adds, (rank + 1,) from rank 0 to none cut, as a distance under the metric.

    With `l_i r_i` its components, `d(sum_{i >= k} l_i r_i)` sums the lower right corner of `(L^T R L) o (R C R^T)`.
    """
    judge = metric.judged_by or metric
    left, right = operator.left.dense().double(), operator.right.dense().double()
    gram = judge.rows.compress(left).moment * judge.columns.compress(right.T).moment
    corner = torch.nn.functional.pad(gram.flip(0, 1).cumsum(0).cumsum(1).diagonal(), (1, 0)).flip(0)
    return judge.scale * corner.clamp_min(0)
