"""A plan: one candidate a site, with what it is predicted to cost and to damage.

Menus come from the curves in the run, with the gain of the site as a factor; leaving a site alone is always an option.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch

from tersor.errors import TersorError, UnreachableBudget
from tersor.foreign import COUNT, POSITIVE
from tersor.forms import Candidate, Operator, as_values, form_named, settings_of
from tersor.models.sites import Site
from tersor.plan.budget import Limits
from tersor.plan.latency import Latencies
from tersor.plan.solve import Menu, Option, Solution, front, solve
from tersor.run import Run

UNTOUCHED = "untouched"
CHOICE = {
    "site": str, "form": str, "setting": {str: object}, "label": str, "stored": COUNT, "resident": COUNT,
    "flops": COUNT, "divergence": float, "latency?": (float, None),
}  # fmt: skip
PLAN = {
    "name": str, "choices": [CHOICE], "stored": POSITIVE, "resident": COUNT, "flops": COUNT, "divergence": float,
    "gap?": float, "limits?": {str: object}, "latency?": (float, None), "latency_share?": (float, None),
}  # fmt: skip


@dataclass(frozen=True)
class Choice:
    """What a plan does at a site; form `untouched` leaves it. Bytes are those of its tensors in the file.

    `latency` are its seconds of one sample, where they were measured.
    """

    site: str
    form: str
    setting: dict[str, Any]
    label: str
    stored: int
    resident: int
    flops: int
    divergence: float
    latency: float | None = None


@dataclass(frozen=True)
class Plan:
    """Choices in the order of the sites; `stored` is the whole file to the byte.

    `divergence` is that predicted for the whole model: the sum over the choices, corrected for their interaction.
    `latency` are the seconds of one sample by what its sites took alone, `latency_share` of those of the original;
    None where sites were not timed.
    """

    name: str
    choices: tuple[Choice, ...]
    stored: int
    resident: int
    flops: int
    divergence: float
    gap: float = 0.0
    limits: dict[str, Any] = field(default_factory=dict)
    latency: float | None = None
    latency_share: float | None = None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Plan:
        """The inverse of `as_json`, of a value that has the form of `PLAN`; what else it has is left out."""
        choices = tuple(Choice(**_fields(Choice, c)) for c in value["choices"])
        return cls(**{**_fields(cls, value), "choices": choices})


def _fields(of: Any, value: dict[str, Any]) -> dict[str, Any]:
    return {name: value[name] for name in of.__dataclass_fields__ if name in value}


@dataclass(frozen=True)
class Interaction:
    """What a sum of the sites' divergences comes to for the whole model, from (sum, measured) pairs of whole plans.

    The ratio runs linearly in the logarithm of the sum, from 1 at a thirtieth of the first pair, and stays at the last.
    """

    pairs: tuple[tuple[float, float], ...] = ()

    @classmethod
    def of(cls, run: Run) -> Interaction:
        return cls(tuple((a, b) for a, b in run.get("interaction", []) if a > 0 and b > 0))

    def whole(self, total: float) -> float:
        """The divergence predicted for the whole model whose sites sum to `total`."""
        if not self.pairs or total <= 0:
            return total
        at = [math.log(self.pairs[0][0] / 30), *(math.log(a) for a, _ in self.pairs)]
        ratios = [1.0, *(b / a for a, b in self.pairs)]
        return total * float(np.interp(math.log(total), at, ratios))

    def total(self, whole: float) -> float:
        """The largest sum, to one part in 10^6, that is predicted to come to at most `whole`."""
        low, high = 0.0, 10 * whole
        while high - low > 1e-6 * whole:
            middle = (low + high) / 2
            low, high = (middle, high) if self.whole(middle) <= whole else (low, middle)
        return low


@dataclass(frozen=True)
class Planner:
    """Menus of all sites of a run, ready for any budget. `fixed` are the bytes of a file before any site's tensors."""

    sites: tuple[Site, ...]
    candidates: tuple[tuple[Candidate, ...], ...]
    menus: tuple[Menu, ...]
    fixed_bytes: int
    size_of: Any
    interaction: Interaction = Interaction()
    latencies: Latencies | None = None

    @classmethod
    def of(cls, run: Run, sites: Sequence[Site], size_of: Any, forms: Sequence[str] | None = None) -> Planner:
        """`size_of(choices)` is the exact size of the file of some choices; `forms` restricts the menus."""

        def scaled(site: Site) -> tuple[Candidate, ...]:
            known = (c for c in run.candidates(site.name) if forms is None or c.form in forms)
            gains = run.gains(site.name)
            return tuple(replace(c, divergence=c.divergence * gains.of(c.form, c.divergence)) for c in known)

        return cls.over([(site, scaled(site)) for site in sites], size_of, Interaction.of(run), Latencies.of(run))

    @classmethod
    def over(
        cls,
        menus: Sequence[tuple[Site, tuple[Candidate, ...]]],
        size_of: Any,
        interaction: Interaction = Interaction(),
        latencies: Latencies | None = None,
    ) -> Planner:
        """The planner over candidates as they are given."""
        sites, candidates = tuple(site for site, _ in menus), tuple(known for _, known in menus)
        options = tuple(_menu(site, known, latencies) for site, known in menus)
        return cls(sites, candidates, options, fixed_bytes(sites, size_of), size_of, interaction, latencies)

    def front(self) -> list[tuple[int, float]]:
        """(bytes of the file, predicted divergence) of every plan worth having, smallest first."""
        whole = self.interaction.whole
        return [(self.fixed_bytes + int(s.total("stored")), whole(s.total("divergence"))) for s in front(self.menus)]

    def plan(self, limits: Limits, name: str = "plan") -> Plan:
        """The plan of least predicted divergence within the limits; the smallest one under a limit of divergence.

        Raises UnreachableBudget, naming the smallest reachable size.
        """
        sums: dict[str, float] = {}
        if limits.stored is not None:
            sums["stored"] = limits.stored - self.fixed_bytes
        if limits.bits is not None:
            of_weights = limits.bits * sum(s.parameters for s in self.sites) / 8
            sums["stored"] = min(sums.get("stored", float("inf")), of_weights)
        if limits.resident is not None:
            sums["resident"] = limits.resident - self.fixed_bytes
        if limits.flops is not None:
            sums["flops"] = limits.flops
        if limits.latency is not None:
            if self.latencies is None:
                raise TersorError("For a limit on latency sites must have been timed: study again with --latency.")
            sums["latency"] = limits.latency - self.latencies.rest
        if limits.divergence is not None:
            sums["divergence"] = self.interaction.total(limits.divergence)
        self._check_reachable(limits, sums)
        minimise = "stored" if limits.divergence is not None else "divergence"
        solution = solve(self.menus if limits.latency is None else self._timed(), sums, minimise=minimise)
        plan = self.plan_of(solution, name)
        return replace(plan, limits={k: v for k, v in asdict(limits).items() if v is not None})

    def _timed(self) -> list[Menu]:
        """The menus without what was not timed."""
        return [[option for option in menu if option.latency < math.inf] for menu in self.menus]

    def _check_reachable(self, limits: Limits, sums: dict[str, float]) -> None:
        for what in ("stored", "resident"):
            if what in sums:
                least = sum(min(getattr(o, what) for o in menu) for menu in self.menus)
                if least > sums[what]:
                    whole = least + self.fixed_bytes
                    bits = 8 * least / sum(s.parameters for s in self.sites)
                    raise UnreachableBudget(
                        f"The budget is out of reach: the smallest plan takes {whole:,} {what} bytes "
                        f"({bits:.2f} bits a weight)."
                    )
        if "latency" in sums and self.latencies is not None:
            least_time = sum(min(o.latency for o in menu) for menu in self._timed())
            if least_time > sums["latency"]:
                raise UnreachableBudget(
                    f"The budget is out of reach: the fastest plan takes {1e3 * (least_time + self.latencies.rest):.4g}"
                    f" ms for one sample, of {1e3 * self.latencies.whole:.4g} ms of the original."
                )

    def plan_of(self, solution: Solution, name: str) -> Plan:
        """A solution with the names of its candidates and the exact size of its file."""
        choices = []
        for site, known, option in zip(self.sites, self.candidates, solution.chosen, strict=True):
            seconds = option.latency if option.latency < math.inf else None
            choices.append(_choice(site, known[option.key] if option.key is not None else None, seconds))
        return self.plan_from(choices, name, solution.gap)

    def plan_from(self, choices: Sequence[Choice], name: str, gap: float = 0.0) -> Plan:
        """A plan of given choices."""
        timed = None if self.latencies is None else self.latencies.total(c.latency for c in choices)
        stored = self.size_of([c for c in choices if c.form != UNTOUCHED])
        extra = stored - sum(c.stored for c in choices)
        return Plan(
            name,
            tuple(choices),
            stored,
            extra + sum(c.resident for c in choices),
            sum(c.flops for c in choices),
            self.interaction.whole(sum(c.divergence for c in choices)),
            gap,
            latency=timed,
            latency_share=timed / self.latencies.whole if timed is not None and self.latencies is not None else None,
        )


def fixed_bytes(sites: Sequence[Site], size_of: Callable[[Sequence[Choice]], int]) -> int:
    """Bytes of a file that belong to no site: all other tensors, and the header but for the entries of sites."""
    return max(size_of(()) - sum(site.nbytes + _entry_bytes(site, None) for site in sites), 0)


def _choice(site: Site, candidate: Candidate | None, latency: float | None) -> Choice:
    if candidate is None:
        flops = 2 * site.shape[0] * site.shape[1]
        return Choice(site.name, UNTOUCHED, {}, UNTOUCHED, site.nbytes, site.nbytes, flops, 0.0, latency)
    cost = candidate.cost
    return Choice(
        site.name,
        candidate.form,
        as_values(candidate.setting),
        candidate.setting.label,
        cost.stored,
        cost.resident,
        cost.flops,
        candidate.divergence,
        latency,
    )


def _menu(site: Site, candidates: Sequence[Candidate], latencies: Latencies | None) -> list[Option]:
    """The options of a site; what was drawn after the sites were timed takes for ever."""

    def seconds(*choice: Any) -> float:
        found = 0.0 if latencies is None else latencies.at(site.name, *choice)
        return math.inf if found is None else found

    dense = site.nbytes + _entry_bytes(site, None)
    options = [Option(None, dense, dense, 2 * site.shape[0] * site.shape[1], 0.0, seconds())]
    for number, c in enumerate(candidates):
        extra, cost = _entry_bytes(site, c), c.cost
        time = seconds(c.form, c.setting)
        options.append(Option(number, cost.stored + extra, cost.resident + extra, cost.flops, c.divergence, time))
    return options


def _entry_bytes(site: Site, candidate: Candidate | None) -> int:
    """At most what the entries of a choice take in the header of a safetensors file."""
    if candidate is None:
        names = [(site.parameter_name, site.parameter_shape)]
    else:
        form, prefix = form_named(candidate.form), f"{site.parameter_name}.operators."
        names = []
        for k, setting in enumerate(settings_of(candidate.setting, site.stack)):
            with torch.device("meta"):
                operator: Operator = form.empty(site.shape, setting)
            names += [(f"{prefix}{k}.{n}", tuple(b.shape)) for n, b in operator.state_dict().items()]
    return sum(len(name) + len(str(list(shape))) + 70 for name, shape in names)


__all__ = ["UNTOUCHED", "Choice", "Plan", "Planner", "fixed_bytes"]
