"""The form `hashed`: every row of a table the signed sum of one or two rows of a smaller table, chosen by a hash.

One table then serves the values of many features (P021 Unified Embedding, compositional embeddings). Nothing says which
rows: a hash does. Fitted after training: `tr(R (W - H T) C (W - H T)^T)` is least where `H^T R H T = H^T R W`, whatever
the moment `C` of the columns, so the rows are weighted means for one hash and a sparse linear system for two.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tersor.errors import TersorError
from tersor.forms.base import Candidate, Operator, RowOperator, Shape, fitted_candidate
from tersor.forms.conjugate import conjugate_gradients
from tersor.forms.row_values import check_share_and_bits, empty_rows, stored_rows
from tersor.forms.shared import SharedSetting, places
from tersor.metrics import Metric, Side

STEPS = 200  # of conjugate gradients, at most


@dataclass(frozen=True)
class HashedSetting:
    """`share`: rows of the smaller table over rows; `hashes`: how many of them a row is the sum of, 1 or 2.

    `bits` None keeps the smaller table in 16-bit floats, else as integers with a scale a row. `seed` is of the hash.
    """

    share: float
    hashes: int = 1
    bits: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_share_and_bits("hashed", self.share, self.bits)
        if self.hashes not in (1, 2):
            raise TersorError(f"hashed: hashes is {self.hashes!r}, but must be 1 or 2.")

    @property
    def label(self) -> str:
        return f"hashed rows {self.share:.3g} x{self.hashes} {'f16' if self.bits is None else f'int{self.bits}'}"

    def size(self, shape: Shape) -> int:
        """Rows of the smaller table."""
        return max(1, math.ceil(self.share * shape[0]))


@dataclass(frozen=True)
class Hash:
    """The matrix `H` (n, size) of a hash: in row `i` the signs (n, hashes) at the places (n, hashes)."""

    place: Tensor
    sign: Tensor
    size: int

    @classmethod
    def of(cls, shape: Shape, setting: HashedSetting, rows: Tensor) -> Hash:
        """That of `rows` (n,). Hash `h` is that of `places` for a column of entries, with the seed `2 seed + h`.

        Any `size` rows from a multiple of `size` on go to places of their own; a second place that is the first again
        becomes the next one.
        """
        size = setting.size(shape)
        found = [
            places((shape[0], 1), SharedSetting(setting.share, seed=2 * setting.seed + h), rows)
            for h in range(setting.hashes)
        ]
        place = torch.cat([place for place, _ in found], 1)
        sign = torch.cat([sign for _, sign in found if sign is not None], 1)
        if setting.hashes == 2 and size > 1:
            place[:, 1] = torch.where(place[:, 0] == place[:, 1], (place[:, 0] + 1) % size, place[:, 1])
        return cls(place, sign, size)

    def spread(self, table: Tensor) -> Tensor:
        """`H T` for `T` (size, columns)."""
        return (self.sign[:, :, None] * table[self.place]).sum(1)

    def gathered(self, rows: Tensor) -> Tensor:
        """`H^T X` for `X` (n, columns)."""
        total = rows.new_zeros(self.size, rows.shape[1])
        for place, sign in zip(self.place.T, self.sign.T, strict=True):
            total.index_add_(0, place, sign[:, None] * rows)
        return total

    def weights(self, importance: Tensor) -> Tensor:
        """The diagonal of `H^T diag(importance) H` (size,), but for places that are a row's twice."""
        return importance.new_zeros(self.size).index_add_(
            0, self.place.flatten(), importance[:, None].expand_as(self.place).flatten()
        )


def least_squares(weight: Tensor, rows: Side, hashed: Hash) -> Tensor:
    """The smaller table (size, columns), float64, of the least `tr(R (W - H T) C (W - H T)^T)`, for all `C`.

    Conjugate gradients, every column with steps of its own, preconditioned by the diagonal; with one hash and rows
    that do not feel one another the first step ends there.
    """
    weight, rows = weight.double(), Side(rows.moment.double() / rows.diagonal.double().mean())
    weights = hashed.weights(rows.diagonal).clamp_min(1e-12)[:, None]
    residual = hashed.gathered(rows.apply(weight))

    def felt(table: Tensor) -> Tensor:
        return hashed.gathered(rows.apply(hashed.spread(table)))

    return conjugate_gradients(torch.zeros_like(residual), residual, felt, STEPS, weights, alone=1)


class HashedOperator(RowOperator):
    """The smaller table alone."""

    setting: HashedSetting
    table: Operator

    def __init__(self, shape: Shape, setting: HashedSetting) -> None:
        super().__init__(shape, setting)
        size = setting.size(shape), shape[1]
        self.table = empty_rows(size, setting.bits)

    def decode_rows(self, index: Tensor | None) -> Tensor:
        rows = torch.arange(self.shape[0], device=next(self.table.buffers()).device) if index is None else index
        hashed = Hash.of(self.shape, self.setting, rows)
        if index is None:
            return hashed.spread(self.table.dense())
        return (hashed.sign[:, :, None] * self.table.take(hashed.place)).sum(1)


class HashedForm:
    """Rows that are sums of the rows of a smaller table."""

    name = "hashed"
    stores = "a smaller table whose rows all rows hash to, 16-bit or integers"
    wins = "where a table was trained so, or is far too large for anything else"

    def settings(self, shape: Shape) -> Iterable[HashedSetting]:
        """From half of the rows to a thirty-second, one hash and two, in 4 bits, which lose little beside hashing."""
        for times in (2, 4, 8, 16, 32):
            for hashes in (1, 2):
                if shape[0] >= 2 * times:
                    yield HashedSetting(1 / times, hashes, 4)

    def setting(self, values: Mapping[str, Any]) -> HashedSetting:
        return HashedSetting(**values)

    def probe(self, shape: Shape, curve: Sequence[Candidate]) -> HashedSetting:
        return HashedSetting(0.5, 1, 4)

    def empty(self, shape: Shape, setting: HashedSetting) -> HashedOperator:
        return HashedOperator(shape, setting)

    def curve(self, weight: Tensor, metric: Metric, settings: Iterable[HashedSetting] | None = None) -> list[Candidate]:
        """All rows share the smaller table, so a table is fitted whole."""
        shape: Shape = (weight.shape[0], weight.shape[1])
        ladder = self.settings(shape) if settings is None else settings
        return [fitted_candidate(self, weight, metric, setting)[1] for setting in ladder]

    def fit(self, weight: Tensor, metric: Metric, setting: HashedSetting) -> HashedOperator:
        """The better of the fit under the metric and the plain one, which the judge of a damped metric may prefer."""
        weight = weight.detach().float()
        shape: Shape = (weight.shape[0], weight.shape[1])
        hashed = Hash.of(shape, setting, torch.arange(shape[0], device=weight.device))
        fits = []
        for steer in (metric, metric.coarsened("identity")):
            table = least_squares(weight, steer.rows, hashed).float()
            operator = HashedOperator(shape, setting)
            seen = Metric("kronecker", Side(hashed.weights(steer.rows.diagonal.float())), steer.columns)
            operator.table = stored_rows(table, seen.damped(1e-6, 0.0), setting.bits)
            fits.append(operator.to(weight.device))
        return min(fits, key=lambda fit: metric.distance(weight - fit.dense()))
