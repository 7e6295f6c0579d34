"""The forms, by name. A new form is one file here, one line in `FORMS`, and its tests."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from tersor.errors import TersorError
from tersor.forms.base import (
    Candidate,
    Cost,
    Form,
    Operator,
    Setting,
    Shape,
    as_values,
    cost_of,
    setting_of,
    settings_of,
    stacked,
)
from tersor.forms.coded import CodedForm, CodedSetting
from tersor.forms.integers import IntForm, IntSetting, PortableForm
from tersor.forms.lowrank import LowRankForm, LowRankSetting
from tersor.forms.sparse import SparseForm, SparseSetting
from tersor.forms.sums import SumForm, SumSetting
from tersor.forms.trellis import TrellisForm, TrellisSetting


def _corrections(shape: Shape) -> Iterable[tuple[IntSetting, LowRankSetting]]:
    for bits in (2, 3):
        for rank in (8, 32):
            if rank * sum(shape) * 4 < shape[0] * shape[1]:
                yield IntSetting(bits, 128), LowRankSetting(rank, 8)


def _sparse_corrections(shape: Shape) -> Iterable[tuple[SparseSetting, LowRankSetting]]:
    for density, bits in ((0.125, 4), (0.25, 4), ("2:4", 4), (0.5, 4)):
        for rank in (8, 32):
            if rank * sum(shape) * 4 < shape[0] * shape[1]:
                yield SparseSetting(density, bits=bits), LowRankSetting(rank, 8)


FORMS: dict[str, Form] = {
    form.name: form
    for form in (
        IntForm(),
        CodedForm(),
        TrellisForm(),
        LowRankForm(),
        SumForm(IntForm(), LowRankForm(), _corrections),
        PortableForm(),
        SparseForm(),
        SumForm(SparseForm(), LowRankForm(), _sparse_corrections),
    )
}
USUAL = ("int", "coded", "lowrank", "int+lowrank")  # what a study draws unless forms are named


def form_named(name: str) -> Form:
    """The form of this name; an unknown one is an error that offers the nearest."""
    if name not in FORMS:
        near = difflib.get_close_matches(name, FORMS, 1, 0.0)
        raise TersorError(f"There is no form {name!r}; did you mean {near[0]!r}? The forms are {', '.join(FORMS)}.")
    return FORMS[name]


__all__ = [
    "FORMS",
    "USUAL",
    "Candidate",
    "CodedForm",
    "CodedSetting",
    "Cost",
    "Form",
    "IntForm",
    "IntSetting",
    "LowRankForm",
    "LowRankSetting",
    "Operator",
    "PortableForm",
    "Setting",
    "Shape",
    "SparseForm",
    "SparseSetting",
    "SumForm",
    "SumSetting",
    "TrellisForm",
    "TrellisSetting",
    "as_values",
    "cost_of",
    "form_named",
    "setting_of",
    "settings_of",
    "stacked",
]
