"""Running a method: `compress` with the method's form, settings and metric, and its own way of spending the budget.

`front` is the planner's plan over the method's candidates. `uniform` and `share` give every site the same, and take of
all such plans within the limits the one of least predicted divergence, which on a ladder of one field is the largest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from tersor.data import Data
from tersor.errors import TersorError, UnreachableBudget
from tersor.forms import form_named, settings_of
from tersor.methods.method import Method, method_named
from tersor.models import Model
from tersor.plan import Limits, Option, Plan, Planner, Solution
from tersor.steps import Result, Study, compress

FIXED = ("forms", "metric", "settings", "choose")
UNDAMPED = {"inputs": 0.0, "gradients": 0.0, "frequencies": 0.0}


def run_method(
    name: str | Method,
    model: str | Path | nn.Module | Model,
    data: str | Path | Data | Sequence[Any],
    budget: str | None = None,
    out: str | Path = "compressed",
    **options: Any,
) -> Result:
    """Compress by a published method, given by name or as a `Method`; options are those of `tersor.compress`.

    Raises TersorError for an unknown method and for options that the method itself decides.
    """
    method = method_named(name) if isinstance(name, str) else name
    for option in FIXED:
        if options.pop(option, None) is not None:
            raise TersorError(f"The method {method.name!r} decides its {option} itself; leave that option out.")
    if method.activations:
        if options.get("activations") is not None:
            raise TersorError(f"The method {method.name!r} decides its activations itself; leave that option out.")
        options["activations"] = method.activations
    if method.metric == "identity" and options.get("damping") is None:
        options["damping"] = UNDAMPED  # to a multiple of the identity, damping does nothing
    return compress(
        model,
        data,
        budget,
        out,
        forms=(method.form,),
        metric=method.metric,
        settings={method.form: method.ladder()} if method.settings else None,
        choose=partial(_choose, method),
        **options,
    )


def allocate(method: Method, planner: Planner, limits: Limits) -> Plan:
    """The plan of a method within the limits, from the candidates of a study of its form and settings.

    Raises UnreachableBudget, naming the smallest plan of the method.
    """
    label = ",".join([method.name, *(f"{k}={v}" for k, v in asdict(limits).items() if v is not None)])
    if method.allocation == "front":
        return planner.plan(limits, label)
    solutions = list(_uniform(method, planner) if method.allocation == "uniform" else _equal_shares(planner))
    within = [s for s in solutions if _fits(planner, limits, s)]
    if not within:
        least = min(s.total("stored") for s in solutions)
        bits = 8 * least / sum(site.parameters for site in planner.sites)
        raise UnreachableBudget(
            f"The budget is out of reach for the method {method.name}: its smallest plan takes "
            f"{int(least) + planner.fixed_bytes:,} bytes ({bits:.2f} bits a weight)."
        )
    first, then = ("divergence", "stored") if limits.divergence is None else ("stored", "divergence")
    best = min(within, key=lambda s: (s.total(first), s.total(then)))
    return replace(planner.plan_of(best, label), limits={k: v for k, v in asdict(limits).items() if v is not None})


def _choose(method: Method, study: Study, limits: Limits) -> Plan:
    plan = allocate(method, study.planner(), limits)
    study.run.put_plan(plan.name, plan.as_json())
    return plan


def _uniform(method: Method, planner: Planner) -> Iterator[Solution]:
    """A plan for every level: at each site its best candidate of the level; a site that has none stays as it is."""
    form = form_named(method.form)
    for values in method.levels():
        level = {form.setting(v) for v in values}
        chosen = []
        for known, menu in zip(planner.candidates, planner.menus, strict=True):
            drawn = [o for o in menu if o.key is not None]
            of_level = [o for o in drawn if set(settings_of(known[o.key].setting, 1)) <= level]  # type: ignore[index]
            unused = menu[1:] if len(known) == 1 and known[0].divergence == 0 else ()
            chosen.append(min(of_level or unused or menu[:1], key=lambda o: o.divergence))
        yield Solution(tuple(chosen), 0.0)


def _equal_shares(planner: Planner) -> Iterator[Solution]:
    """A plan for every share, to a thousandth: at each site the largest candidate within that share of its bytes.

    A site whose every candidate is larger takes its smallest; one that no candidate makes smaller stays as it is.
    """
    shares: list[list[tuple[float, Option]]] = []
    for menu in planner.menus:
        smaller = sorted((o for o in menu if o.stored < menu[0].stored), key=lambda o: o.stored)
        shares.append([(round(o.stored / menu[0].stored, 3), o) for o in smaller] or [(1.0, menu[0])])
    for most in sorted({share for options in shares for share, _ in options}):
        yield Solution(tuple([o for s, o in options if s <= most or o is options[0][1]][-1] for options in shares), 0.0)


def _fits(planner: Planner, limits: Limits, solution: Solution) -> bool:
    fixed = planner.fixed_bytes
    stored, resident = (solution.total(what) + fixed for what in ("stored", "resident"))
    bits = 8 * solution.total("stored") / sum(site.parameters for site in planner.sites)
    of = (
        (stored, limits.stored),
        (resident, limits.resident),
        (solution.total("flops"), limits.flops),
        (solution.total("latency") + (planner.latencies.rest if planner.latencies else 0.0), limits.latency),
        (planner.interaction.whole(solution.total("divergence")), limits.divergence),
        (bits, limits.bits),
    )
    return all(limit is None or value <= limit for value, limit in of)
