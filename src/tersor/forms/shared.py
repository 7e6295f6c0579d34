"""The form `shared`: entries of a weight tied to one another, each tie one stored value, and nothing else stored.

Either all entries are hashed with signs into one array (P051 STABLE-RPS), or every square block is cyclic, so that its
product is a convolution. The best values for a trained weight are a least-squares fit: weighted means of the tied
entries under diagonal moments, conjugate gradients under whole ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tersor.errors import TersorError
from tersor.forms.base import Candidate, Operator, Shape, fitted_candidate
from tersor.forms.conjugate import conjugate_gradients
from tersor.forms.integers import IntForm, IntOperator, IntSetting
from tersor.forms.products import HalfOperator
from tersor.metrics import Metric, Side

WORD = 0xFFFFFFFF
STEPS = 12  # of conjugate gradients


@dataclass(frozen=True)
class SharedSetting:
    """One of two: `share`, the size of the array over the number of entries, or `block`, the size of cyclic blocks.

    `value_bits` 16 are floats; 4 and 8 are integers with a scale for 64 of them. `seed` is that of the hash.
    """

    share: float | None = None
    block: int | None = None
    value_bits: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.share is None) == (self.block is None):
            raise TersorError("shared: a setting needs one of share, for hashing, and block, for cyclic blocks.")
        if self.share is not None and not 0 < self.share <= 1:
            raise TersorError(f"shared: share is {self.share}, but must be above 0 and at most 1.")
        if self.block is not None and self.block < 1:
            raise TersorError(f"shared: block is {self.block}, but must be at least 1.")
        if self.value_bits not in (4, 8, 16):
            raise TersorError(f"shared: value_bits is {self.value_bits}, but must be one of (4, 8, 16).")

    @property
    def label(self) -> str:
        tie = f"hashed {self.share:g}" if self.block is None else f"cyclic b{self.block}"
        return f"{tie} {'f16' if self.value_bits == 16 else f'int{self.value_bits}'}"

    def size(self, shape: Shape) -> int:
        """How many values are stored."""
        if self.block is None:
            assert self.share is not None
            return max(1, math.ceil(self.share * shape[0] * shape[1]))
        return -(-shape[0] // self.block) * -(-shape[1] // self.block) * self.block

    def integers(self) -> IntSetting:
        return IntSetting(self.value_bits, 64, symmetric=True, rounding="nearest")


def mixed(x: Tensor) -> Tensor:
    """A bijection of 32-bit words, held in int64: `x ^= x >> 16, x *= 0x85ebca6b, x ^= x >> 13, x *= 0xc2b2ae35,
    x ^= x >> 16`, products modulo 2^32. Integers alone, so the same on every machine."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = ((x ^ (x >> shift)) * factor) & WORD
    return x ^ (x >> 16)


def places(shape: Shape, setting: SharedSetting, rows: Tensor) -> tuple[Tensor, Tensor | None]:
    """Where in the array the entries of `rows` (n,) lie, and with what sign, both (n, columns); None where all are +.

    Cyclic: block `(I, J)` holds values `b (I ceil(columns / b) + J) + k`, and its entry `(i, j)` is the value of
    `k = (i - j) mod b`. Hashed: entry `p = columns i + j` is the `q`-th of the `t`-th partition, `p = n t + q` for an
    array of `n`, and lies at `(a_t q + c_t) mod n`, a permutation, so that an array as large as the weight loses
    nothing. With `h(x) = mixed(x xor mixed(seed))`: `c_t = h(2t + 1) mod n`, `a_t` is the first number from
    `h(2t) mod n` on that has no factor with `n`; the sign is minus where the lowest bit of `mixed(h(p) xor 0x9e3779b9)`
    is set.
    """
    columns = torch.arange(shape[1], device=rows.device)
    if setting.block is not None:
        b = setting.block
        block = (rows // b)[:, None] * -(-shape[1] // b) + columns // b
        return block * b + (rows[:, None] - columns) % b, None
    n, seed = setting.size(shape), mixed(torch.tensor(setting.seed & WORD))
    partitions = torch.arange(2 * -(-shape[0] * shape[1] // n))
    factor, start = (mixed(partitions ^ seed) % n).view(-1, 2).to(rows.device).unbind(1)
    factor = torch.tensor([_coprime(a, n) for a in factor.tolist()], device=rows.device)
    position = rows[:, None] * shape[1] + columns
    part, within = position // n, position % n
    odd = mixed(mixed(position ^ seed.to(rows.device)) ^ 0x9E3779B9) & 1
    return (factor[part] * within + start[part]) % n, 1 - 2 * odd


def _coprime(first: int, n: int) -> int:
    """The first number from `first` on that has no factor with `n`."""
    while math.gcd(first, n) != 1:
        first += 1
    return first


class SharedOperator(Operator):
    """The array alone; cyclic blocks are applied by Fourier transforms where that takes fewer operations."""

    setting: SharedSetting
    array: Operator

    def __init__(self, shape: Shape, setting: SharedSetting) -> None:
        super().__init__(shape, setting)
        size = (1, setting.size(shape))
        self.array = HalfOperator(size) if setting.value_bits == 16 else IntOperator(size, setting.integers())

    @property
    def flops(self) -> int:
        return min(super().flops, self._of_transforms)

    @property
    def _of_transforms(self) -> int:
        """Operations by transforms: `5/2 b log2 b` for one of a block, 8 for a product of complex numbers."""
        b = self.setting.block
        if b is None:
            return super().flops
        down, across = (-(-side // b) for side in self.shape)
        return math.ceil(2.5 * b * math.log2(b)) * (down + across) + 8 * (b // 2 + 1) * down * across

    def decode(self) -> Tensor:
        return self._rows(torch.arange(self.shape[0], device=self._device))

    def take(self, index: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        if self._decoded is not None:
            return super().take(index, dtype)
        return self._rows(index.reshape(-1)).reshape(*index.shape, self.shape[1]).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        b = self.setting.block
        if b is None or self._decoded is not None or self._of_transforms >= super().flops:
            return super().forward(x)
        down, across = (-(-side // b) for side in self.shape)
        padded = torch.nn.functional.pad(x.float(), (0, across * b - self.shape[1]))
        inputs = torch.fft.rfft(padded.reshape(-1, across, b)).permute(2, 0, 1)  # (frequencies, n, across)
        weights = torch.fft.rfft(self.array.dense().reshape(down, across, b)).permute(2, 1, 0)
        outputs: Tensor = torch.fft.irfft((inputs @ weights).permute(1, 2, 0), b).reshape(*x.shape[:-1], down * b)
        return outputs[..., : self.shape[0]].to(x.dtype)

    def _rows(self, rows: Tensor) -> Tensor:
        place, sign = places(self.shape, self.setting, rows)
        values = self.array.dense()[0][place]
        return values if sign is None else values * sign

    @property
    def _device(self) -> torch.device:
        return next(iter(self.array.buffers())).device


@dataclass(frozen=True)
class Tie:
    """The linear map from an array (n,) to a weight (rows, columns): every entry one value, with a sign."""

    place: Tensor
    sign: Tensor | None
    size: int

    def spread(self, array: Tensor) -> Tensor:
        """The weight that an array stands for."""
        values = array[self.place]
        return values if self.sign is None else values * self.sign

    def gathered(self, weight: Tensor) -> Tensor:
        """The transposed map: for every value the sum of its entries."""
        signed = weight if self.sign is None else weight * self.sign
        total: Tensor = signed.new_zeros(self.size).index_add_(0, self.place.flatten(), signed.flatten())
        return total

    def means(self, weight: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """The best array under diagonal moments, and what every value of it weighs."""
        importance = torch.outer(rows, columns).to(weight)
        total = weight.new_zeros(self.size).index_add_(0, self.place.flatten(), importance.flatten())
        return self.gathered(weight * importance) / total.clamp_min(1e-30), total


def least_squares(weight: Tensor, metric: Metric, tie: Tie) -> Tensor:
    """The array (n,) of the least distance under the metric; `weight` (rows, columns) in the precision to work in.

    The normal equations `Z^T R (Z a) C = Z^T R W C` are diagonal where both moments are; else conjugate gradients
    from the weighted means, preconditioned by the same diagonal.
    """
    rows, columns = (
        Side(side.moment.to(weight) / side.diagonal.mean().to(weight)) for side in (metric.rows, metric.columns)
    )
    array, weights = tie.means(weight, rows.diagonal, columns.diagonal)
    if rows.is_diagonal and columns.is_diagonal:
        return array

    def felt(error: Tensor) -> Tensor:
        return tie.gathered(rows.apply(columns.felt(error)))

    residual = felt(weight - tie.spread(array))
    return conjugate_gradients(array, residual, lambda a: felt(tie.spread(a)), STEPS, weights.clamp_min(1e-30))


class SharedForm:
    """Hashed arrays and cyclic blocks."""

    name = "shared"
    stores = "one array for all entries of a weight, or a few bytes a cyclic block"
    wins = "where a network was trained so"

    def settings(self, shape: Shape) -> Iterable[SharedSetting]:
        """A half to a sixteenth of the values, hashed and in cyclic blocks, in 8 bits."""
        for times in (2, 4, 8, 16):
            yield SharedSetting(1 / times, None, 8)
            yield SharedSetting(None, times, 8)

    def setting(self, values: Mapping[str, Any]) -> SharedSetting:
        return SharedSetting(**values)

    def probe(self, shape: Shape, curve: Sequence[Candidate]) -> SharedSetting:
        return SharedSetting(0.5, None, 8)

    def empty(self, shape: Shape, setting: SharedSetting) -> SharedOperator:
        return SharedOperator(shape, setting)

    def curve(self, weight: Tensor, metric: Metric, settings: Iterable[SharedSetting] | None = None) -> list[Candidate]:
        """Arrays are shared by all rows, so a table is fitted whole."""
        shape: Shape = (weight.shape[0], weight.shape[1])
        ladder = self.settings(shape) if settings is None else settings
        return [fitted_candidate(self, weight, metric, setting)[1] for setting in ladder]

    def fit(self, weight: Tensor, metric: Metric, setting: SharedSetting) -> Operator:
        """The better of the values for the metric and of plain means, which the judge of a damped metric may prefer."""
        weight = weight.detach().float()
        shape: Shape = (weight.shape[0], weight.shape[1])
        tie = Tie(*places(shape, setting, torch.arange(shape[0], device=weight.device)), setting.size(shape))
        fits = []
        for steer in (metric, metric.coarsened("identity")):
            rows, columns = steer.rows, steer.columns
            _, weights = tie.means(
                weight, rows.diagonal / rows.diagonal.mean(), columns.diagonal / columns.diagonal.mean()
            )
            array = least_squares(weight, steer, tie)
            operator = SharedOperator(shape, setting)
            if setting.value_bits == 16:
                operator.array = HalfOperator.of(array[None])
            else:
                one = Side(torch.ones(1, device=weight.device))
                seen = Metric("diagonal", one, Side(weights))
                operator.array = IntForm().fit(array[None], seen, setting.integers())
            fits.append(operator.to(weight.device))
        return min(fits, key=lambda operator: metric.distance(weight - operator.dense()))
