"""The form `rows`: the rows of a table that matter stored as they are, all others one shared default row.

Which rows are kept, and what the others become, is a least-squares problem under the metric (P099 OptEmbed prunes by
thresholds learned in training): of a given default row the rows to keep are those that would lose most, and of given
rows the best default is their weighted mean. Kept rows are 16-bit floats or integers; the mask of the kept is counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from tersor.forms.base import Candidate, Operator, RowOperator, Shape, bits_of, cost_of, from_bits
from tersor.forms.row_values import check_share_and_bits, empty_rows, stored_rows
from tersor.forms.supports import Support, smaller_support
from tersor.metrics import Metric, Side

ROUNDS = 50  # of choosing rows and default in turn; nearly always they settle in fewer than ten


@dataclass(frozen=True)
class RowsSetting:
    """`share` of the rows are kept. `bits` None keeps them in 16-bit floats, else as integers with a scale a row."""

    share: float
    bits: int | None = None

    def __post_init__(self) -> None:
        check_share_and_bits("rows", self.share, self.bits)

    @property
    def label(self) -> str:
        return f"rows {self.share:.3g} {'f16' if self.bits is None else f'int{self.bits}'}"

    def kept(self, shape: Shape) -> int:
        """How many rows are kept, at least one."""
        return max(1, round(self.share * shape[0]))

    def support(self, shape: Shape) -> Support:
        """How the mask (1, rows) is written."""
        return smaller_support((1, shape[0]), self.kept(shape))


class RowsOperator(RowOperator):
    """The mask of the kept rows in bytes, these rows in their order, and the default row in 16-bit floats."""

    setting: RowsSetting
    support: Tensor
    default: Tensor
    kept: Operator

    def __init__(self, shape: Shape, setting: RowsSetting) -> None:
        super().__init__(shape, setting)
        size = setting.kept(shape), shape[1]
        self.kept = empty_rows(size, setting.bits)
        self.register_buffer("support", torch.zeros(setting.support(shape).nbytes, dtype=torch.uint8))
        self.register_buffer("default", torch.zeros(shape[1], dtype=torch.int16))

    def decode_rows(self, index: Tensor | None) -> Tensor:
        mask = self.setting.support(self.shape).decode(self.support)[0]
        place = mask.cumsum(0) - 1
        if index is not None:
            mask, place = mask[index], place[index]
        rows = from_bits(self.default).repeat(len(mask), 1)
        rows[mask] = self.kept.take(place[mask])
        return rows


class Pruning:
    """The choice of rows of one weight (rows, columns) under one metric: what the settings of a curve share.

    Given a default row `t`, row `i` loses `R_ii (w_i - t)^T C (w_i - t)`, from products made once.
    """

    def __init__(self, weight: Tensor, metric: Metric) -> None:
        self.weight, self.metric = weight.double(), metric
        self.importance = metric.rows.diagonal.to(self.weight) + 1e-12 * metric.rows.diagonal.double().mean()
        self.felt = metric.columns.felt(self.weight)
        self.energy = (self.felt * self.weight).sum(1)
        self._known: dict[int, tuple[Tensor, Tensor]] = {}  # by the number of rows

    def chosen(self, kept: int) -> tuple[Tensor, Tensor]:
        """The mask (rows,) of `kept` rows and the default row (columns,): the best of what three starts settle at.

        They are the mean of all rows, that of those that matter least, and the median, which stays where most rows
        are equal. The problem is not convex: one start alone can end at twice the loss of the best choice.
        """
        if kept not in self._known:
            mean = self._default(torch.zeros_like(self.importance, dtype=torch.bool))
            starts = mean, self._default(self._largest(self.importance, kept)), self.median
            mask, default, _ = min((self._settled(start, kept) for start in starts), key=lambda found: found[2])
            self._known[kept] = mask, default
        return self._known[kept]

    @cached_property
    def median(self) -> Tensor:
        return self.weight.median(0).values

    def _settled(self, default: Tensor, kept: int) -> tuple[Tensor, Tensor, float]:
        """Mask, default and loss where choosing the one and the other in turn ends.

        Where rows do not feel one another neither step can do harm; else it ends with the first that does.
        """
        best: tuple[Tensor, Tensor, float] | None = None
        losses = self._losses(default)
        for _ in range(ROUNDS):
            mask = self._largest(losses, kept)
            default = self._default(mask)
            losses = self._losses(default)
            loss = float(losses[~mask].sum())
            if best is not None and loss >= best[2]:
                break
            best = mask, default, loss
        assert best is not None
        return best

    def _losses(self, default: Tensor) -> Tensor:
        """What every row loses as the default row (rows,)."""
        own = self.metric.columns.felt(default[None])[0] @ default
        return self.importance * (self.energy - 2 * self.felt @ default + own).clamp_min(0)

    def _default(self, mask: Tensor) -> Tensor:
        """The best row (columns,) for all that are not kept: `1^T R W / 1^T R 1` over these."""
        pruned = ~mask
        if not pruned.any():
            return self.weight.new_zeros(self.weight.shape[1])
        side = self.metric.rows
        shares = self.importance[pruned] if side.is_diagonal else side.moment[pruned][:, pruned].double().sum(0)
        return shares @ self.weight[pruned] / shares.sum()

    def _largest(self, values: Tensor, kept: int) -> Tensor:
        mask = torch.zeros(len(values), dtype=torch.bool, device=values.device)
        mask[values.argsort(descending=True, stable=True)[:kept]] = True
        return mask


class RowsForm:
    """Kept rows and a default row."""

    name = "rows"
    stores = "the rows that matter, 16-bit or integers, their mask, one default row"
    wins = "on tables most of whose rows are hardly ever looked up"

    def settings(self, shape: Shape) -> Iterable[RowsSetting]:
        """Shares a factor of about 1.4 apart in integers, of 2 apart in 16-bit floats."""
        for share in (0.5, 0.25, 0.125):
            yield RowsSetting(share)
        for bits in (8, 4, 3):
            for share in (0.7, 0.5, 0.35, 0.25, 0.18, 0.125, 0.09, 0.06):
                yield RowsSetting(share, bits)

    def setting(self, values: Mapping[str, Any]) -> RowsSetting:
        return RowsSetting(**values)

    def probe(self, shape: Shape, curve: Sequence[Candidate]) -> RowsSetting:
        """Pruning with little rounding: rows that come up together, as positions do, all miss the default's way."""
        return RowsSetting(0.125, 8)

    def empty(self, shape: Shape, setting: RowsSetting) -> RowsOperator:
        return RowsOperator(shape, setting)

    def curve(self, weight: Tensor, metric: Metric, settings: Iterable[RowsSetting] | None = None) -> list[Candidate]:
        """Which rows are kept depends on all of them, so a table is fitted whole.

        Of the ladder, rows that do not feel one another are rounded once for all shares: the range of their scales is
        then that of all rows.
        """
        shape: Shape = (weight.shape[0], weight.shape[1])
        prunings, candidates = _prunings(weight, metric), []
        roundings: dict[int | None, Tensor] = {}
        for setting in self.settings(shape) if settings is None else settings:
            if settings is None and metric.rows.is_diagonal:
                if setting.bits not in roundings:
                    roundings[setting.bits] = stored_rows(weight.float(), metric, setting.bits).dense()
                distance = _distance(prunings, metric, setting, roundings[setting.bits])
            else:
                distance = metric.distance(weight.float() - _best(prunings, metric, setting).dense())
            candidates.append(Candidate(self.name, setting, cost_of(self, shape, setting), distance))
        return candidates

    def fit(self, weight: Tensor, metric: Metric, setting: RowsSetting) -> RowsOperator:
        return _best(_prunings(weight, metric), metric, setting)


def _prunings(weight: Tensor, metric: Metric) -> list[Pruning]:
    """Under the metric, and as if it were the identity: better where rows feel one another in ways a choice misses."""
    weight = weight.detach().float()
    return [Pruning(weight, steer) for steer in (metric, metric.coarsened("identity"))]


def _best(prunings: list[Pruning], metric: Metric, setting: RowsSetting) -> RowsOperator:
    fits = [pruned(pruning.weight.float(), pruning.metric, setting, *_chosen(pruning, setting)) for pruning in prunings]
    return min(fits, key=lambda fit: metric.distance(prunings[0].weight.float() - fit.dense()))


def _distance(prunings: list[Pruning], metric: Metric, setting: RowsSetting, rounded: Tensor) -> float:
    """The distance of the better choice of rows, which are kept as they stand in `rounded`."""
    weight = prunings[0].weight.float()
    choices = [_chosen(pruning, setting) for pruning in prunings]
    stored = ((mask, from_bits(bits_of(default))) for mask, default in choices)
    return min(metric.distance(weight - torch.where(mask[:, None], rounded, default)) for mask, default in stored)


def _chosen(pruning: Pruning, setting: RowsSetting) -> tuple[Tensor, Tensor]:
    return pruning.chosen(setting.kept((pruning.weight.shape[0], pruning.weight.shape[1])))


def pruned(weight: Tensor, metric: Metric, setting: RowsSetting, mask: Tensor, default: Tensor) -> RowsOperator:
    """The operator that keeps the rows of a mask (rows,) and has a default row (columns,) for the others."""
    shape: Shape = (weight.shape[0], weight.shape[1])
    operator = RowsOperator(shape, setting).to(weight.device)
    operator.support = setting.support(shape).encode(mask[None])
    operator.default = bits_of(default)
    moment = metric.rows.moment[mask] if metric.rows.is_diagonal else metric.rows.moment[mask][:, mask]
    operator.kept = stored_rows(weight[mask], Metric(metric.kind, Side(moment), metric.columns), setting.bits)
    return operator
