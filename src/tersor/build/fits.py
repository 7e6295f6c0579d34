"""Fits: the operators of the choices of a plan, from the run where they were fitted before, else fitted in parallel.

A fit is keyed by its site, form and setting, and stored with the divergence that it has under the site's metric, so no
unit is computed twice for two budgets, nor after a crash.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tersor.build.artifact import empty_operators
from tersor.curves.draw import fit_site, site_metrics
from tersor.engine import map_units
from tersor.foreign import parse_json
from tersor.forms import Operator, as_values, form_named, setting_of, stacked
from tersor.metrics import Metric
from tersor.models.model import Model
from tersor.models.sites import Site
from tersor.plan import UNTOUCHED, Choice
from tersor.run import Run

FEW_WEIGHTS = 3_000_000  # fewer than these are fitted here: starting workers would take longer


@dataclass(frozen=True)
class Fit:
    """The operators of a choice, one a matrix of its site, and the divergence predicted for them without the gain."""

    operators: list[Operator]
    divergence: float

    @property
    def setting(self) -> Any:
        """The setting as the fit completed it."""
        return stacked([operator.setting for operator in self.operators])

    def matrices(self) -> Tensor:
        """The decoded weight (stack, rows, columns)."""
        return torch.stack([operator.dense() for operator in self.operators])


def fits_of(
    run: Run, model: Model, sites: Sequence[Site], choices: Sequence[Choice], workers: int | None = None
) -> Iterator[tuple[Site, Choice]]:
    """Make sure that every choice is fitted; yields (site, choice) as each stands in the run, for `load_fit`."""
    by_name = {site.name: site for site in sites}
    wanted = {c.site: c for c in choices if c.form != UNTOUCHED}
    missing = [c for c in wanted.values() if not run.has_tensors(_file(c))]
    for choice in wanted.values():
        if choice not in missing:
            yield by_name[choice.site], choice

    def units() -> Iterator[tuple[str, Callable[[], tuple[Any, ...]]]]:
        for choice in sorted(missing, key=lambda c: -by_name[c.site].parameters):
            yield choice.site, partial(_arguments, run, model, by_name[choice.site], choice)

    few = sum(by_name[c.site].parameters for c in missing) < FEW_WEIGHTS
    for name, tensors in map_units(fit_unit, units(), 1 if few else workers):
        run.put_tensors(_file(wanted[name]), tensors)
        yield by_name[name], wanted[name]


def stored_fit(run: Run, choice: Choice) -> dict[str, Tensor]:
    """The tensors of a fit that stands in the run: those of operator `k` of its stack as `k|name`."""
    return run.tensors(_file(choice))


def load_fit(run: Run, site: Site, choice: Choice) -> Fit:
    """The fit of a choice that stands in the run."""
    stored = stored_fit(run, choice)
    with run.reading(_file(choice)):
        values = parse_json(bytes(stored["setting"].tolist()), f"The setting of {choice.site}")
        operators = empty_operators(site.name, site, choice.form, values)
        for number, operator in enumerate(operators):
            operator.load_state_dict({k.split("|")[1]: v for k, v in stored.items() if k.startswith(f"{number}|")})
        return Fit(operators, float(stored["divergence"]))


def fit_choice(weights: Tensor, metrics: list[Metric], choice: Choice) -> Fit:
    """Fit a choice now, under given metrics."""
    form = form_named(choice.form)
    fit = Fit(fit_site(form, weights, metrics, setting_of(form, choice.setting)), 0.0)
    distances = (m.distance(w - r) for m, w, r in zip(metrics, weights, fit.matrices(), strict=True))
    return Fit(fit.operators, sum(distances))


def fit_unit(weights: Tensor, metrics: list[Metric], choice: Choice) -> dict[str, Tensor]:
    """The unit of work: a fit as tensors to be stored."""
    fit = fit_choice(weights, metrics, choice)
    tensors = {f"{i}|{k}": v for i, operator in enumerate(fit.operators) for k, v in operator.state_dict().items()}
    setting = json.dumps(as_values(fit.setting)).encode()
    tensors["setting"] = torch.tensor(list(setting), dtype=torch.uint8)
    return {**tensors, "divergence": torch.tensor(fit.divergence, dtype=torch.float64)}


def _arguments(run: Run, model: Model, site: Site, choice: Choice) -> tuple[Any, ...]:
    return site.matrices(model.module).cpu(), site_metrics(run, site), choice


def _file(choice: Choice) -> str:
    named = json.dumps([choice.site, choice.form, choice.setting], sort_keys=True)
    return f"fits/{hashlib.sha256(named.encode()).hexdigest()[:24]}"
