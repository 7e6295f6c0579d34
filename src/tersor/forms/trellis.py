"""The form `trellis`: a fixed number of bits for every entry, close to the limit, and read where it lies in memory.

The matrix is rotated, so that it looks Gaussian, and rounded along its diagonals with two-sided feedback (P147): a
search finds the bits of a whole diagonal at once (after QTIP, Tseng et al. 2024). An entry takes as many bits as its
row and column ask for under the metric: bits go where they matter, as with entropy coding, with nothing to decode.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from scipy.interpolate import CubicSpline
from torch import Tensor, nn

from tersor.coding.trellis import MOST_BITS, Trellis, stored_bytes
from tersor.errors import TersorError
from tersor.forms.base import Candidate, Operator, Shape, cost_of
from tersor.forms.rotation import rotate, rotate_back, turned_back
from tersor.forms.trellis_fit import Coder, code_bytes, frees_rows
from tersor.forms.trellis_read import Reader, parsed, reader_bytes
from tersor.metrics import Metric

LADDER = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0, 2.25, 2.5, 3.0, 3.5, 4.0)
DRAWN = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0)  # of the ladder of a large weight, the rest is interpolated
LARGE = 1 << 14  # entries of a weight whose curve may be interpolated
TRUE = (1.0, 3.0)  # bits of the ladder that are fitted
PROBED = 3.0  # bits an entry of the probe


@dataclass(frozen=True)
class TrellisSetting:
    """`bits` an entry, whether the matrix is rotated, and whether its values are enlarged until the error is orthogonal
    to the weight; a fit fills in whether its rows may be read alone."""

    bits: float
    rotate: bool = True
    enlarged: bool = True
    free_rows: bool = field(default=False, compare=False)

    def __post_init__(self) -> None:
        if isinstance(self.bits, bool) or not isinstance(self.bits, int | float) or not 0 < self.bits <= MOST_BITS:
            raise TersorError(f"trellis: bits is {self.bits!r}, but must lie above 0 and at most {MOST_BITS}.")
        if not all(isinstance(v, bool) for v in (self.rotate, self.enlarged, self.free_rows)):
            raise TersorError("trellis: rotate, enlarged and free_rows must be true or false.")

    @property
    def label(self) -> str:
        return f"trellis {self.bits:g} bits" + ("" if self.rotate else ", not rotated")


class TrellisOperator(Operator):
    """A stream that is read where it lies; sides and where rows begin are made from it when it is first used."""

    setting: TrellisSetting
    stream: Tensor

    def __init__(self, shape: Shape, setting: TrellisSetting) -> None:
        super().__init__(shape, setting)
        size = stored_bytes(shape, code_bytes(shape, setting.bits))
        self.register_buffer("stream", torch.zeros(size, dtype=torch.uint8))
        self._reader: Reader | None = None
        self._source: Tensor | None = None  # the stream of the reader

    @property
    def resident(self) -> int:
        return self.nbytes + reader_bytes(self.shape, self.nbytes, self.setting.free_rows)

    def unready(self) -> tuple[Callable[..., Any], tuple[Any, ...]] | None:
        if self._reader is not None and self._source is self.stream:
            return None
        return parsed, (self.stream.cpu(), self.shape)

    def adopt(self, made: Trellis) -> None:
        self._reader, self._source = Reader(made, self.stream), self.stream

    def forget(self) -> None:
        self._reader = self._source = None

    @property
    def reader(self) -> Reader:
        work = self.unready()
        if work is not None:
            self.adopt(work[0](*work[1]))
        assert self._reader is not None
        return self._reader

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Another stream is copied into the place of this one."""
        super()._load_from_state_dict(*args, **kwargs)
        self.forget()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def read(self, index: Tensor | None = None) -> tuple[Tensor, bool, bool]:
        """The matrix as it was coded, or some of its rows, and whether its rows and columns are rotated."""
        return self.reader.rows(index), *self.reader.rotated

    def decode(self) -> Tensor:
        matrix, *rotated = self.read()
        return turned_back(matrix, *rotated)

    def take(self, index: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        if self._decoded is not None or not self.setting.free_rows:
            return super().take(index, dtype)
        rows, _, of_columns = self.read(index.reshape(-1))
        rows = turned_back(rows, False, of_columns)
        return rows.reshape(*index.shape, self.shape[1]).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Vectors are rotated, not the matrix."""
        if self._decoded is not None:
            return super().forward(x)
        matrix, of_rows, of_columns = self.read()
        y = nn.functional.linear(rotate(x) if of_columns else x, matrix.to(x.dtype))
        return rotate_back(y) if of_rows else y


class TrellisForm:
    """Trellis-coded weights of a fixed size."""

    name = "trellis"
    stores = "a fixed number of bits an entry, each window of 12 a value"
    wins = "resident, below four bits; slow to fit"

    def settings(self, shape: Shape) -> Iterable[TrellisSetting]:
        whole = 4 * shape[0] * shape[1]
        for bits in LADDER:
            if stored_bytes(shape, code_bytes(shape, bits)) < whole:
                yield TrellisSetting(bits)

    def setting(self, values: Mapping[str, Any]) -> TrellisSetting:
        try:
            return TrellisSetting(**values)
        except TypeError as error:
            raise TersorError(
                f"trellis: a setting has bits, rotate, enlarged and free_rows, not {sorted(values)}."
            ) from error

    def probe(self, shape: Shape, curve: Sequence[Candidate]) -> TrellisSetting:
        return TrellisSetting(PROBED)

    def empty(self, shape: Shape, setting: TrellisSetting) -> TrellisOperator:
        return TrellisOperator(shape, setting)

    def curve(
        self, weight: Tensor, metric: Metric, settings: Iterable[TrellisSetting] | None = None
    ) -> list[Candidate]:
        """Settings that are given are fitted. The ladder is estimated by a quicker search, some of it interpolated, and
        where rows are many and do not feel one another from some of them."""
        shape = (weight.shape[0], weight.shape[1])
        if settings is not None:
            operators = [(s, self.fit(weight, metric, s)) for s in settings]
            found = {s: metric.distance(weight.detach().float() - op.dense()) for s, op in operators}
        else:
            some = metric.sampled_rows()
            if some is None:
                coder = Coder(weight, metric, True)
            else:
                coder = Coder(weight[some[0]], metric.of_rows(*some), True, counts=some[1])
            found = _estimated(coder, list(self.settings(shape)))
        free = frees_rows(metric)
        complete = {s: replace(s, free_rows=free) for s in found}
        return [Candidate(self.name, complete[s], cost_of(self, shape, complete[s]), d) for s, d in found.items()]

    def fit(self, weight: Tensor, metric: Metric, setting: TrellisSetting) -> TrellisOperator:
        _, trellis = Coder(weight, metric, setting.rotate, setting.enlarged).coded(setting.bits)
        operator = TrellisOperator(trellis.shape, replace(setting, free_rows=trellis.free_rows))
        operator.stream = torch.frombuffer(bytearray(trellis.to_bytes()), dtype=torch.uint8)
        return operator


def _estimated(coder: Coder, ladder: list[TrellisSetting]) -> dict[TrellisSetting, float]:
    """The divergences of a ladder by quick walks, from the most bits to the fewest.

    Of a large weight some rungs are interpolated, by a spline through logarithms. `TRUE` rungs are fitted, and what
    they are worse than their quick walks the others are taken to be.
    """
    known, worse = dict[float, float](), dict[float, float]()
    for bits in sorted({s.bits for s in ladder if coder.weight.numel() < LARGE or s.bits in DRAWN}, reverse=True):
        known[bits] = math.log(max(coder.expected(bits)[0], 1e-300))
        if bits in TRUE:
            worse[bits] = math.log(max(coder.coded(bits)[0], 1e-300)) - known[bits]
    at = sorted(known)
    spline = (
        CubicSpline(at, [known[bits] for bits in at])
        if len(at) > 3
        else partial(np.interp, xp=at, fp=[*map(known.get, at)])
    )

    def divergence(bits: float) -> float:
        more = float(np.interp(bits, sorted(worse), [worse[b] for b in sorted(worse)])) if worse else 0.0
        return math.exp(float(spline(bits)) + more)

    return {setting: divergence(setting.bits) for setting in ladder}
