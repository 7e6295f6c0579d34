"""The form `coded`: integers at their entropy, one step a row and a column, with two-sided feedback.

With unit lower factors of the two moments of a metric, the error of a site is a sum over its entries of
`scale * d_o[i] d_i[j] eta[i, j]^2` (P147). So an entry gets the step `S[i, j] = step / sqrt(2 scale d_o[i] d_i[j])`:
every entry of every site then does the damage `step^2 / 24`, slopes are equal, and one step for the whole model is the
best allocation. Entries that do not matter become zeros, which an entropy coder makes nearly free. `W_hat` is
`diag(S_o) C diag(S_i)` with integers `C`, stored as a stream (`coding/`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from scipy.interpolate import CubicSpline
from torch import Tensor, nn

from tersor.coding import Coded, code_costs, decode, encode
from tersor.errors import TersorError
from tersor.forms.base import Candidate, Cost, Operator, Shape, cost_of
from tersor.forms.packing import pack, packed_width, unpack
from tersor.forms.rounding import Grid, Prices, round_with_feedback
from tersor.metrics import Metric

RUNGS = 4  # steps of a ladder to an octave: a quarter of a bit apart
RATES = (0.1, 8.0)  # bits an entry between which a curve is drawn
FINE = 4.5  # bits an entry above which every other step will do
RESOLUTION = 4  # factors of steps to an octave
FARTHEST = 60 * RESOLUTION  # factors lie between 2^-60 and 2^60
SMOOTH = 1.5  # bits an entry above which a curve may be interpolated
SPARE = 1.002  # of an interpolated size, so that few fits come out larger
COARSENINGS = 32  # steps tried before a promised size is given up
LARGEST = 2.0**20  # the magnitude of a code
PACKED_BITS = (2, 3, 4, 5, 6, 8)
Ints = np.ndarray[Any, Any]
BLOCK = 1 << 22  # entries that are decoded at a time where a product allows it


@dataclass(frozen=True)
class CodedSetting:
    """`step` is the square root of 24 times the damage that an entry may do, in nats; `trade` prices bits in rounding.

    `stored` and `resident` are the bytes of the stream and of the integers packed in memory; a fit fills them in, and
    one of a setting that has them takes no more bytes than `stored`.
    """

    step: float
    trade: float = 0.25
    stored: int | None = field(default=None, compare=False)
    resident: int | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if not 0 < self.step < math.inf:
            raise TersorError(f"coded: step is {self.step}, but must be above zero.")
        if not 0 <= self.trade <= 1:
            raise TersorError(f"coded: trade is {self.trade}, but must lie between 0 and 1.")

    @property
    def label(self) -> str:
        return f"coded {self.step:.2g}"


class CodedOperator(Operator):
    """A stream; decoded when first used into packed integers, escapes, and the logarithms of the steps."""

    setting: CodedSetting
    stream: Tensor

    def __init__(self, shape: Shape, setting: CodedSetting) -> None:
        super().__init__(shape, setting)
        self.register_buffer("stream", torch.zeros(setting.stored or 0, dtype=torch.uint8))
        self._packed: Packed | None = None
        self._read: tuple[int, int] | None = None

    @property
    def resident(self) -> int:
        return self.nbytes + (self.setting.resident or 0)

    def unready(self) -> tuple[Callable[..., Any], tuple[Any, ...]] | None:
        if torch.compiler.is_compiling() or (self._packed is not None and self._read == self._identity()):
            return None
        return unpack_stream, (self.stream.cpu(), self.shape)

    def adopt(self, made: Packed) -> None:
        self._packed, self._read = made.to(self.stream.device), self._identity()

    def _identity(self) -> tuple[int, int]:
        """Changes with the stream: with the model it was loaded from, and with the device it lies on."""
        return self.stream.data_ptr(), self.stream._version

    def packed(self) -> Packed:
        """The integers as they lie in memory, on the device of the stream; decoded where the stream is new."""
        work = self.unready()
        if work is not None:
            self.adopt(work[0](*work[1]))
        assert self._packed is not None
        return self._packed

    def decode(self) -> Tensor:
        return self.packed().rows(None)

    def take(self, index: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        if self._decoded is not None:
            return super().take(index, dtype)
        rows = self.packed().rows(index.reshape(-1))
        return rows.reshape(*index.shape, self.shape[1]).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        rows = max(1, BLOCK // self.shape[1])
        if self._decoded is not None or rows >= self.shape[0]:
            return super().forward(x)
        packed = self.packed()
        blocks = torch.arange(self.shape[0], device=x.device).split(rows)
        return torch.cat([nn.functional.linear(x, packed.rows(block).to(x.dtype)) for block in blocks], -1)


@dataclass(frozen=True)
class Packed:
    """Codes (rows, bytes) of `bits` bits above the lowest; those beyond are escapes, at sorted positions."""

    shape: Shape
    bits: int
    codes: Tensor
    positions: Tensor
    escapes: Tensor
    row_logs: Tensor
    column_logs: Tensor
    resolution: int

    @classmethod
    def of(cls, coded: Coded) -> Packed:
        """In the number of bits that takes the fewest bytes."""
        shape = (coded.codes.shape[0], coded.codes.shape[1])
        bits = min(PACKED_BITS, key=lambda bits: _packed_bytes(coded.codes, bits))
        codes = torch.from_numpy(coded.codes)
        half = 1 << (bits - 1)
        outside = (codes < -half) | (codes >= half)
        positions = outside.reshape(-1).nonzero().reshape(-1).to(_position_type(codes.numel()))
        rows, columns = (torch.from_numpy(side.astype(np.int16)) for side in (coded.rows, coded.columns))
        escapes = codes[outside].to(_escape_type(coded.codes))
        small = codes.clamp(-half, half - 1) + half
        return cls(shape, bits, pack(small, bits), positions, escapes, rows, columns, coded.resolution)

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self._tensors.values())

    @cached_property
    def _tensors(self) -> dict[str, Tensor]:
        return {k: v for k, v in self.__dict__.items() if isinstance(v, Tensor)}

    def to(self, device: torch.device) -> Packed:
        moved: dict[str, Any] = {name: tensor.to(device) for name, tensor in self._tensors.items()}
        return replace(self, **moved)

    def rows(self, index: Tensor | None) -> Tensor:
        """The matrix, or its rows at `index` (n,), in float32."""
        codes, logs = self.codes, self.row_logs
        if index is not None:
            codes, logs = codes[index], logs[index]
        values = unpack(codes, self.bits, self.shape[1]).to(torch.float32) - float(1 << (self.bits - 1))
        if len(self.positions):
            at, escapes = self._escapes_of(index)
            values.reshape(-1)[at.long()] = escapes.to(torch.float32)
        values *= torch.exp2(logs.float() / self.resolution)[:, None]
        values *= torch.exp2(self.column_logs.float() / self.resolution)
        return values

    def _escapes_of(self, index: Tensor | None) -> tuple[Tensor, Tensor]:
        """Where the escapes lie among the rows at `index`, and what they are."""
        if index is None:
            return self.positions, self.escapes
        columns = self.shape[1]
        ends = (((index.long() + k) * columns).to(self.positions.dtype) for k in (0, 1))
        first, last = (torch.searchsorted(self.positions, end) for end in ends)
        counts = last - first
        row = torch.repeat_interleave(torch.arange(len(index), device=index.device), counts)
        inside = torch.arange(len(row), device=index.device) - (counts.cumsum(0) - counts)[row]
        escape = first[row] + inside
        return row * columns + self.positions[escape] % columns, self.escapes[escape]


def unpack_stream(stream: Tensor, shape: Shape) -> Packed:
    """Decode a stream; raises TersorError where it is damaged or holds a matrix of another shape."""
    return Packed.of(decode(stream.numpy().tobytes(), shape))


def _packed_bytes(codes: np.ndarray[Any, Any], bits: int) -> int:
    half = 1 << (bits - 1)
    escapes = int(((codes < -half) | (codes >= half)).sum())
    each = _position_type(codes.size).itemsize + _escape_type(codes).itemsize
    return int(codes.shape[0]) * packed_width(int(codes.shape[1]), bits) + each * escapes


def _position_type(entries: int) -> torch.dtype:
    return torch.int32 if entries < 2**31 else torch.int64


def _escape_type(codes: Ints) -> torch.dtype:
    return torch.int16 if np.abs(codes).max(initial=0) < 2**15 else torch.int32


class CodedForm:
    """Integers at their entropy."""

    name = "coded"

    def settings(self, shape: Shape) -> Iterable[CodedSetting]:
        """All steps that might be worth trying; a curve takes those within `RATES`."""
        return (CodedSetting(_step(rung)) for rung in range(-4, -64, -1))

    def setting(self, values: Mapping[str, Any]) -> CodedSetting:
        return CodedSetting(**values)

    def probe(self, shape: Shape) -> None:
        return None

    def empty(self, shape: Shape, setting: CodedSetting) -> CodedOperator:
        return CodedOperator(shape, setting)

    def curve(self, weight: Tensor, metric: Metric, settings: Iterable[CodedSetting] | None = None) -> list[Candidate]:
        """Settings that are given are fitted; of the ladder above a bit every other one, the rest is interpolated."""
        lattice = _Lattice.of(weight, metric)
        if settings is not None:
            return [self._candidate(lattice, metric, setting) for setting in settings]
        rates = list(lattice.ladder())
        chosen = [s for n, (rate, s) in enumerate(rates) if n % 2 == 0 or rate < SMOOTH or n == len(rates) - 1]
        fitted = [self._candidate(lattice, metric, setting) for setting in chosen]
        return _interpolated(fitted, [setting for _, setting in rates])

    def _candidate(self, lattice: _Lattice, metric: Metric, setting: CodedSetting) -> Candidate:
        operator = lattice.fit(replace(setting, stored=None, resident=None))
        divergence = metric.distance(lattice.original - operator.dense())
        return Candidate(self.name, operator.setting, cost_of(self, operator.shape, operator.setting), divergence)

    def fit(self, weight: Tensor, metric: Metric, setting: CodedSetting) -> CodedOperator:
        return _Lattice.of(weight, metric).fit(setting)


def _interpolated(fitted: list[Candidate], ladder: list[CodedSetting]) -> list[Candidate]:
    """Candidates of a whole ladder from those of some of its steps, by splines through logarithms.

    Sizes are rounded up, as a fit keeps to them.
    """
    known: dict[CodedSetting, Candidate] = {c.setting: c for c in fitted}  # type: ignore[misc]
    if len(known) == len(ladder):
        return [known[setting] for setting in ladder]
    steps = sorted(known, key=lambda setting: setting.step)
    at = [math.log(setting.step) for setting in steps]

    def spline(values: list[float]) -> CubicSpline:
        return CubicSpline(at, np.log(np.maximum(values, 1e-300)))

    costs = [known[setting].cost for setting in steps]
    stored, more = spline([c.stored for c in costs]), spline([c.resident - c.stored for c in costs])
    divergence = spline([known[setting].divergence for setting in steps])

    def between(setting: CodedSetting) -> Candidate:
        size, extra, damage = (math.exp(float(s(math.log(setting.step)))) for s in (stored, more, divergence))
        bytes_stored, bytes_more = math.ceil(SPARE * size), math.ceil(extra)
        cost = Cost(bytes_stored, bytes_stored + bytes_more, fitted[0].cost.flops)
        return Candidate(fitted[0].form, replace(setting, stored=bytes_stored, resident=bytes_more), cost, damage)

    return [known[setting] if setting in known else between(setting) for setting in ladder]


def _step(rung: int) -> float:
    return float(2.0 ** (rung / RUNGS))


@dataclass(frozen=True)
class _Lattice:
    """A weight in the order in which it is rounded, with the factors of its metric and the logarithms of unit steps.

    The order is that of a pivoted factorisation, which spreads the pivots most; it need not be stored.
    """

    original: Tensor
    weight: Tensor
    row_order: Tensor
    column_order: Tensor
    lower_rows: Tensor | None
    lower_columns: Tensor | None
    row_logs: np.ndarray[Any, Any]
    column_logs: np.ndarray[Any, Any]

    @classmethod
    def of(cls, weight: Tensor, metric: Metric) -> _Lattice:
        weight = weight.detach().float().cpu()
        row_order, column_order = metric.rows.pivoted_order, metric.columns.pivoted_order
        (lower_rows, d_rows), (lower_columns, d_columns) = (
            side.permuted(order).unit_lower
            for side, order in ((metric.rows, row_order), (metric.columns, column_order))
        )
        logs = (_logs(d_rows * 2 * max(metric.scale, 1e-300)), _logs(d_columns))
        return cls(
            weight, weight[row_order][:, column_order], row_order, column_order, lower_rows, lower_columns, *logs
        )

    def fit(self, setting: CodedSetting) -> CodedOperator:
        """Fit a step; a setting that promises a size is kept to it, under whatever metric, by a larger step."""
        operator = self._fit_step(setting)
        for _ in range(COARSENINGS):
            if setting.stored is None or operator.nbytes <= setting.stored:
                break
            over = 8 * (operator.nbytes - setting.stored) / self.weight.numel()
            setting = replace(setting, step=setting.step * 2 ** max(over, 1 / 16))
            operator = self._fit_step(setting)
        return operator

    def _fit_step(self, setting: CodedSetting) -> CodedOperator:
        """Round with feedback, encode. Steps that are too small for any code are taken larger."""
        rows = np.clip(np.rint(self.row_logs + RESOLUTION * math.log2(setting.step)), -FARTHEST, FARTHEST).astype(int)
        columns = np.clip(np.rint(self.column_logs), -FARTHEST, FARTHEST).astype(int)
        scale = _outer(rows, columns)
        beyond = float((self.weight / scale).abs().max()) * 16 / LARGEST
        if beyond > 1:
            rows = rows + math.ceil(RESOLUTION * math.log2(beyond))
            scale = _outer(rows, columns)
        prices = None
        if setting.trade > 0:
            plain = (self.weight / scale).round().clamp(-LARGEST, LARGEST).int()
            bits, classes = code_costs(Coded(plain.numpy(), rows, columns, RESOLUTION))
            table = setting.trade * math.log(2) / 6 * torch.from_numpy(bits).float()
            prices = Prices(table, torch.from_numpy(classes))
        grid = Grid(scale, torch.zeros(()).expand(scale.shape), LARGEST, -LARGEST, prices)
        rounded = round_with_feedback(self.weight, grid, self.lower_rows, self.lower_columns)
        return _operator((rounded / scale).round().int(), rows, columns, self, setting)

    def ladder(self) -> Iterable[tuple[float, CodedSetting]]:
        """The steps whose rate in bits, were the weights Gaussians, lies within `RATES`, with that rate."""
        scale = np.exp2((np.rint(self.row_logs)[:, None] + np.rint(self.column_logs)[None]) / RESOLUTION)
        size = float(self.weight.square().mean().sqrt()) + 1e-30
        squares = np.square(size / scale.ravel()[:: max(1, scale.size // 65536)])
        for rung in range(16, -100, -1):
            rate = float(np.log2(1 + 12 * squares / _step(rung) ** 2).mean() / 2)
            if rate > RATES[1]:
                return
            if rate >= RATES[0] and (rate < FINE or rung % 2 == 0):
                yield rate, CodedSetting(_step(rung))


def _outer(rows: Ints, columns: Ints) -> Tensor:
    """The steps of all entries, from their logarithms."""
    return torch.from_numpy(np.exp2((rows[:, None] + columns[None]) / RESOLUTION).astype(np.float32))


def _logs(pivots: Tensor) -> np.ndarray[Any, Any]:
    """Logarithms of the steps of one side at step 1, in units of 1 / RESOLUTION."""
    logs: np.ndarray[Any, Any] = np.log2(pivots.double().clamp_min(1e-300).numpy())
    return -RESOLUTION / 2 * logs


def _operator(codes: Tensor, rows: Ints, columns: Ints, lattice: _Lattice, setting: CodedSetting) -> CodedOperator:
    """The codes in the order of the weight, encoded."""
    back_rows, back_columns = (order.argsort() for order in (lattice.row_order, lattice.column_order))
    coded = Coded(
        codes[back_rows][:, back_columns].numpy(), rows[back_rows.numpy()], columns[back_columns.numpy()], RESOLUTION
    )
    stream = torch.frombuffer(bytearray(encode(coded)), dtype=torch.uint8)
    packed = Packed.of(coded)
    operator = CodedOperator((len(rows), len(columns)), replace(setting, stored=len(stream), resident=packed.nbytes))
    operator.stream = stream
    operator.adopt(packed)
    return operator
