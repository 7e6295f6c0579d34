"""The form `mixed`: blocks of a table's rows, sorted by how much they matter, each with as many dimensions as it needs.

Rows that are looked up often get many dimensions, rare ones few or none (mixed dimension embeddings; P099 OptEmbed
searches dimensions by training). The spectrum of every whitened block says what each of its dimensions is worth, so
the best dimensions within a size are the steepest steps of the blocks' lower hulls.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from tersor.errors import TersorError
from tersor.forms.base import Candidate, Operator, RowOperator, Shape, cost_of
from tersor.forms.lowrank import Factorisation, LowRankForm, LowRankSetting, factorise
from tersor.forms.packing import pack, packed_width, unpack
from tersor.forms.row_values import check_share_and_bits, empty_rows, stored_rows
from tersor.metrics import Metric, Side

GROWTH = 4  # a block has so many times the rows of the one before


@dataclass(frozen=True)
class MixedSetting:
    """The numbers stored for all blocks are at most `share` of the entries; `bits` None is 16-bit floats.

    `ranks` are the dimensions of the blocks, those that matter most first, filled in by the fit; a setting that has
    them keeps them. 0 is a block of zeros, and all of the columns a block stored as it is.
    """

    share: float
    bits: int | None = None
    blocks: int = 4
    ranks: tuple[int, ...] | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        check_share_and_bits("mixed", self.share, self.bits)
        if not isinstance(self.blocks, int) or not 2 <= self.blocks <= 16:
            raise TersorError(f"mixed: blocks is {self.blocks!r}, but must be from 2 to 16.")
        if self.ranks is not None and (len(self.ranks) != self.blocks or min(self.ranks) < 0):
            raise TersorError(f"mixed: ranks is {self.ranks!r}, but must be one number a block, of {self.blocks}.")

    @property
    def label(self) -> str:
        return f"mixed {self.share:.3g} b{self.blocks} {'f16' if self.bits is None else f'int{self.bits}'}"

    @property
    def id_bits(self) -> int:
        """Bits of the number of a block."""
        return (self.blocks - 1).bit_length()

    def sizes(self, rows: int) -> list[int]:
        """The rows of every block."""
        growing = [GROWTH**k for k in range(self.blocks)]
        ends = [0, *(round(rows * sum(growing[: k + 1]) / sum(growing)) for k in range(self.blocks))]
        return [stop - start for start, stop in pairwise(ends)]

    def of_block(self, shape: Shape, rank: int) -> Operator | None:
        """The operator of a block of a shape without data; None for zeros."""
        if rank == 0 or shape[0] == 0:
            return None
        if rank < shape[1]:
            return LowRankForm().empty(shape, LowRankSetting(rank, self.bits))
        return empty_rows(shape, self.bits)


class MixedOperator(RowOperator):
    """The number of every row's block, packed, and the blocks, in each the rows in their order."""

    setting: MixedSetting
    membership: Tensor

    def __init__(self, shape: Shape, setting: MixedSetting) -> None:
        super().__init__(shape, setting)
        self.register_buffer("membership", torch.zeros(packed_width(shape[0], setting.id_bits), dtype=torch.uint8))
        sizes, ranks = setting.sizes(shape[0]), setting.ranks or (0,) * setting.blocks
        of_blocks = {
            str(k): setting.of_block((size, shape[1]), rank)
            for k, (size, rank) in enumerate(zip(sizes, ranks, strict=True))
        }
        self.blocks = nn.ModuleDict({name: block for name, block in of_blocks.items() if block is not None})

    def decode_rows(self, index: Tensor | None) -> Tensor:
        ids = unpack(self.membership[None], self.setting.id_bits, self.shape[0])[0]
        asked = ids if index is None else ids[index]
        rows = torch.zeros(len(asked), self.shape[1], device=ids.device)
        for name, block in self.blocks.items():
            inside = asked == int(name)
            place = (ids == int(name)).cumsum(0) - 1
            rows[inside] = block.take((place if index is None else place[index])[inside])  # type: ignore[operator]
        return rows


@dataclass(frozen=True)
class Block:
    """Some rows (n,) of a weight, in their order, with their metric and the factorisation of their whitened values."""

    rows: Tensor
    weight: Tensor
    metric: Metric
    found: Factorisation

    @classmethod
    def of(cls, weight: Tensor, metric: Metric, rows: Tensor) -> Block:
        moment = metric.rows.moment[rows] if metric.rows.is_diagonal else metric.rows.moment[rows][:, rows]
        inner = Metric(metric.kind, Side(moment), metric.columns)
        return cls(rows, weight[rows], inner, factorise(inner.whiten(weight[rows])))

    def hull(self) -> list[tuple[int, int, float]]:
        """`(rank, entries, error)` of the ranks worth having, the more entries the less error for each."""
        n, columns = self.weight.shape
        points = [(rank, rank * (n + columns), self.found.tail(rank)) for rank in range(1 + len(self.found.values))]
        points = [point for point in points if point[1] < n * columns] + [(columns, n * columns, 0.0)]
        hull: list[tuple[int, int, float]] = []
        for point in points:
            while len(hull) > 1 and _slope(hull[-2], hull[-1]) <= _slope(hull[-1], point):
                hull.pop()
            hull.append(point)
        return hull

    def fitted(self, setting: MixedSetting, rank: int) -> Operator:
        """The block with a rank above zero."""
        if rank < self.weight.shape[1]:
            low = LowRankForm()
            return low.of_factorisation(self.weight, self.metric, LowRankSetting(rank, setting.bits), self.found)
        return stored_rows(self.weight, self.metric, setting.bits)


def _slope(before: tuple[int, int, float], after: tuple[int, int, float]) -> float:
    """Error saved an entry."""
    return (before[2] - after[2]) / (after[1] - before[1])


def ranks_within(blocks: Sequence[Block], entries: int) -> tuple[int, ...]:
    """The ranks of least error in so many entries: the steepest steps of all hulls, until one does not fit.

    Exact at the sizes where a step ends; a block whose next step does not fit is left there, and others go on.
    """
    hulls = [block.hull() if len(block.rows) else [(0, 0, 0.0)] for block in blocks]
    at, open_blocks = [0] * len(hulls), {k for k, hull in enumerate(hulls) if len(hull) > 1}
    while open_blocks:
        k = max(sorted(open_blocks), key=lambda k: _slope(*hulls[k][at[k] : at[k] + 2]))
        step = hulls[k][at[k] + 1][1] - hulls[k][at[k]][1]
        fits = step <= entries
        if fits:
            entries, at[k] = entries - step, at[k] + 1
        if not fits or at[k] + 1 == len(hulls[k]):
            open_blocks.discard(k)
    return tuple(hull[place][0] for hull, place in zip(hulls, at, strict=True))


class MixedForm:
    """Blocks of rows with dimensions of their own."""

    name = "mixed"
    stores = "each row's block, and thin factors of every block, 16-bit or integers"
    wins = "on tables whose frequent rows differ more than their rare ones"

    def settings(self, shape: Shape) -> Iterable[MixedSetting]:
        """Shares of the entries a factor of about 1.4 apart, in 16-bit floats and in 4 bits."""
        for bits, shares in ((None, (0.06, 0.09, 0.125, 0.18, 0.25, 0.35)), (4, (0.125, 0.18, 0.25, 0.35, 0.5, 0.7))):
            for share in shares:
                if share * shape[0] * shape[1] >= sum(shape):
                    yield MixedSetting(share, bits)

    def setting(self, values: Mapping[str, Any]) -> MixedSetting:
        ranks = values.get("ranks")
        return MixedSetting(**{**values, "ranks": None if ranks is None else tuple(ranks)})

    def probe(self, shape: Shape, curve: Sequence[Candidate]) -> MixedSetting:
        return MixedSetting(0.35, 4)

    def empty(self, shape: Shape, setting: MixedSetting) -> MixedOperator:
        return MixedOperator(shape, setting)

    def curve(self, weight: Tensor, metric: Metric, settings: Iterable[MixedSetting] | None = None) -> list[Candidate]:
        """One factorisation a block for all settings; a table is fitted whole."""
        shape: Shape = (weight.shape[0], weight.shape[1])
        cuts, candidates = Cuts(weight, metric), []
        for setting in self.settings(shape) if settings is None else settings:
            operator = cuts.fitted(setting)
            divergence = metric.distance(weight.float() - operator.dense())
            candidates.append(
                Candidate(self.name, operator.setting, cost_of(self, shape, operator.setting), divergence)
            )
        return candidates

    def fit(self, weight: Tensor, metric: Metric, setting: MixedSetting) -> MixedOperator:
        return Cuts(weight, metric).fitted(setting)


class Cuts:
    """A weight (rows, columns) under a metric, cut into blocks once for all settings of as many blocks."""

    def __init__(self, weight: Tensor, metric: Metric) -> None:
        self.weight, self.metric = weight.detach().float(), metric
        self._known: dict[tuple[int, bool], list[Block]] = {}

    def fitted(self, setting: MixedSetting) -> MixedOperator:
        """Under the metric, or in the same ranks as if it were the identity, whichever does less."""
        blocks = self._blocks(setting, blind=False)
        entries = round(setting.share * self.weight.numel())
        setting = replace(setting, ranks=setting.ranks or ranks_within(blocks, entries))
        fits = [self._operator(setting, part) for part in (blocks, self._blocks(setting, blind=True))]
        return min(fits, key=lambda fit: self.metric.distance(self.weight - fit.dense()))

    def _blocks(self, setting: MixedSetting, *, blind: bool) -> list[Block]:
        key = setting.blocks, blind
        if key not in self._known:
            metric = self.metric.coarsened("identity") if blind else self.metric
            order = metric.rows.diagonal.argsort(descending=True, stable=True)
            parts = order.split(setting.sizes(len(order)))
            self._known[key] = [Block.of(self.weight, metric, part.sort().values) for part in parts]
        return self._known[key]

    def _operator(self, setting: MixedSetting, blocks: Sequence[Block]) -> MixedOperator:
        operator = MixedOperator((self.weight.shape[0], self.weight.shape[1]), setting).to(self.weight.device)
        ids = torch.zeros(1, len(self.weight), dtype=torch.uint8, device=self.weight.device)
        for k, block in enumerate(blocks):
            ids[0, block.rows] = k
        operator.membership = pack(ids, setting.id_bits)[0]
        for name in operator.blocks:
            operator.blocks[name] = blocks[int(name)].fitted(setting, (setting.ranks or ())[int(name)])
        return operator
