"""Cutting a built model to a budget as it is loaded: ranks of its low-rank weights and corrections, the least first.

A fit of a rank holds the fits of all smaller ranks (`forms/lowrank.py`), alone or as the second term of a sum. The
artifact keeps, for each such site, what every cut is predicted to add; ranks are cut at equal slopes of damage over
bytes until the weights file would fit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tersor.build.fits import Fit
from tersor.build.layers import operators_at
from tersor.curves.draw import site_metrics
from tersor.errors import TersorError, UnreachableBudget
from tersor.forms import LowRankSetting, Operator, as_values, cost_of, form_named, stacked
from tersor.forms.lowrank import cut, low_rank_part, ranks_within, tails
from tersor.forms.products import ProductOperator
from tersor.models.files import file_bytes, open_checkpoint
from tersor.models.sites import Site
from tersor.plan import Choice
from tersor.plan.budget import is_latency, parse_bytes
from tersor.run import Run

FORM = "lowrank"
DIGITS = 4  # of the damages in tersor.json, which are predictions


def damages_of(run: Run, sites: Sequence[Site], choices: Sequence[Choice], fits: Mapping[str, Fit]) -> dict[str, Any]:
    """For `tersor.json`: by site with a rank, what a cut to each from 0 up is predicted to add, with the gain."""
    by_name = {site.name: site for site in sites}
    found = {}
    for choice in choices:
        if FORM in choice.form.split("+"):  # the fits of others are not read
            metrics, parts = site_metrics(run, by_name[choice.site]), _parts(fits[choice.site].operators)
            added = torch.stack([tails(part, m) for part, m in zip(parts, metrics, strict=True)]).sum(0)
            gains = run.gains(choice.site)
            found[choice.site] = [float(f"{d * gains.of(choice.form, d):.{DIGITS}g}") for d in added.tolist()]
    return found


@dataclass(frozen=True)
class _Step:
    """Cutting a site to a rank, from the rank of its step before: damage a byte."""

    slope: float
    site: str
    rank: int


def cut_to(module: nn.Module, folder: Path, record: Mapping[str, Any], budget: str) -> dict[str, int]:
    """Cut the low-rank weights of a loaded module, in place, until its file would take no more than `budget`.

    Returns the new rank of every site that was cut. A share is of the original's bytes. Raises TersorError where the
    artifact has nothing to cut, UnreachableBudget where the budget is below what all of it at rank 1 would take.
    """
    if budget.strip().lower().endswith("bits") or is_latency(budget):
        raise TersorError(f"A model is cut to a size as it is loaded, such as 20% or 5MB, not to {budget!r}.")
    limit = parse_bytes(budget, record["model"]["stored_bytes"])
    whole = record["weights_bytes"]
    if whole <= limit:
        return {}
    damages = record.get("cuts", {})
    if not damages:
        raise TersorError(
            f"{folder} takes {whole:,} bytes, more than {budget}, and has no weight of the form {FORM!r}, alone or in "
            "a sum, that could be cut as it is loaded; build it anew for this budget."
        )
    operators = {name: _operators(module, record["sites"][name]) for name in damages}
    parts = {name: _parts(ops) for name, ops in operators.items()}
    steps = sorted((s for name, made in parts.items() for s in _steps(name, made[0], damages[name])), key=_by_slope)
    stored = open_checkpoint(folder).entries
    entries = {name: (shape, dtype) for name, (_, shape, dtype) in stored.items() if dtype is not None}
    prefixes = {name: _prefixes(module, made) for name, made in parts.items()}

    def size(count: int) -> int:
        """The file's bytes after so many steps."""
        replaced = dict(entries)
        for name, rank in {step.site: step.rank for step in steps[:count]}.items():
            for prefix, part in zip(prefixes[name], parts[name], strict=True):
                replaced |= {f"{prefix}.{k}": v for k, v in _entries(part, rank).items()}
        return file_bytes((name, shape, dtype) for name, (shape, dtype) in replaced.items())

    least = size(len(steps))
    if least > limit:
        raise UnreachableBudget(
            f"{folder} cannot be cut to {budget} ({limit:,} bytes): with all of its low-rank weights at rank 1 it "
            f"takes {least:,} bytes, {least / record['model']['stored_bytes']:.1%} of the original."
        )
    low, high = 0, len(steps)  # size(low) is too large, size(high) is not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if size(middle) > limit else (low, middle)
    ranks = {step.site: step.rank for step in steps[:high]}
    for name, rank in ranks.items():
        for operator in operators[name]:
            cut(operator, rank)
    _tell(module, {name: stacked([op.setting for op in operators[name]]) for name in ranks})
    return ranks


def _by_slope(step: _Step) -> tuple[float, str, int]:
    return step.slope, step.site, -step.rank


def _steps(name: str, operator: ProductOperator, damages: Sequence[float]) -> list[_Step]:
    """The steps down the lower hull of damage over bytes of one site, slopes rising."""
    setting: LowRankSetting = operator.setting
    ranks = ranks_within(setting)[::-1]
    form = form_named(FORM)
    sizes = [cost_of(form, operator.shape, LowRankSetting(rank, setting.bits)).stored for rank in ranks]
    hull = [0]
    for k in range(1, len(ranks)):
        while len(hull) > 1 and _slope(hull[-2], hull[-1], ranks, sizes, damages) >= _slope(
            hull[-1], k, ranks, sizes, damages
        ):
            hull.pop()
        hull.append(k)
    return [_Step(_slope(a, b, ranks, sizes, damages), name, ranks[b]) for a, b in pairwise(hull)]


def _slope(a: int, b: int, ranks: Sequence[int], sizes: Sequence[int], damages: Sequence[float]) -> float:
    return (damages[ranks[b]] - damages[ranks[a]]) / max(1, sizes[a] - sizes[b])


def _entries(operator: ProductOperator, rank: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of the tensors of an operator cut to a rank, by their names in it."""
    with torch.device("meta"):
        empty = form_named(FORM).empty(operator.shape, LowRankSetting(rank, operator.setting.bits))
    return {name: (tuple(t.shape), t.dtype) for name, t in empty.state_dict().items()}


def _operators(module: nn.Module, site: Mapping[str, Any]) -> list[Operator]:
    place, parameter = site["places"][0]
    return operators_at(module, place, parameter)


def _parts(operators: Sequence[Operator]) -> list[ProductOperator]:
    return [part for operator in operators if (part := low_rank_part(operator)) is not None]


def _prefixes(module: nn.Module, operators: Sequence[Operator]) -> list[str]:
    """The names of operators within a module."""
    known = {id(child): name for name, child in module.named_modules()}
    return [known[id(operator)] for operator in operators]


def _tell(module: nn.Module, settings: Mapping[str, Any]) -> None:
    """Have the config of a module of transformers say the new settings, so that it saves as what it is."""
    config = getattr(getattr(module, "config", None), "quantization_config", None)
    if config is not None:
        for name, setting in settings.items():
            config.sites[name]["setting"] = as_values(setting)
