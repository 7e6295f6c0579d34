"""The form `coded`: integers at their entropy, one step a row and a column, with two-sided feedback.

With unit lower factors of the two moments of a metric, the error of a site is a sum over its entries of
`scale * d_o[i] d_i[j] eta[i, j]^2` (P147). So an entry gets the step `S[i, j] = step / sqrt(2 scale d_o[i] d_i[j])`:
every entry of every site then does the damage `step^2 / 24`, slopes are equal, and one step for the whole model is the
best allocation. Entries that do not matter become zeros, which an entropy coder makes nearly free. `W_hat` is
`diag(S_o) C diag(S_i)` with integers `C`, stored as a stream (`coding/`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from scipy.interpolate import CubicSpline
from torch import Tensor, nn

from tersor.coding import encode
from tersor.errors import TersorError
from tersor.forms.base import Array, Candidate, Cost, PackedOperator, Shape, cost_of
from tersor.forms.lattice import Lattice
from tersor.forms.packed import Packed, unpack_stream
from tersor.metrics import Metric

RUNGS = 4  # steps of a ladder to an octave: a quarter of a bit apart
RATES = (0.1, 9.0)  # bits an entry between which a curve is drawn
FINE, COARSE = 4.5, 6.5  # bits an entry above which every other step will do, and every fourth
SMOOTH = 1.0  # bits an entry above which a curve may be interpolated
LARGE = 1 << 14  # entries of a weight whose curve may be interpolated
SPARE = 1.002  # of an interpolated size, so that few fits come out larger
CLOSE = 0.02  # of a promised size: one that is missed by less is met by pricing bits higher
DEARER = 30  # times the share of the bytes that are too many, by which the price is raised for that
DEAREST = 0.5  # price up to which that is tried
COARSENINGS = 32  # steps tried before a promised size is given up
PROBED = 2.5  # bits an entry of the probe: plans lie about there, and damage grows faster than its prediction
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
        if not isinstance(self.step, int | float) or not 0 < self.step < math.inf:
            raise TersorError(f"coded: step is {self.step!r}, but must be a number above zero.")
        if not isinstance(self.trade, int | float) or not 0 <= self.trade <= 1:
            raise TersorError(f"coded: trade is {self.trade!r}, but must lie between 0 and 1.")
        for name in ("stored", "resident"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 0):
                raise TersorError(f"coded: {name} is {value!r}, but must be a number of bytes.")

    @property
    def label(self) -> str:
        return f"coded {self.step:.2g}"


class CodedOperator(PackedOperator):
    """A stream; decoded when first used into packed integers, escapes, and the logarithms of the steps."""

    setting: CodedSetting
    stream: Tensor

    def __init__(self, shape: Shape, setting: CodedSetting) -> None:
        super().__init__(shape, setting)
        stored = setting.stored or 0
        if stored > 1024 + 8 * shape[0] * shape[1]:
            raise TersorError(f"coded: stored is {stored:,}, more than a matrix of {shape[0]} x {shape[1]} can take.")
        self.register_buffer("stream", torch.zeros(stored, dtype=torch.uint8))
        self._packed: Packed | None = None
        self._source: Tensor | None = None  # the stream that was decoded

    @property
    def resident(self) -> int:
        return self.nbytes + (self.setting.resident or 0)

    def unready(self) -> tuple[Callable[..., Any], tuple[Any, ...]] | None:
        if self._packed is not None and self._source is self.stream:
            return None
        return unpack_stream, (self.stream.cpu(), self.shape)

    def adopt(self, made: Packed) -> None:
        self._packed, self._source = made.to(self.stream.device), self.stream

    def forget(self) -> None:
        self._packed = self._source = None

    def packed(self) -> Packed:
        """The integers as they lie in memory, on the device of the stream; decoded where the stream is new."""
        work = self.unready()
        if work is not None:
            if torch.compiler.is_compiling():
                raise TersorError("A coded weight is not decoded yet: run the model once before it is compiled.")
            self.adopt(work[0](*work[1]))
        assert self._packed is not None
        return self._packed

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Moving the stream moves what was made of it."""
        ready = self.unready() is None
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if ready and self._packed is not None:
            self.adopt(self._packed)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Another stream is copied into the place of this one."""
        super()._load_from_state_dict(*args, **kwargs)
        self.forget()

    def decode_rows(self, index: Tensor | None) -> Tensor:
        return self.packed().rows(index)

    def product(self, x: Array) -> Array | None:
        return self.packed().product(x)

    def _product_of_many(self, x: Tensor) -> Tensor:
        rows = max(1, BLOCK // self.shape[1])
        if self._decoded is not None or rows >= self.shape[0]:
            return super()._product_of_many(x)
        packed = self.packed()
        blocks = torch.arange(self.shape[0], device=x.device).split(rows)
        return torch.cat([nn.functional.linear(x, packed.rows(block).to(x.dtype)) for block in blocks], -1)


class CodedForm:
    """Integers at their entropy."""

    name = "coded"
    stores = "integers at their entropy, and an octave's quarter a row and a column"
    wins = "at rest, at nearly every size; decoded at load"

    def settings(self, shape: Shape) -> Iterable[CodedSetting]:
        """Steps for a caller who knows no weight; a curve takes those at which its own has a rate within `RATES`."""
        return (CodedSetting(_step(rung)) for rung in range(-4, -64, -1))

    def setting(self, values: Mapping[str, Any]) -> CodedSetting:
        try:
            return CodedSetting(**values)
        except TypeError as error:
            raise TersorError(
                f"coded: a setting has step, trade, stored and resident, not {sorted(values)}."
            ) from error

    def probe(self, shape: Shape, curve: Sequence[Candidate]) -> CodedSetting | None:
        """Of the settings drawn, the one nearest to `PROBED` bits an entry."""
        bits = 8 / (shape[0] * shape[1])
        near = min(curve, key=lambda c: abs(math.log(bits * c.cost.stored / PROBED)), default=None)
        return None if near is None else CodedSetting(near.setting.step, near.setting.trade)  # type: ignore[attr-defined]

    def empty(self, shape: Shape, setting: CodedSetting) -> CodedOperator:
        return CodedOperator(shape, setting)

    def curve(self, weight: Tensor, metric: Metric, settings: Iterable[CodedSetting] | None = None) -> list[Candidate]:
        """Settings that are given are fitted; of the ladder of a large weight, above a bit, every other one is.

        The rest is interpolated.
        """
        sample = metric.sampled_rows(evenly=True) if settings is None else None
        if sample is not None:
            return self._sampled_curve(weight, sample[0], metric.of_rows(*sample))
        lattice = Lattice.of(weight, metric)

        def candidate(setting: CodedSetting) -> Candidate:
            operator = _fit(lattice, replace(setting, stored=None, resident=None))
            divergence = metric.distance(weight.detach().float() - operator.dense())
            return Candidate(self.name, operator.setting, cost_of(self, operator.shape, operator.setting), divergence)

        if settings is not None:
            return [candidate(setting) for setting in settings]
        found = [
            (rung, rate)
            for rung, rate in lattice.rates(RUNGS, *RATES)
            if rung % (1 if rate < FINE else 2 if rate < COARSE else 4) == 0
        ]
        ladder = [CodedSetting(_step(rung)) for rung, _ in found]
        all_of_it = weight.numel() < LARGE
        fitted = [
            candidate(setting)
            for number, (setting, (_, rate)) in enumerate(zip(ladder, found, strict=True))
            if all_of_it or rate < SMOOTH or number % 2 == 0 or number == len(ladder) - 1
        ]
        return _interpolated(fitted, ladder)

    def _sampled_curve(self, weight: Tensor, index: Tensor, metric: Metric) -> list[Candidate]:
        """The curve of a table from the rows at `index` and their metric, which already counts for all of it."""
        share = len(weight) / len(index)

        def whole(candidate: Candidate) -> Candidate:
            setting: CodedSetting = candidate.setting  # type: ignore[assignment]
            stored, resident = (math.ceil(SPARE * share * (size or 0)) for size in (setting.stored, setting.resident))
            setting = replace(setting, stored=stored, resident=resident)
            cost = cost_of(self, (weight.shape[0], weight.shape[1]), setting)
            return Candidate(self.name, setting, cost, candidate.divergence)

        return [whole(candidate) for candidate in self.curve(weight[index], metric)]

    def fit(self, weight: Tensor, metric: Metric, setting: CodedSetting) -> CodedOperator:
        return _fit(Lattice.of(weight, metric), setting)


def _fit(lattice: Lattice, setting: CodedSetting) -> CodedOperator:
    """Fit a step; a setting that promises a stored size is kept to it, under whatever metric.

    A size that is nearly met is met by pricing bits higher, as steps of rows are quarters of an octave: where rows are
    alike, a larger step changes all of them at once. A size far off takes a larger step.
    """
    for _ in range(COARSENINGS):
        coded = lattice.round(setting.step, setting.trade)
        stream = encode(coded)
        over = 0 if setting.stored is None else len(stream) - setting.stored
        if over <= 0:
            packed = Packed.of(coded)
            complete = replace(setting, stored=len(stream), resident=packed.nbytes)
            operator = CodedOperator((coded.codes.shape[0], coded.codes.shape[1]), complete)
            operator.stream = torch.frombuffer(bytearray(stream), dtype=torch.uint8)
            operator.adopt(packed)
            return operator
        dearer = setting.trade * (1 + max(DEARER * over / len(stream), 1 / 32))
        if over < CLOSE * len(stream) and 0 < dearer <= DEAREST:
            setting = replace(setting, trade=dearer)
        else:
            setting = replace(setting, step=setting.step * 2 ** max(8 * over / coded.codes.size, 1 / 16))
    raise TersorError(f"coded: {setting.stored} bytes are too few for a matrix of this shape.")


def _interpolated(fitted: list[Candidate], ladder: list[CodedSetting]) -> list[Candidate]:
    """Candidates of a whole ladder from those of some of its steps, by splines through logarithms.

    Sizes are rounded up, as a fit keeps to them; memory is that of the next smaller step.
    """
    known: dict[CodedSetting, Candidate] = {c.setting: c for c in fitted}  # type: ignore[misc]
    if len(known) == len(ladder):
        return [known[setting] for setting in ladder]
    steps = sorted(known, key=lambda setting: setting.step)
    at = [math.log(setting.step) for setting in steps]

    def spline(values: list[float]) -> CubicSpline:
        return CubicSpline(at, np.log(np.maximum(values, 1e-300)))

    stored = spline([known[setting].cost.stored for setting in steps])
    divergence = spline([known[setting].divergence for setting in steps])

    def between(setting: CodedSetting) -> Candidate:
        size, damage = (math.exp(float(s(math.log(setting.step)))) for s in (stored, divergence))
        finer = max((s for s in steps if s.step < setting.step), key=lambda s: s.step)
        bytes_stored, bytes_more = math.ceil(SPARE * size), finer.resident or 0
        cost = Cost(bytes_stored, bytes_stored + bytes_more, fitted[0].cost.flops)
        return Candidate(fitted[0].form, replace(setting, stored=bytes_stored, resident=bytes_more), cost, damage)

    return [known[setting] if setting in known else between(setting) for setting in ladder]


def _step(rung: int) -> float:
    return float(2.0 ** (rung / RUNGS))
