"""The form `int`: integers of a few bits on a grid with a scale, and if asked a zero, for every group of entries.

`W_hat = s (C - z)`. The scales are searched under the metric, not taken from the extremes, and snapped to the precision
they are stored in before any entry is rounded; rounding is to the nearest or with feedback (`rounding.py`).
Groups lie along the columns, or along the rows (P435 Rethinking Channel Dimensions to Isolate Outliers).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tersor.errors import TersorError
from tersor.forms.base import Array, Candidate, PackedOperator, Shape, bits_of, cost_of, from_bits
from tersor.forms.int_scales import search_grid
from tersor.forms.packing import PLANES, Arrays, in_reach, pack, packed_width, unpack
from tersor.forms.rounding import FREE_ROWS, Grid, relative, round_with_feedback, spans
from tersor.metrics import Felt, Kept, Metric

STRIP = 1 << 22  # entries that are fitted at a time where rows do not feel one another
PARTED = 1.02  # times the divergence up to which rows that feel one another are enlarged by themselves
ROUNDINGS = ("nearest", "feedback", "two-sided")
ZEROS = ("fine", "whole")


@dataclass(frozen=True)
class IntSetting:
    """`group_size` None is a whole row (axis `columns`) or a whole column (axis `rows`).

    A `fine` zero lies anywhere on the grid; a `whole` one is a code, as other formats have it. What is `enlarged` is
    multiplied until its error is orthogonal to the weight.
    """

    bits: int
    group_size: int | None = 64
    axis: str = "columns"
    symmetric: bool = False
    scale_bits: int = 8
    rounding: str = "two-sided"
    search: bool = True
    zeros: str = "fine"
    enlarged: bool = False

    def __post_init__(self) -> None:
        for name, allowed in (
            ("bits", tuple(b for b in PLANES if b > 1)),
            ("axis", ("columns", "rows")),
            ("scale_bits", (8, 16)),
            ("rounding", ROUNDINGS),
            ("zeros", ZEROS),
        ):
            if getattr(self, name) not in allowed:
                raise TersorError(f"int: {name} is {getattr(self, name)!r}, but must be one of {allowed}.")
        if self.group_size is not None and self.group_size < 1:
            raise TersorError(f"int: group_size is {self.group_size}, but must be at least 1, or null for a whole row.")

    @property
    def label(self) -> str:
        group = "row" if self.group_size is None else f"g{self.group_size}"
        marks = ("" if self.axis == "columns" else " by rows") + (" sym" if self.symmetric else "")
        marks += " whole" if self.zeros == "whole" else ""
        return f"int{self.bits} {group}{marks} {self.rounding}"

    @property
    def half(self) -> float:
        """The code that a symmetric grid maps to zero; between two codes where it need not be one."""
        return float(2**self.bits) / 2 if self.zeros == "whole" else float(2**self.bits - 1) / 2


class IntOperator(PackedOperator):
    """Packed codes (rows, bytes); scales and zeros of groups, 16-bit floats or 8-bit codes of a range of the tensor."""

    setting: IntSetting
    codes: Tensor
    scale: Tensor
    zero: Tensor
    scale_range: Tensor

    def __init__(self, shape: Shape, setting: IntSetting) -> None:
        super().__init__(shape, setting)
        self._arrays = Arrays()
        groups = _groups(shape, setting)
        small = torch.uint8 if setting.scale_bits == 8 else torch.int16
        self.register_buffer("codes", torch.zeros(shape[0], packed_width(shape[1], setting.bits), dtype=torch.uint8))
        self.register_buffer("scale", torch.zeros(groups, dtype=small))
        if setting.scale_bits == 8:
            self.register_buffer("scale_range", torch.zeros(2, dtype=torch.int32))
        if not setting.symmetric:
            small = torch.uint8 if setting.zeros == "whole" else small
            self.register_buffer("zero", torch.zeros(groups, dtype=small))

    def grid(self, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Scales and zeros of the groups, or of those of some rows where groups lie along the columns, float32."""
        setting = self.setting
        scale = self.scale if rows is None else self.scale[rows]
        if setting.scale_bits == 16:
            scale = from_bits(scale)
        else:
            low, step = self.scale_range.view(torch.float32)
            scale = torch.exp2(low + step * scale.float())
        if setting.symmetric:
            return scale, torch.full_like(scale, setting.half)
        zero = self.zero if rows is None else self.zero[rows]
        if setting.zeros == "whole":
            return scale, zero.float()
        if setting.scale_bits == 16:
            return scale, from_bits(zero)
        return scale, zero.float() * ((2**setting.bits - 1) / 255)

    def set_grid(self, scale: Tensor, zero: Tensor) -> None:
        """Store scales and zeros in the setting's precision."""
        setting = self.setting
        if not setting.symmetric:
            self.zero = self._stored_zero(zero)
        if setting.scale_bits == 16:
            self.scale = bits_of(scale.clamp_min(6e-8))
            return
        logs = scale.clamp_min(1e-30).log2()
        low, high = logs.min(), logs.max()
        step = (high - low).clamp_min(1e-6) / 255
        self.scale_range = torch.stack([low, step]).float().view(torch.int32)
        self.scale = ((logs - low) / step).round().clamp(0, 255).to(torch.uint8)

    def enlarge(self, kept: Kept, rows: Tensor | None) -> None:
        """Multiply the scales, those of rows (rows,) by factors of their own, until the whole weight is kept."""
        if self.setting.scale_bits == 16:
            one = torch.ones(len(self.scale), dtype=torch.float64)
            factors = one * kept.factor() if rows is None else rows * kept.factor(rows)
            self.scale = bits_of((from_bits(self.scale) * factors.to(self.scale.device)[:, None]).clamp_min(6e-8))
            return
        low, step = self.scale_range.view(torch.float32).tolist()
        moved: Tensor | float = 1.0
        if rows is not None:
            codes = self.scale.cpu()
            others = (codes + (rows.log2() / step).round()[:, None]).clamp(0, 255)
            moved = torch.exp2(step * (others - codes).double().mean(1))
            self.scale = others.to(self.scale)
        low += math.log2(kept.factor(moved))
        self.scale_range = torch.tensor([low, step]).view(torch.int32).to(self.scale_range.device)

    def _stored_zero(self, zero: Tensor) -> Tensor:
        setting = self.setting
        if setting.zeros == "whole":
            return zero.to(torch.uint8)
        if setting.scale_bits == 16:
            return bits_of(zero)
        fine: Tensor = (zero * (255 / (2**setting.bits - 1))).round().clamp(0, 255).to(torch.uint8)
        return fine

    def decode_rows(self, index: Tensor | None) -> Tensor:
        setting, columns = self.setting, self.shape[1]
        codes: Tensor = self._buffers["codes"]  # type: ignore[assignment]
        packed = codes if index is None else codes[index]
        if in_reach(packed):
            return self._decode_compiled(packed, index)
        scale, zero = self.grid(None if setting.axis == "rows" else index)
        scale, zero = (_expand(g, self.shape, setting, index) for g in (scale, zero))
        return (unpack(packed, setting.bits, columns).float() - zero) * scale

    def _decode_compiled(self, packed: Tensor, index: Tensor | None) -> Tensor:
        from tersor.forms import unpacking

        setting, size = self.setting, _size(self.shape, self.setting)
        decoded = torch.empty(self.shape if index is None else (len(index), self.shape[1]))
        out = decoded.numpy()
        if setting.axis == "columns" and setting.scale_bits == 8:
            arguments: Any = (*self._logarithmic(packed, index), out)
            unpacking.logarithmic(*arguments)
            return decoded
        codes = packed.numpy()
        if setting.axis == "rows":
            rows = torch.arange(self.shape[0]) if index is None else index
            scale, zero = (g.contiguous().numpy() for g in self.grid())
            unpacking.by_columns(codes, setting.bits, (rows // size).numpy(), scale, zero, out)
        else:
            scale, zero = (g.contiguous().numpy() for g in self.grid(index))
            unpacking.grouped(codes, setting.bits, size, scale, zero, out)
        return decoded

    def _logarithmic(self, packed: Tensor, index: Tensor | None) -> tuple[Any, ...]:
        """What compiled loops read where scales have 8 bits, of all rows or those at `index`, `packed` their codes."""
        setting, of = self.setting, self._buffers
        parts: Any = packed, of["scale"], of["scale" if setting.symmetric else "zero"], of["scale_range"]
        if index is None:
            codes, scale, zero, ends = self._arrays.of(*parts)
        else:
            codes, scale, zero, ends = (p.numpy() for p in (packed, *(g[index] for g in parts[1:3]), parts[3]))
        step = 1.0 if setting.zeros == "whole" else (2**setting.bits - 1) / 255
        half = setting.half if setting.symmetric else -1.0
        return codes, setting.bits, _size(self.shape, setting), scale, ends, zero, step, half

    def product(self, x: Array) -> Array | None:
        setting, packed = self.setting, self._buffers["codes"]
        if setting.axis == "rows" or packed is None or not in_reach(packed):
            return None
        from tersor.forms import unpacking

        out = np.empty((len(x), self.shape[0]), np.float32)
        if setting.scale_bits == 8:
            arguments: Any = (*self._logarithmic(packed, None), x, out)
            unpacking.logarithmic_product(*arguments)
        else:
            scale, zero = (g.contiguous().numpy() for g in self.grid())
            unpacking.grouped_product(packed.numpy(), setting.bits, _size(self.shape, setting), scale, zero, x, out)
        return out

    def forget(self) -> None:
        self._arrays = Arrays()  # whose tensors would stay in memory

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.forget()  # what was moved need not stay where it was
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]


class IntForm:
    """Integers of 2 to 8 bits in groups."""

    name = "int"
    stores = "packed integers of 2 to 8 bits, a scale a group or row"
    wins = "resident, from three bits; nothing to decode at load"

    def __init__(self, rounding: str = "two-sided") -> None:
        self.rounding = rounding

    def settings(self, shape: Shape) -> Iterable[IntSetting]:
        """The ladder: few bits, and the most, in several group sizes, those between in whole rows."""
        for bits in (2, 3, 4, 5, 6, 8):
            sizes = {5: (None,), 6: (None,), 8: (None, 32)}.get(bits, (None, 64, 32))
            for size in sizes:
                if size is None or size < shape[1]:
                    yield IntSetting(bits, size, symmetric=size is None, rounding=self.rounding, enlarged=True)

    def setting(self, values: Mapping[str, Any]) -> IntSetting:
        return IntSetting(**values)

    def probe(self, shape: Shape, curve: Sequence[Candidate]) -> IntSetting:
        return IntSetting(4, 64, enlarged=True)

    def empty(self, shape: Shape, setting: IntSetting) -> IntOperator:
        return IntOperator(shape, setting)

    def curve(self, weight: Tensor, metric: Metric, settings: Iterable[IntSetting] | None = None) -> list[Candidate]:
        shape: Shape = (weight.shape[0], weight.shape[1])
        ladder = self.settings(shape) if settings is None else settings
        weight = weight.detach().float()
        whole = part = metric, metric.felt_by(weight)
        rows = metric.sampled_rows(apart=True)
        if rows is not None:
            of_few = metric.of_rows(*rows)
            part = of_few, of_few.felt_by(weight[rows[0]])

        def candidate(setting: IntSetting) -> Candidate:
            """From a sample of the rows of a table, where each row has groups of its own."""
            under, felt = whole if setting.axis == "rows" else part
            operator, divergence = self._fit(under, felt, setting)
            if divergence is None:
                divergence = under.distance(felt.weight - operator.dense())
            return Candidate(self.name, setting, cost_of(self, shape, setting), divergence)

        return [candidate(setting) for setting in ladder]

    def fit(self, weight: Tensor, metric: Metric, setting: IntSetting) -> IntOperator:
        return self._fit(metric, metric.felt_by(weight.detach().float()), setting)[0]

    def _fit(self, metric: Metric, felt: Felt, setting: IntSetting) -> tuple[IntOperator, float | None]:
        """The operator of a float32 weight, and its divergence where that was found on the way."""
        weight = felt.weight
        shape: Shape = (weight.shape[0], weight.shape[1])
        (lower_rows, pivot_rows), (lower_columns, pivot_columns) = metric.rows.unit_lower, metric.columns.unit_lower
        if setting.rounding == "nearest":
            lower_rows = lower_columns = None
            pivot_rows, pivot_columns = metric.rows.diagonal, metric.columns.diagonal
        elif setting.rounding == "feedback":
            lower_rows, pivot_rows = None, metric.rows.diagonal
        operator = IntOperator(shape, setting).to(weight.device)
        apart = lower_rows is None and setting.axis == "columns"
        size = FREE_ROWS * max(1, STRIP // (FREE_ROWS * shape[1]))
        strips = spans(shape[0], size)[::-1] if apart else [slice(0, shape[0])]
        of_rows, of_columns = relative(pivot_rows), relative(pivot_columns)
        grids = [search_grid(weight[s], torch.outer(of_rows[s], of_columns), setting) for s in strips]
        operator.set_grid(*(torch.cat(parts) for parts in zip(*grids, strict=True)))
        for strip in strips:
            part = weight[strip]
            of_strip = (g[strip] if apart else g for g in operator.grid())
            scale, zero = (_expand(g, (part.shape[0], shape[1]), setting) for g in of_strip)
            grid = Grid(scale, zero, 2.0**setting.bits - 1)
            rounded = round_with_feedback(part, grid, lower_rows, lower_columns)
            operator.codes[strip] = pack(grid.codes(rounded.to(weight.device)), setting.bits)
        return _enlarged(operator, metric, felt) if setting.enlarged else (operator, None)


class PortableForm(IntForm):
    """The integers that other formats hold as they are: whole zeros, 16-bit scales, groups that divide a row."""

    name = "portable"
    stores = "packed integers of 2, 4, 8 bits, whole zeros, 16-bit scales"
    wins = "where another stack must read the file"

    def settings(self, shape: Shape) -> Iterable[IntSetting]:
        for bits in (2, 4, 8):
            for size in (None,) if bits == 8 else (None, 128, 64, 32):
                if size is None or (size < shape[1] and shape[1] % size == 0):
                    yield IntSetting(
                        bits, size, "columns", size is None, 16, self.rounding, zeros="whole", enlarged=True
                    )

    def probe(self, shape: Shape, curve: Sequence[Candidate]) -> None:  # type: ignore[override]
        return None


def _enlarged(operator: IntOperator, metric: Metric, felt: Felt) -> tuple[IntOperator, float | None]:
    """The operator with what rounding lost of a weight in its own direction given back, and its divergence if found.

    That is given to every row, where rows that feel one another are not parted by that, else to the whole.
    """
    kept = felt.kept(operator.dense())
    factors = kept.row_factors if operator.setting.axis == "columns" else None
    if factors is None or metric.rows.is_diagonal:
        operator.enlarge(kept, factors)
        return operator, None
    of_rows = copy.deepcopy(operator)
    of_rows.enlarge(kept, factors)
    operator.enlarge(kept, None)
    by_rows, as_one = (metric.distance(felt.weight - o.dense()) for o in (of_rows, operator))
    return (of_rows, by_rows) if by_rows <= PARTED * as_one else (operator, as_one)


def _size(shape: Shape, setting: IntSetting) -> int:
    """Entries of a group."""
    return setting.group_size or (shape[1] if setting.axis == "columns" else shape[0])


def _groups(shape: Shape, setting: IntSetting) -> Shape:
    """Shape of the scales."""
    rows, columns = shape
    if setting.axis == "columns":
        return rows, -(-columns // (setting.group_size or columns))
    return -(-rows // (setting.group_size or rows)), columns


def _expand(groups: Tensor, shape: Shape, setting: IntSetting, index: Tensor | None = None) -> Tensor:
    """A value a group as a value an entry; where groups lie along the rows, for all rows or those of `index`."""
    if setting.axis == "rows":
        if index is not None:
            return groups[index // _size(shape, setting)]
        return groups.repeat_interleave(_size(shape, setting), 0)[: shape[0]]
    if setting.group_size is None:
        return groups.expand(-1, shape[1])
    return groups.repeat_interleave(setting.group_size, 1)[:, : shape[1]]
