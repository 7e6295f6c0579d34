"""A method: what a paper does, said in Tersor's words, and the reader of `methods.toml`, where all of them stand.

A row names a form, the settings of it that the paper would try, the metric it fits under, and how it spends a budget.
Everything is checked when a row is read, so a method that exists can be run.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from importlib.resources import files
from itertools import product
from typing import Any

from tersor.build.activations import Activations
from tersor.errors import TersorError
from tersor.forms import form_named
from tersor.metrics import KINDS

ALLOCATIONS = {
    "uniform": "the same setting at every site",
    "share": "the same share of its bytes for every site",
    "front": "the planner's choice for every site",
}
_PAPER = re.compile(r"P\d{3}|arXiv:\d{4}\.\d{5}")


@dataclass(frozen=True)
class Method:
    """A published recipe. `papers` are ids (P041, or arXiv:2210.17323 where there is none), `title` the paper's.

    In `settings` a list stands for several values, and all combinations are the ladder; none at all is the form's own
    ladder. Under the allocation `uniform` the fields named in `per_site` are still chosen site by site. `activations`
    says how the inputs of layers are rounded beside their weights, as in `int8,tensor`; they are not where it is empty.
    """

    name: str
    papers: tuple[str, ...]
    title: str
    form: str
    metric: str
    allocation: str
    claim: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    per_site: tuple[str, ...] = ()
    activations: str = ""
    recovery: str = "none"
    note: str = ""

    def __post_init__(self) -> None:
        """Raises TersorError, naming the method and what is wrong with it."""
        form = form_named(self.form)
        _one_of(self.metric, KINDS, f"the method {self.name!r}: metric")
        _one_of(self.allocation, ALLOCATIONS, f"the method {self.name!r}: allocation")
        _one_of(self.recovery, ("none",), f"the method {self.name!r}: recovery")
        for paper in self.papers:
            if not _PAPER.fullmatch(paper):
                raise TersorError(f"The method {self.name!r} cites {paper!r}; write P041 or arXiv:2210.17323.")
        if not self.title or not self.claim:
            raise TersorError(f"The method {self.name!r} needs the title of its paper and its claim.")
        if self.allocation == "uniform" and not self.settings:
            raise TersorError(f"The method {self.name!r} is uniform, so it must name its settings.")
        for name in self.per_site:
            _one_of(name, self.settings, f"the method {self.name!r}: per_site")
        if self.activations:
            Activations.of(self.activations)
        for values in self.ladder():
            try:
                form.setting(values)
            except (TypeError, TersorError) as error:
                raise TersorError(f"The method {self.name!r} has no good setting of {self.form}: {error}") from error

    def ladder(self) -> list[dict[str, Any]]:
        """All combinations of the settings, as plain values."""
        return _combinations(self.settings) if self.settings else []

    def levels(self) -> list[list[dict[str, Any]]]:
        """The ladder in groups that differ in the `per_site` fields alone."""
        groups: dict[str, list[dict[str, Any]]] = {}
        for values in self.ladder():
            groups.setdefault(repr({k: v for k, v in values.items() if k not in self.per_site}), []).append(values)
        return list(groups.values())


def read_methods(text: str) -> dict[str, Method]:
    """The methods of a TOML text by name; raises TersorError for a row that says too much, too little or nonsense."""
    try:
        rows = tomllib.loads(text).get("method", [])
    except tomllib.TOMLDecodeError as error:
        raise TersorError(f"The methods are not valid TOML: {error}.") from error
    methods: dict[str, Method] = {}
    known = [f.name for f in fields(Method)]
    for number, row in enumerate(rows, 1):
        for key in row:
            _one_of(key, known, f"method {row.get('name', number)!r}: the key")
        values: dict[str, Any] = {k: tuple(v) if k in ("papers", "per_site") else v for k, v in row.items()}
        try:
            method = Method(**values)
        except TypeError as error:
            raise TersorError(f"The method {row.get('name', number)!r} is incomplete: {error}.") from error
        if method.name in methods:
            raise TersorError(f"There are two methods named {method.name!r}.")
        methods[method.name] = method
    return methods


def method_named(name: str) -> Method:
    """The method of this name; an unknown one is an error that offers the nearest."""
    if name not in METHODS:
        near = _nearest(name, METHODS)
        raise TersorError(f"There is no method {name!r}; did you mean {near!r}? The methods are {', '.join(METHODS)}.")
    return METHODS[name]


def _combinations(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    options = [_combinations(v) if isinstance(v, dict) else v if isinstance(v, list) else [v] for v in values.values()]
    return [dict(zip(values, chosen, strict=True)) for chosen in product(*options)]


def _one_of(value: str, allowed: Iterable[str], what: str) -> None:
    allowed = list(allowed)
    if value not in allowed:
        near = _nearest(value, allowed)
        raise TersorError(f"In {what} is {value!r}; did you mean {near!r}? It must be one of {', '.join(allowed)}.")


def _nearest(name: str, names: Iterable[str]) -> str:
    return difflib.get_close_matches(name, list(names), 1, 0.0)[0]


METHODS: Mapping[str, Method] = read_methods(files("tersor.methods").joinpath("methods.toml").read_text("utf8"))
