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
from tersor.forms.codebook import CodebookForm, CodebookSetting
from tersor.forms.coded import CodedForm, CodedSetting
from tersor.forms.cp import CPForm, CPSetting
from tersor.forms.dictionary import DictionaryForm, DictionarySetting
from tersor.forms.floats import FloatForm, FloatSetting
from tersor.forms.hashed import HashedForm, HashedSetting
from tersor.forms.integers import IntForm, IntSetting, PortableForm
from tersor.forms.kronecker import KroneckerForm, KroneckerSetting
from tersor.forms.lowrank import LowRankForm, LowRankSetting
from tersor.forms.mixed import MixedForm, MixedSetting
from tersor.forms.rows import RowsForm, RowsSetting
from tersor.forms.shared import SharedForm, SharedSetting
from tersor.forms.sparse import SparseForm, SparseSetting
from tersor.forms.sums import SumForm, SumSetting
from tersor.forms.tensor_train import TensorTrainForm, TensorTrainSetting
from tersor.forms.trellis import TrellisForm, TrellisSetting
from tersor.forms.tucker import TuckerForm, TuckerSetting


def _corrections(shape: Shape) -> Iterable[tuple[IntSetting, LowRankSetting]]:
    for bits in (2, 3):
        for rank in (8, 32):
            if rank * sum(shape) * 4 < shape[0] * shape[1]:
                yield IntSetting(bits, 128, enlarged=True), LowRankSetting(rank, 8)


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
        CodebookForm(),
        LowRankForm(),
        SumForm(IntForm(), LowRankForm(), _corrections, "resident, at two and three bits, on wide weights"),
        KroneckerForm(),
        TensorTrainForm(),
        TuckerForm(),
        CPForm(),
        PortableForm(),
        FloatForm(),
        DictionaryForm(),
        SharedForm(),
        SparseForm(),
        SumForm(SparseForm(), LowRankForm(), _sparse_corrections, "where a pattern is wanted, on wide weights"),
        RowsForm(),
        MixedForm(),
        HashedForm(),
    )
}
USUAL = ("int", "coded", "lowrank", "int+lowrank")  # what a study draws unless forms are named
OF_TABLES = ("rows", "mixed", "hashed")  # which live on how unequally rows are used


def form_named(name: str) -> Form:
    """The form of this name; an unknown one is an error that offers the nearest."""
    if name not in FORMS:
        near = difflib.get_close_matches(name, FORMS, 1, 0.0)
        raise TersorError(f"There is no form {name!r}; did you mean {near[0]!r}? The forms are {', '.join(FORMS)}.")
    return FORMS[name]


__all__ = [
    "FORMS",
    "OF_TABLES",
    "USUAL",
    "CPForm",
    "CPSetting",
    "Candidate",
    "CodebookForm",
    "CodebookSetting",
    "CodedForm",
    "CodedSetting",
    "Cost",
    "DictionaryForm",
    "DictionarySetting",
    "FloatForm",
    "FloatSetting",
    "Form",
    "HashedForm",
    "HashedSetting",
    "IntForm",
    "IntSetting",
    "KroneckerForm",
    "KroneckerSetting",
    "LowRankForm",
    "LowRankSetting",
    "MixedForm",
    "MixedSetting",
    "Operator",
    "PortableForm",
    "RowsForm",
    "RowsSetting",
    "Setting",
    "Shape",
    "SharedForm",
    "SharedSetting",
    "SparseForm",
    "SparseSetting",
    "SumForm",
    "SumSetting",
    "TensorTrainForm",
    "TensorTrainSetting",
    "TrellisForm",
    "TrellisSetting",
    "TuckerForm",
    "TuckerSetting",
    "as_values",
    "cost_of",
    "form_named",
    "setting_of",
    "settings_of",
    "stacked",
]
