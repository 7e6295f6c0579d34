"""Rows that are kept as they are: 16-bit floats, or integers with a scale a row. The forms of tables store them so."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tersor.errors import TersorError
from tersor.forms.base import Operator, Shape
from tersor.forms.integers import IntForm, IntOperator, IntSetting
from tersor.forms.packing import PLANES
from tersor.forms.products import HalfOperator
from tersor.metrics import Metric

BITS = (None, *(bits for bits in PLANES if bits > 1))  # None: 16-bit floats


def check_share_and_bits(form: str, share: Any, bits: Any) -> None:
    """Raise TersorError, naming the form, for a share that is none, or bits that rows cannot be kept in."""
    if not isinstance(share, int | float) or not 0 < share <= 1:
        raise TersorError(f"{form}: share is {share!r}, but must be above 0 and at most 1.")
    if bits not in BITS:
        raise TersorError(f"{form}: bits is {bits!r}, but must be one of {BITS}.")


def empty_rows(shape: Shape, bits: int | None) -> Operator:
    """Rows of a shape without data."""
    return HalfOperator(shape) if bits is None else IntOperator(shape, _integers(bits))


def stored_rows(rows: Tensor, metric: Metric, bits: int | None) -> Operator:
    """Float32 rows as they are stored; integers are fitted under their metric."""
    return HalfOperator.of(rows) if bits is None else IntForm().fit(rows, metric, _integers(bits))


def _integers(bits: int) -> IntSetting:
    return IntSetting(bits, None, symmetric=True)
