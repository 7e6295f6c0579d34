"""The form `float`: codes of a few bits that name the values of a fixed table, times a scale for every group.

`W_hat = s T[C]`. The tables are floating-point numbers of 3 to 8 bits, the quantiles of a normal (nf4) and the dynamic
tree of P115; the block formats mxfp4, mxfp6, mxfp8 and nvfp4 fix the groups and the scales as well. Scales are searched
under the metric among those that can be stored; rounding is to the nearest or with feedback (`rounding.py`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tersor.errors import TersorError
from tersor.forms.base import Candidate, RowOperator, Shape, bits_of, cost_of, fitted_candidate, from_bits
from tersor.forms.packing import PLANES, in_reach, pack, packed_width, unpack
from tersor.forms.rounding import Levels, relative, round_with_feedback
from tersor.metrics import Metric

ROUNDINGS = ("nearest", "feedback", "two-sided")
# Block formats: the format of an entry, entries of a block, and how the scale of a block is stored.
BLOCKS = {
    "mxfp4": ("e2m1", 32, "e8m0"),
    "mxfp6": ("e2m3", 32, "e8m0"),
    "mxfp8": ("e4m3", 32, "e8m0"),
    "nvfp4": ("e2m1", 16, "e4m3"),
}
KEPT = {"log": 2, "e4m3": 1}  # floats that a tensor keeps beside its scales
REFITS = 3  # rounds of codes and least squares
OCTAVES = 24.0  # between the largest and the smallest scale of a tensor with 8-bit logarithms
LADDER = (
    *((name, size) for name in ("e2m1", "nf4") for size in (None, 64, 32)),
    *((name, None) for name in ("mxfp4", "nvfp4", "e2m2", "e2m3", "mxfp6")),
    ("e2m3", 32),
    *((name, None) for name in ("e2m5", "e3m4", "e4m3", "dynamic8")),
)


def split_of(element: str) -> tuple[int, int] | None:
    """Bits of exponent and mantissa of a small floating-point format such as e2m1; None where it is no such format."""
    found = re.fullmatch(r"e([1-6])m([0-6])", element) if isinstance(element, str) else None
    exponent, mantissa = (int(g) for g in found.groups()) if found else (0, 0)
    return (exponent, mantissa) if 1 + exponent + mantissa in set(PLANES) - {1, 2} else None


@cache
def table_of(element: str) -> tuple[float, ...]:
    """The value of every code of a format, in the order of the codes; NaN or infinite where a code is no number."""
    if element == "nf4":
        return _normal_float()
    if element == "dynamic8":
        return _dynamic_tree()
    split = split_of(element)
    assert split is not None
    return _small_float(*split)


@cache
def levels_of(element: str) -> dict[float, int]:
    """The numbers that a format can say, rising, and for each its first code."""
    first: dict[float, int] = {}
    for code, value in enumerate(table_of(element)):
        if math.isfinite(value):
            first.setdefault(value, code)
    return dict(sorted(first.items()))


def _small_float(exponent: int, mantissa: int) -> tuple[float, ...]:
    """`(-1)^s 2^(max(e, 1) - b) ([e > 0] + m / 2^M)` with `b = 2^(E - 1) - 1`: sign, exponent and mantissa of a code.

    As in the OCP formats only e4m3 and e5m2 have codes that are no numbers.
    """
    bias, steps = 2 ** (exponent - 1) - 1, 2**mantissa
    sizes = [2.0 ** (max(e, 1) - bias) * ((e > 0) + m / steps) for e in range(2**exponent) for m in range(steps)]
    if (exponent, mantissa) == (4, 3):
        sizes[-1] = math.nan
    if (exponent, mantissa) == (5, 2):
        sizes[-4:] = [math.inf, math.nan, math.nan, math.nan]
    return (*sizes, *(-size for size in sizes))


def _normal_float() -> tuple[float, ...]:
    """Quantiles of a unit normal, 7 below zero, zero, and 8 above, as shares of the largest (arXiv:2305.14314 QLoRA).

    Each side goes in equal steps of probability from a half to the mean of 1 - 1/32 and 1 - 1/30, which are half a step
    from the ends for 16 and for 15 values.
    """
    reach = 0.5 - (1 / 32 + 1 / 30) / 2
    below, above = ([NormalDist().inv_cdf(0.5 + reach * k / n) for k in range(1, n + 1)] for n in (7, 8))
    top = above[-1]
    return (*(-x / top for x in reversed(below)), 0.0, *(x / top for x in above))


def _dynamic_tree() -> tuple[float, ...]:
    """Sign, a run of `z` zeros, a flag, and the other `6 - z` bits a linear fraction `f`: P115 8-Bit Approximations.

    The value is `10^-z` times the middle of part `f` of `2^(6 - z)` equal parts of 0.1 to 1. No flag at all is zero;
    its negative, which would be free, is 1, so that the largest magnitude is kept.
    """
    sizes = []
    for code in range(1, 128):
        fraction_bits = code.bit_length() - 1
        part = (code - 2**fraction_bits + 0.5) / 2**fraction_bits
        sizes.append(10.0 ** (fraction_bits - 6) * (0.1 + 0.9 * part))
    return (0.0, *sizes, 1.0, *(-size for size in sizes))


@dataclass(frozen=True)
class FloatSetting:
    """`group_size` None is the block of the format, or a whole row where it has none; block formats fix their scales.

    Where `search` is off, scales follow from the largest magnitude of a group alone.
    """

    format: str
    group_size: int | None = None
    scale_bits: int = 8
    rounding: str = "two-sided"
    search: bool = True

    def __post_init__(self) -> None:
        if self.format not in (*BLOCKS, "nf4", "dynamic8") and split_of(self.format) is None:
            raise TersorError(
                f"float: format is {self.format!r}, but must be {', '.join(BLOCKS)}, nf4, dynamic8, or one like e2m1 "
                "of 3, 4, 5, 6 or 8 bits in all."
            )
        for name, allowed in (("scale_bits", (8, 16)), ("rounding", ROUNDINGS), ("search", (True, False))):
            if getattr(self, name) not in allowed:
                raise TersorError(f"float: {name} is {getattr(self, name)!r}, but must be one of {allowed}.")
        size = self.group_size
        if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
            raise TersorError(f"float: group_size is {size!r}, but must be at least 1, or null for a whole row.")
        if self.format in BLOCKS and (size not in (None, BLOCKS[self.format][1]) or self.scale_bits != 8):
            block = BLOCKS[self.format][1]
            raise TersorError(f"float: {self.format} has blocks of {block} with 8-bit scales; leave group_size out.")

    @property
    def label(self) -> str:
        group = "" if self.format in BLOCKS else " row" if self.group_size is None else f" g{self.group_size}"
        return f"{self.format}{group} {self.rounding}"

    @property
    def element(self) -> str:
        """The format of an entry."""
        return BLOCKS[self.format][0] if self.format in BLOCKS else self.format

    @property
    def bits(self) -> int:
        split = split_of(self.element)
        return {"nf4": 4, "dynamic8": 8}[self.element] if split is None else 1 + sum(split)

    @property
    def scales(self) -> str:
        """How scales are stored: 8-bit logarithms, half precision, powers of two, or fp8."""
        return BLOCKS[self.format][2] if self.format in BLOCKS else "log" if self.scale_bits == 8 else "half"

    def size(self, shape: Shape) -> int:
        """Entries of a group."""
        return BLOCKS[self.format][1] if self.format in BLOCKS else self.group_size or shape[1]


@dataclass(frozen=True)
class Scales:
    """How scales are stored, with the largest level and what the tensor keeps beside them, as bit patterns of floats.

    `half` stores the largest value of a group, the others the scale itself: `log` in 255 steps of the logarithm between
    two ends, `e8m0` its power of two (code less 127), `e4m3` in multiples of a scale of the tensor.
    """

    kind: str
    top: float
    whole: Tensor | None = None

    def over(self, scale: Tensor) -> Scales:
        """The same with what the tensor keeps taken from the scales that are to be stored."""
        if self.kind == "log":
            logs = scale.clamp_min(1e-30).log2()
            low, high = logs.min().clamp_min(logs.max() - OCTAVES), logs.max()
            return replace(self, whole=torch.stack([low, (high - low).clamp_min(1e-6) / 255]))
        if self.kind == "e4m3":
            return replace(self, whole=(scale.max() / max(levels_of("e4m3"))).clamp_min(1e-30).reshape(1))
        return self

    def stored(self, scale: Tensor) -> Tensor:
        if self.kind == "half":
            return bits_of((scale * self.top).clamp_min(6e-8))
        if self.kind == "e8m0":
            return (scale.log2().round() + 127).clamp(0, 254).to(torch.uint8)
        assert self.whole is not None
        if self.kind == "e4m3":
            share: Tensor = (scale / self.whole).clamp_max(max(levels_of("e4m3"))).to(torch.float8_e4m3fn)
            return share.view(torch.uint8).clamp_min(1)
        low, step = self.whole
        codes: Tensor = ((scale.clamp_min(1e-30).log2() - low) / step).round().clamp(0, 255)
        return codes.to(torch.uint8)

    def values(self, stored: Tensor) -> Tensor:
        if self.kind == "half":
            return from_bits(stored) / self.top
        if self.kind == "e8m0":
            return torch.exp2(stored.double() - 127).float()
        assert self.whole is not None
        if self.kind == "log":
            low, step = self.whole
            return torch.exp2(low + step * stored.float())
        return stored.view(torch.float8_e4m3fn).float() * self.whole


class FloatOperator(RowOperator):
    """Packed codes (rows, bytes) in the format's own bits, a scale a group (rows, groups), at most two floats more."""

    setting: FloatSetting
    codes: Tensor
    scale: Tensor
    whole: Tensor

    def __init__(self, shape: Shape, setting: FloatSetting) -> None:
        super().__init__(shape, setting)
        groups = shape[0], -(-shape[1] // setting.size(shape))
        self.table, self.top = table_of(setting.element), max(levels_of(setting.element))
        small = torch.int16 if setting.scales == "half" else torch.uint8
        self.register_buffer("codes", torch.zeros(shape[0], packed_width(shape[1], setting.bits), dtype=torch.uint8))
        self.register_buffer("scale", torch.zeros(groups, dtype=small))
        if setting.scales in KEPT:
            self.register_buffer("whole", torch.zeros(KEPT[setting.scales], dtype=torch.int32))

    @property
    def scales(self) -> Scales:
        whole = self._buffers.get("whole")
        return Scales(self.setting.scales, self.top, None if whole is None else whole.view(torch.float32))

    def set_scales(self, scales: Scales, scale: Tensor) -> None:
        """Store the scales of groups (rows, groups)."""
        self.scale = scales.stored(scale)
        if scales.whole is not None:
            self.whole = scales.whole.float().view(torch.int32)

    def decode_rows(self, index: Tensor | None) -> Tensor:
        bits, size = self.setting.bits, self.setting.size(self.shape)
        packed, scale = (b if index is None else b[index] for b in (self.codes, self.scale))
        scale = self.scales.values(scale)
        if in_reach(packed):
            from tersor.forms import unpacking

            decoded = torch.empty(len(packed), self.shape[1])
            table = np.array(self.table, np.float32)
            unpacking.looked_up(packed.numpy(), bits, size, table, scale.contiguous().numpy(), decoded.numpy())
            return decoded
        codes = unpack(packed, bits, self.shape[1])
        return torch.tensor(self.table, device=codes.device)[codes.int()] * _expand(scale, size, self.shape[1])


class FloatForm:
    """Small floating-point codes in groups."""

    name = "float"
    stores = "packed codes of a fixed table of values, a scale a group or block"
    wins = "resident, at four bits (nf4); where hardware reads the format"

    def settings(self, shape: Shape) -> Iterable[FloatSetting]:
        """The ladder: four bits in several group sizes and block formats, five and six, and eight."""
        for name, size in LADDER:
            setting = FloatSetting(name, size)
            if size is None or size < shape[1]:
                yield setting

    def setting(self, values: Mapping[str, Any]) -> FloatSetting:
        try:
            return FloatSetting(**values)
        except TypeError as error:
            raise TersorError(f"float: a setting has format, group_size and others, not {sorted(values)}.") from error

    def probe(self, shape: Shape, curve: Sequence[Candidate]) -> None:
        return None

    def empty(self, shape: Shape, setting: FloatSetting) -> FloatOperator:
        return FloatOperator(shape, setting)

    def curve(self, weight: Tensor, metric: Metric, settings: Iterable[FloatSetting] | None = None) -> list[Candidate]:
        """Of a table from a sample of its rows, where each row has groups of its own."""
        shape: Shape = (weight.shape[0], weight.shape[1])
        rows = metric.sampled_rows(apart=True)
        sample = (weight, metric) if rows is None else (weight[rows[0]], metric.of_rows(*rows))
        return [
            replace(fitted_candidate(self, *sample, setting)[1], cost=cost_of(self, shape, setting))
            for setting in (self.settings(shape) if settings is None else settings)
        ]

    def fit(self, weight: Tensor, metric: Metric, setting: FloatSetting) -> FloatOperator:
        """Under the metric, and as if it were the identity, of which the better is kept."""
        weight = weight.detach().float()
        fitted = _fitted(weight, metric, setting)
        if metric.kind == "identity" or (setting.rounding == "nearest" and not setting.search):
            return fitted
        plain = _fitted(weight, metric.coarsened("identity"), setting)
        return min((fitted, plain), key=lambda operator: metric.distance(weight - operator.dense()))


def _fitted(weight: Tensor, metric: Metric, setting: FloatSetting) -> FloatOperator:
    shape: Shape = (weight.shape[0], weight.shape[1])
    (lower_rows, pivot_rows), (lower_columns, pivot_columns) = metric.rows.unit_lower, metric.columns.unit_lower
    if setting.rounding == "nearest":
        lower_rows = lower_columns = None
        pivot_rows, pivot_columns = metric.rows.diagonal, metric.columns.diagonal
    elif setting.rounding == "feedback":
        lower_rows, pivot_rows = None, metric.rows.diagonal
    importance = torch.outer(relative(pivot_rows), relative(pivot_columns)).to(weight.device)
    operator = FloatOperator(shape, setting)
    operator.set_scales(*search_scales(weight, importance, setting))
    operator.to(weight.device)
    known = levels_of(setting.element)
    scale = _expand(operator.scales.values(operator.scale), setting.size(shape), shape[1])
    grid = Levels(scale, torch.tensor(list(known), device=weight.device))
    rounded = round_with_feedback(weight, grid, lower_rows, lower_columns).to(weight.device)
    codes = torch.tensor(list(known.values()), dtype=torch.uint8, device=weight.device)
    operator.codes = pack(codes[grid.codes(rounded)], setting.bits)
    return operator


def search_scales(weight: Tensor, importance: Tensor, setting: FloatSetting) -> tuple[Scales, Tensor]:
    """The scales (rows, groups) that make the importance-weighted error of plain rounding least, and how to store them.

    The clipping range is searched around the extremes (P434 LLM-FP4), then codes and the closed-form least-squares
    scale alternate; the best of all iterates is kept. Scales are tried as they would be stored.
    """
    size = setting.size((weight.shape[0], weight.shape[1]))
    w, h = (_grouped(m.cpu(), size) for m in (weight, importance))
    levels = torch.tensor(list(levels_of(setting.element)))
    largest, top = w.abs().amax(-1), float(levels[-1])
    if setting.scales == "e8m0":  # the rule of the OCP MX specification
        start = torch.exp2(torch.frexp(largest.clamp_min(1e-36)).exponent.double() - math.frexp(top)[1]).float()
    else:
        start = largest.clamp_min(1e-30) / top
    scales = Scales(setting.scales, top).over(start)
    if not setting.search:
        return scales, start

    def storable(scale: Tensor) -> Tensor:
        return scale if scales.kind == "log" else scales.values(scales.stored(scale))

    shares = [1.0, 2.0, 0.5] if scales.kind == "e8m0" else [1.0, *_shares(len(levels))]
    trials = storable(start[..., None] * torch.tensor(shares))
    for _ in range(REFITS):
        scale, fit = _best(w, h, trials, levels)
        trials = torch.stack([scale, storable(torch.where(fit > 0, fit, scale))], -1)
    found, _ = _best(w, h, trials, levels)
    return (scales.over(found) if setting.scales == "log" else scales), found


def _best(w: Tensor, h: Tensor, trials: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """The best of `trials` (rows, groups, count) for weights and importances (rows, groups, size), and another scale.

    That is the least-squares fit to the weights of the levels that they take at the best.
    """
    from tersor.forms.kernels import best_scales

    bounds = Levels(trials, levels).bounds
    best = torch.empty(2, *w.shape[:2])
    arrays = [t.contiguous().numpy() for t in (w, h, trials, levels, bounds)]
    best_scales(*arrays, best[0].numpy(), best[1].numpy())  # type: ignore[call-arg]
    return best[0], best[1]


def _shares(levels: int) -> list[float]:
    """Clipping ranges to try, as shares of the largest magnitude: the finer and the farther, the fewer the levels.

    Those close to it come first: a trial ends when it is worse than the best before.
    """
    steps, low, high = (14, -1.4, 0.5) if levels <= 16 else (10, -0.35, 0.55)
    return [2.0**octaves for octaves in sorted((high + (low - high) * k / (steps - 1) for k in range(steps)), key=abs)]


def _grouped(matrix: Tensor, size: int) -> Tensor:
    """(rows, columns) as (rows, groups, size), short last groups filled with zeros."""
    padded = torch.nn.functional.pad(matrix, (0, -matrix.shape[1] % size))
    return padded.reshape(matrix.shape[0], -1, size)


def _expand(groups: Tensor, size: int, columns: int) -> Tensor:
    """A value a group (rows, groups) as a value an entry (rows, columns)."""
    return groups.repeat_interleave(size, 1)[:, :columns]
