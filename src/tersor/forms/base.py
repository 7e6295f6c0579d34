"""The contract of a form: a family of cheap operators, its settings, their exact cost, and how one is fitted.

A form knows weights and metrics, never models. A setting is a frozen dataclass; an operator is an `nn.Module` whose
buffers are integers or bit patterns, so that moving a model or changing its dtype never changes what is stored. Where
sizes depend on the weight, as those of entropy-coded integers do, a fit completes the setting with them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from functools import cache
from types import UnionType
from typing import Any, Protocol, Union, get_args, get_origin, get_type_hints

import numpy as np
import torch
from torch import Tensor, nn

from tersor.errors import TersorError
from tersor.foreign import understood
from tersor.forms.packing import in_reach
from tersor.metrics import Metric

FEW = 4  # positions for which a product reads a weight as it is stored: for more it is decoded once
Shape = tuple[int, int]
Convolution = Callable[[Tensor, Tensor], Tensor]
Array = np.ndarray[Any, Any]


class Setting(Protocol):
    """A frozen dataclass of plain values; `label` is how it is printed."""

    @property
    def label(self) -> str: ...


@dataclass(frozen=True)
class Cost:
    """What one operator costs: bytes in the file, bytes in memory, FLOPs for one position."""

    stored: int
    resident: int
    flops: int


@dataclass(frozen=True)
class Candidate:
    """One form with one setting at one site: its cost and the divergence predicted for it, in nats."""

    form: str
    setting: Setting
    cost: Cost
    divergence: float


class Operator(nn.Module):
    """A cheap matrix (rows, columns). Subclasses fill `_buffers` and say how to decode them."""

    shape: Shape
    setting: Any
    __call__: Callable[..., Tensor]

    def __init__(self, shape: Shape, setting: Setting) -> None:
        super().__init__()
        self.shape, self.setting = shape, setting
        self._decoded: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors that are stored."""
        return sum(b.numel() * b.element_size() for b in self.state_dict().values())

    @property
    def resident(self) -> int:
        """Bytes in memory, ready to run."""
        return self.nbytes

    @property
    def flops(self) -> int:
        """Multiplications and additions of one matrix-vector product."""
        return 2 * self.shape[0] * self.shape[1]

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix (rows, columns) itself."""
        if self._decoded is not None:
            return self._decoded.to(dtype)
        return self.decode().to(dtype)

    def unready(self) -> tuple[Callable[..., Any], tuple[Any, ...]] | None:
        """A pure function and its arguments, the result of which `adopt` wants before it runs; None where it is ready.

        An operator that is used before makes itself ready; this is for doing it at load time, many at once.
        """
        return None

    def adopt(self, made: Any) -> None:
        """Take what the function of `unready` made."""

    def forget(self) -> None:
        """Let go of what `adopt` took."""

    def decode(self) -> Tensor:
        """The matrix (rows, columns) in float32, made from the buffers."""
        raise TypeError(f"{type(self).__name__} does not say how it is decoded")

    def forward(self, x: Tensor) -> Tensor:
        """`x W^T` for `x` (..., columns)."""
        return nn.functional.linear(x, self.dense(x.dtype))

    def take(self, index: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """The rows at `index` (...), as (..., columns)."""
        return nn.functional.embedding(index, self.dense(dtype))

    def convolve(self, x: Tensor, convolution: Convolution) -> Tensor:
        """`convolution(x, W)` where `convolution` unfolds a matrix to a kernel; factors may do it in two steps."""
        return convolution(x, self.dense(x.dtype))


class RowOperator(Operator):
    """An operator whose rows can be decoded alone, so that a look-up costs no more than it takes."""

    def decode_rows(self, index: Tensor | None) -> Tensor:
        """The rows at `index` (n,), or all of them, as (n, columns) in float32."""
        raise TypeError(f"{type(self).__name__} does not say how its rows are decoded")

    def decode(self) -> Tensor:
        return self.decode_rows(None)

    def take(self, index: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        if self._decoded is not None:
            return super().take(index, dtype)
        rows = self.decode_rows(index.reshape(-1))
        return rows.reshape(*index.shape, self.shape[1]).to(dtype)


class PackedOperator(RowOperator):
    """A row operator that multiplies few positions as it lies in memory, with a row at a time in the cache."""

    def product(self, x: Array) -> Array | None:
        """`x W^T` (positions, rows) for `x` (positions, columns), float32; None where no compiled loop can read."""
        raise TypeError(f"{type(self).__name__} does not say how it is multiplied")

    def forward(self, x: Tensor) -> Tensor:
        y = self._product_of_few(x)
        return self._product_of_many(x) if y is None else y

    def _product_of_few(self, x: Tensor) -> Tensor | None:
        """`x W^T` without decoding, for few positions that need no gradient on a CPU; None where that is not to be."""
        if self._decoded is not None or x.numel() > FEW * self.shape[1] or not in_reach(x):
            return None
        if x.requires_grad:
            if torch.is_grad_enabled():
                return None
            x = x.detach()
        values = (x if x.dtype == torch.float32 else x.float()).numpy()
        product = self.product(np.ascontiguousarray(values.reshape(-1, self.shape[1])))
        if product is None:
            return None
        return torch.from_numpy(product.reshape(*values.shape[:-1], self.shape[0])).to(x.dtype)

    def _product_of_many(self, x: Tensor) -> Tensor:
        """`x W^T` by decoding the matrix."""
        return super().forward(x)


class Form(Protocol):
    """A family of cheap operators. One file in `forms/`, one line in the registry.

    `curve` and `fit` give settings that are complete: from one, `empty` makes an operator of exactly the fitted sizes.
    `stores` and `wins` say in a few words what lies in the file, and where the form is worth choosing.
    """

    name: str
    stores: str
    wins: str

    def settings(self, shape: Shape) -> Iterable[Any]: ...

    def setting(self, values: Mapping[str, Any]) -> Any: ...

    def probe(self, shape: Shape, curve: Sequence[Candidate]) -> Any | None:
        """The setting that is measured at a site to scale the predictions of this form; None borrows that of `int`.

        `curve` has what was drawn of the form there, which may be nothing.
        """
        ...

    def empty(self, shape: Shape, setting: Any) -> Operator: ...

    def curve(self, weight: Tensor, metric: Metric, settings: Iterable[Any] | None = None) -> list[Candidate]: ...

    def fit(self, weight: Tensor, metric: Metric, setting: Any) -> Operator: ...


def cost_of(form: Form, shape: Shape, setting: Any) -> Cost:
    """The exact cost of a complete setting, read off an operator without data."""
    with torch.device("meta"):
        operator = form.empty(shape, setting)
    return Cost(operator.nbytes, operator.resident, operator.flops)


def fitted_candidate(form: Form, weight: Tensor, metric: Metric, setting: Any) -> tuple[Operator, Candidate]:
    """Fit a setting and say exactly what it does under the metric."""
    operator = form.fit(weight, metric, setting)
    divergence = metric.distance(weight.float() - operator.dense())
    cost = cost_of(form, operator.shape, operator.setting)
    return operator, Candidate(form.name, operator.setting, cost, divergence)


@dataclass(frozen=True)
class Stacked:
    """The settings of the matrices of a stack, where fits completed one setting in several ways."""

    stack: tuple[Any, ...]

    @property
    def label(self) -> str:
        return str(self.stack[0].label)


def stacked(settings: Sequence[Any]) -> Any:
    """The settings of the matrices of a stack as one."""
    alike = all(as_values(s) == as_values(settings[0]) for s in settings)
    return settings[0] if alike else Stacked(tuple(settings))


def setting_of(form: Form, values: Mapping[str, Any]) -> Any:
    """The setting, or the settings of a stack, of plain values; raises TersorError where they are none."""
    with understood(f"The setting of {form.name}"):
        if "stack" in values:
            return Stacked(tuple(setting_of(form, v) for v in values["stack"]))
        setting = form.setting(values)
        _check_types(form.name, setting)
    return setting


def _check_types(name: str, setting: Any) -> None:
    """Raise TersorError for the first field of a setting whose value is not of the type it is declared with."""
    for field, hint in _hints_of(setting.__class__).items():
        value = getattr(setting, field)
        if not _is_of(value, hint):
            raise TersorError(f"{name}: {field} is {value!r}, which is not of its type.")
        if is_dataclass(value):
            _check_types(name, value)


@cache  # every candidate that is read from a run is checked
def _hints_of(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _is_of(value: Any, hint: Any) -> bool:
    if get_origin(hint) in (Union, UnionType):
        return any(_is_of(value, one) for one in get_args(hint))
    if get_origin(hint) is tuple:
        due = get_args(hint)
        right = isinstance(value, tuple) and (due[-1] is ... or len(due) == len(value))
        return right and all(_is_of(v, due[0]) for v in value)
    if hint is float:
        return type(value) in (int, float) and math.isfinite(value)
    return hint is Any or type(value) is hint


def settings_of(setting: Any, count: int) -> list[Any]:
    """The setting of every matrix of a stack of `count`."""
    return list(setting.stack) if isinstance(setting, Stacked) else [setting] * count


def as_values(setting: Any) -> dict[str, Any]:
    """A setting as plain values for JSON."""
    return asdict(setting)


def bits_of(values: Tensor) -> Tensor:
    """Float16 values as the int16 bit patterns that are stored: casts of a model's dtype leave them alone."""
    return values.clamp(-65504, 65504).to(torch.float16).view(torch.int16)


def from_bits(stored: Tensor) -> Tensor:
    """The float32 values of stored float16 bit patterns."""
    return stored.view(torch.float16).float()
