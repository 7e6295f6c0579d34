"""The form `sparse`: some entries, chosen and fitted under the metric, and zeros elsewhere.

Under `d(E) = tr(R E C E^T)` removing one entry and refitting all others costs `w_ij^2 / ([R^-1]_ii [C^-1]_jj)`: optimal
brain surgery with both factors of the Hessian (one of them: SparseGPT, arXiv:2301.00774). Entries are free or `n` of
every `m` neighbours, values 16-bit floats or integers, and what says which are kept is counted (`supports.py`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from tersor.errors import TersorError
from tersor.forms.base import Candidate, Operator, Shape, bits_of, cost_of, from_bits
from tersor.forms.int_scales import search_grid
from tersor.forms.integers import IntSetting
from tersor.forms.packing import PLANES, pack, packed_width, unpack
from tersor.forms.recoding import recoded
from tersor.forms.rounding import Grid, round_with_feedback
from tersor.forms.supports import Groups, Support, smaller_support
from tersor.metrics import Metric, Side

SELECTS = ("second-order", "wanda", "sampled", "magnitude")
STEP = 0.7  # the share of the entries that a stage keeps
STAGE, FINAL = 4, 16  # steps of conjugate gradients after a stage, and at the end
BLOCK = 1 << 20  # entries that are refitted at a time where rows do not feel one another
ABSENT = 1e-6  # the share of a row's scale on which an absent entry is rounded, next to zero but not subnormal


@dataclass(frozen=True)
class SparseSetting:
    """`density` is the share that is kept, the same number a row on average, or a pattern such as "2:4".

    `bits` None keeps values in 16-bit floats, else they are integers with a scale a row. `seed` is that of `sampled`.
    """

    density: float | str = 0.5
    select: str = "second-order"
    refit: bool = True
    bits: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.density, str):
            found = re.fullmatch(r"(\d{1,2}):(\d{1,2})", self.density)
            good = found is not None and 1 <= int(found[1]) < int(found[2]) <= 16
        else:
            good = 0 < self.density <= 1
        if not good:
            raise TersorError(
                f"sparse: density is {self.density!r}, but must be above 0 and at most 1, "
                'or n:m such as "2:4" with n less than m and m at most 16.'
            )
        allowed = (None, *(b for b in PLANES if b > 1))
        if self.bits not in allowed:
            raise TersorError(f"sparse: bits is {self.bits!r}, but must be one of {allowed}.")
        if self.select not in SELECTS:
            raise TersorError(f"sparse: select is {self.select!r}, but must be one of {SELECTS}.")

    @property
    def label(self) -> str:
        density = self.density if isinstance(self.density, str) else f"{self.density:.3g}"
        marks = ("" if self.refit else " no refit") + (f" seed {self.seed}" if self.select == "sampled" else "")
        return f"sparse {density} {'f16' if self.bits is None else f'int{self.bits}'} {self.select}{marks}"

    @property
    def pattern(self) -> tuple[int, int] | None:
        """`n` and `m`, or None where entries are free."""
        if not isinstance(self.density, str):
            return None
        n, m = self.density.split(":")
        return int(n), int(m)

    def support(self, shape: Shape) -> Support:
        """How the kept entries of a matrix are written: the smaller code, where there are two."""
        if self.pattern is not None:
            return Groups(shape, *self.pattern)
        return smaller_support(shape, shape[0] * max(1, round(float(self.density) * shape[1])))

    @property
    def codes(self) -> IntSetting:
        """Integers around zero that need no code for zero itself."""
        assert self.bits is not None
        return IntSetting(self.bits, None, symmetric=True, scale_bits=16)


class SparseOperator(Operator):
    """The support in bytes; the values of the kept entries, row after row; with integers, a 16-bit scale a row."""

    setting: SparseSetting
    support: Tensor
    values: Tensor
    scale: Tensor

    def __init__(self, shape: Shape, setting: SparseSetting) -> None:
        super().__init__(shape, setting)
        code = setting.support(shape)
        self.register_buffer("support", torch.zeros(code.nbytes, dtype=torch.uint8))
        if setting.bits is None:
            self.register_buffer("values", torch.zeros(code.kept, dtype=torch.int16))
        else:
            self.register_buffer("values", torch.zeros(packed_width(code.kept, setting.bits), dtype=torch.uint8))
            self.register_buffer("scale", torch.zeros(shape[0], dtype=torch.int16))

    def store(self, matrix: Tensor, mask: Tensor, scale: Tensor | None) -> None:
        """Store the entries of `matrix` on `mask`, both in whole groups; with a scale (rows,) their nearest codes."""
        setting = self.setting
        self.support = setting.support(self.shape).encode(mask)
        if setting.bits is None or scale is None:
            self.values = bits_of(matrix[mask])
            return
        self.scale = bits_of(scale)
        codes = (matrix / from_bits(self.scale)[:, None] + setting.codes.half)[mask].round()
        self.values = pack(codes.clamp(0, 2**setting.bits - 1)[None], setting.bits)[0]

    def decode(self) -> Tensor:
        setting, code = self.setting, self.setting.support(self.shape)
        mask = code.decode(self.support)
        if setting.bits is None:
            values = from_bits(self.values)
        else:
            values = unpack(self.values[None], setting.bits, code.kept)[0].float() - setting.codes.half
        matrix = values.new_zeros(code.shape).masked_scatter_(mask, values)
        if setting.bits is not None:
            matrix *= from_bits(self.scale)[:, None]
        return matrix[:, : self.shape[1]]


class SparseForm:
    """Kept entries of a density or pattern."""

    name = "sparse"
    stores = "which entries are kept, and these in 16 bits or integers"
    wins = "where a device wants the pattern; beside integers, nowhere"

    def settings(self, shape: Shape) -> Iterable[SparseSetting]:
        """The densest first, so that a curve prunes on from one to the next."""
        densities: tuple[float | str, ...] = 0.5, 0.35, 0.25, 0.125, "2:4"
        for density in densities:
            for bits in (None, 4, 3) if density in (0.5, "2:4") else (4, 3):
                yield SparseSetting(density, bits=bits)

    def setting(self, values: Mapping[str, Any]) -> SparseSetting:
        return SparseSetting(**values)

    def probe(self, shape: Shape, curve: Sequence[Candidate]) -> SparseSetting:
        return SparseSetting(0.35, bits=4)

    def empty(self, shape: Shape, setting: SparseSetting) -> SparseOperator:
        return SparseOperator(shape, setting)

    def curve(self, weight: Tensor, metric: Metric, settings: Iterable[SparseSetting] | None = None) -> list[Candidate]:
        """One course of pruning for all settings; of a table, that of some of its rows."""
        shape: Shape = (weight.shape[0], weight.shape[1])
        ladder = list(self.settings(shape) if settings is None else settings)
        rows = metric.sampled_rows(evenly=True)  # what is kept in a row depends on all others
        if rows is not None:
            weight, metric = weight[rows[0]], metric.of_rows(*rows)
        pruning = Pruning(weight, metric)
        candidates = []
        for setting in ladder:
            error = weight.float() - pruning.operator(setting).dense()
            candidates.append(Candidate(self.name, setting, cost_of(self, shape, setting), metric.distance(error)))
        return candidates

    def fit(self, weight: Tensor, metric: Metric, setting: SparseSetting) -> SparseOperator:
        return Pruning(weight, metric).operator(setting)


class Pruning:
    """The pruning of one weight (rows, columns) under one metric: what the settings of a curve share."""

    def __init__(self, weight: Tensor, metric: Metric) -> None:
        self.weight, self.metric = weight.detach().float(), metric
        self.shape: Shape = (weight.shape[0], weight.shape[1])
        self.felt = Metric(metric.kind, _unit(metric.rows), _unit(metric.columns))
        self._stage: dict[int | None, tuple[int, Tensor]] = {}  # by the size of groups: how many are kept, and values
        self._latest: tuple[SparseSetting, tuple[Tensor, Tensor]] | None = None

    @cached_property
    def null(self) -> Pruning:
        """The pruning that knows nothing but the weight."""
        return Pruning(self.weight, self.metric.coarsened("identity"))

    def operator(self, setting: SparseSetting) -> SparseOperator:
        """The better of the fit under the metric and the one as if it were the identity, which has nothing to refit."""
        select = "magnitude" if setting.select == "second-order" else setting.select
        plain = self.null.fitted(replace(setting, select=select, refit=False))
        fits = [self.fitted(setting), plain]
        best = min(fits, key=lambda fit: self._distance(fit.dense()))
        best.setting = setting
        return best

    def fitted(self, setting: SparseSetting) -> SparseOperator:
        """The fit under the metric."""
        values, mask = self._supported(setting)
        kept, scale = mask[:, : self.shape[1]], None
        if setting.bits is not None:
            values, scale = self._rounded(values, kept, setting)
        operator = SparseOperator(self.shape, setting).to(values.device)
        operator.store(_filled(values, mask.shape[1], 0.0), mask, scale)
        return operator

    def _supported(self, setting: SparseSetting) -> tuple[Tensor, Tensor]:
        """The values (rows, columns), zero where nothing is kept, and the mask in whole groups.

        Second-order tries what `wanda` would keep beside what it keeps itself, and goes on with the better.
        """
        unrounded = replace(setting, bits=None)
        if self._latest is None or self._latest[0] != unrounded:
            values, mask = self._selected(setting)
            if setting.select == "second-order":
                start, other = self._selected(replace(setting, select="wanda"))
                tried = [(self._refitted(v, m, STAGE), m) for v, m in ((values, mask), (start, other))]
                values, mask = min(tried, key=lambda made: self._distance(made[0]))
            plain = self.weight * mask[:, : self.shape[1]]
            if setting.refit:
                # The metric is damped for the refit, not for the judgement.
                values = min((self._refitted(values, mask, FINAL), plain), key=self._distance)
            self._latest = unrounded, (values if setting.refit else plain, mask)
        return self._latest[1]

    def _distance(self, values: Tensor) -> float:
        return self.metric.distance(self.weight - values)

    def _selected(self, setting: SparseSetting) -> tuple[Tensor, Tensor]:
        """Values to start a refit from, and the mask in whole groups."""
        if setting.select == "second-order":
            return self._removed_in_stages(setting)
        scores = self.weight.abs()
        if setting.select != "magnitude":
            scores = scores * self.felt.columns.diagonal.sqrt()
        if setting.select == "sampled":
            scores = scores.log() + _gumbel(self.shape, setting.seed).to(scores)
        return self.weight, _strongest(scores, setting, None, within_rows=setting.select != "magnitude")

    def _removed_in_stages(self, setting: SparseSetting) -> tuple[Tensor, Tensor]:
        """Remove the entries that are missed least, a share of them at a time, and refit the others between."""
        size = None if setting.pattern is None else setting.pattern[1]
        target = setting.support(self.shape).kept if setting.pattern is None else setting.pattern[0]
        count, values = self._stage.get(size, (0, self.weight))
        whole = size or self.weight.numel()
        if count <= target:
            count, values = whole, self.weight
        share = 1.0
        while (share := share * STEP) * whole > target:
            if (stage := -int(-share * whole // 1)) < count:
                mask = _strongest(values.abs() * self._missed, setting, stage)
                count, values = stage, self._refitted(values, mask, STAGE)
                self._stage[size] = count, values
        return values, _strongest(values.abs() * self._missed, setting, None)

    @cached_property
    def _missed(self) -> Tensor:
        """The square root of `1 / ([R^-1]_ii [C^-1]_jj)` (rows, columns): what removing a unit entry costs."""
        return torch.outer(_given_others(self.felt.rows), _given_others(self.felt.columns)).sqrt().float()

    def _refitted(self, values: Tensor, mask: Tensor, steps: int) -> Tensor:
        return refit(self.weight, values, mask[:, : self.shape[1]], self.felt, steps)

    def _rounded(self, values: Tensor, kept: Tensor, setting: SparseSetting) -> tuple[Tensor, Tensor]:
        """Values rounded with feedback among the kept entries or to the nearest, and the scales (rows,): the better.

        What the refitted values miss is orthogonal to all changes on the support, so that these are all that matters.
        With a refit, codes and scales are improved in turn after that (`recoding.py`), and the better is kept.
        """
        (lower_rows, pivot_rows), (lower_columns, pivot_columns) = (
            side.unit_lower for side in (self.felt.rows, self.felt.columns)
        )
        importance = torch.outer(pivot_rows.float(), pivot_columns.float()) * kept
        scale = search_grid(values, importance, setting.codes)[0].clamp_min(6e-8)
        scale = from_bits(bits_of(scale))
        steps = torch.where(kept, scale, ABSENT * scale)
        grid = Grid(steps, torch.full_like(steps, setting.codes.half), 2.0**setting.codes.bits - 1)
        near = grid.nearest(values) * kept
        if lower_rows is None and lower_columns is None:
            return near, scale[:, 0]
        settled = round_with_feedback(values, grid, lower_rows, lower_columns).to(near.device) * kept
        best = min((settled, near), key=self._distance)
        if not setting.refit:
            return best, scale[:, 0]
        half = setting.codes.half
        codes = ((best / scale + half).round() - half) * kept
        codes, steps = recoded(self.weight, codes, kept, scale[:, 0], self.felt)
        made = codes.to(best.device) * steps.to(best.device)[:, None]
        return min(((best, scale[:, 0]), (made, steps)), key=lambda fit: self._distance(fit[0]))


def refit(weight: Tensor, values: Tensor, support: Tensor, metric: Metric, steps: int) -> Tensor:
    """Bring the `values` on `support` nearer to the weight, all (rows, columns), by conjugate gradients.

    Minimises `tr(R (W - V) C (W - V)^T)` over `V` on the support: `P(R V C) = P(R W C)`, with `P` the projection on it,
    preconditioned by the diagonals. Where rows do not feel one another, each has its own steps.
    """
    if metric.columns.is_diagonal and not metric.rows.is_diagonal:
        turned = Metric(metric.kind, metric.columns, metric.rows)
        return refit(weight.T, values.T, support.T, turned, steps).T.contiguous()
    if not metric.rows.is_diagonal:
        return _conjugate_gradients(weight, values, support, metric, steps)
    count = max(1, BLOCK // weight.shape[1])
    parts = zip(weight.split(count), values.split(count), support.split(count), strict=True)
    return torch.cat([_conjugate_gradients(*part, metric, steps) for part in parts])


def _conjugate_gradients(weight: Tensor, values: Tensor, support: Tensor, metric: Metric, steps: int) -> Tensor:
    alone = metric.rows.is_diagonal  # then its entries have no part in the solution
    curvature = metric.columns.diagonal.to(weight).clamp_min(1e-20)
    if not alone:
        curvature = torch.outer(metric.rows.diagonal.to(weight).clamp_min(1e-20), curvature)

    def pulled(error: Tensor) -> Tensor:
        felt = metric.columns.felt(error)
        return (felt if alone else metric.rows.apply(felt)) * support

    def dot(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum(1, keepdim=True) if alone else (a * b).sum()

    values = values * support
    residual = pulled(weight - values)
    direction = scaled = residual / curvature
    length = dot(residual, scaled)
    for _ in range(steps):
        if not length.any():
            break
        image = pulled(direction)
        step = length / dot(direction, image).clamp_min(1e-30)
        values = values + step * direction
        residual = residual - step * image
        scaled = residual / curvature
        length, before = dot(residual, scaled), length
        direction = scaled + length / before.clamp_min(1e-30) * direction
    return values


def _strongest(scores: Tensor, setting: SparseSetting, count: int | None, within_rows: bool = False) -> Tensor:
    """The mask, in whole groups, of the `count` highest scores (rows, columns) of a group, by default the setting's.

    A group is that of a pattern, else the whole matrix, or a row.
    """
    if setting.pattern is not None:
        n, m = setting.pattern
        scores = _filled(scores, -(-scores.shape[1] // m) * m, -torch.inf)
        groups, count = scores.reshape(-1, m), count or n
    else:
        groups, count = scores.reshape(1, -1), count or setting.support((scores.shape[0], scores.shape[1])).kept
        if within_rows:
            groups, count = scores, count // len(scores)
    mask = torch.zeros_like(groups, dtype=torch.bool)
    return mask.scatter_(1, groups.topk(count, sorted=False).indices, True).reshape(scores.shape)


def _filled(matrix: Tensor, columns: int, value: float) -> Tensor:
    return torch.nn.functional.pad(matrix, (0, columns - matrix.shape[1]), value=value)


def _gumbel(shape: Shape, seed: int) -> Tensor:
    """Gumbel noise: the k largest of `log p` and it are a sample of k without replacement, by `p`."""
    uniform = torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return -(-uniform.clamp_min(1e-300).log()).log()


def _unit(side: Side) -> Side:
    """The side in float32 with a mean diagonal of one, so that nothing over- or underflows."""
    return Side((side.moment / side.diagonal.mean().clamp_min(1e-300)).float())


def _given_others(side: Side) -> Tensor:
    """The variance that each index has given all others, `1 / [M^-1]_ii` (n,), in float64."""
    if side.is_diagonal:
        return side.moment.double()
    return 1 / torch.cholesky_inverse(side.cholesky).diagonal()
