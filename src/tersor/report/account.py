"""An account of a plan, from a run or from an artifact: where its bytes went, where its damage is, what was left alone.

Tables and pages are made of these values; nothing here opens a model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tersor.build.artifact import read_record
from tersor.build.layout import Layout
from tersor.curves.limit import Limit, times_limit
from tersor.models.divergence import DIVERGENCES
from tersor.plan import UNTOUCHED, Choice, Plan
from tersor.run import Run
from tersor.steps import limit_of, plan_named, planner_of


@dataclass(frozen=True)
class FormBytes:
    """What one form takes in a plan: sites, weights, bytes in the file, bits a weight, predicted divergence."""

    form: str
    sites: int
    weights: int
    stored: int
    bits: float
    divergence: float


@dataclass(frozen=True)
class Account:
    """A plan with what is known of it. `untouched` are tensors that are no site, as (name, weights, bytes, why).

    `limit` is the least divergence that any code of as many bytes could have, None where the run has no limit;
    `activations` how the inputs of layers are rounded, None where they are not.
    """

    model: str
    unit: str
    original_bytes: int
    plan: Plan
    weights: Mapping[str, int]
    untouched: tuple[tuple[str, int, int, str], ...]
    unused_sites: tuple[str, ...]
    judgement: dict[str, Any] | None
    limit: float | None = None
    activations: dict[str, Any] | None = None

    @property
    def times_limit(self) -> float | None:
        """The distance to the limit: how many times it the predicted divergence is."""
        return times_limit(self.plan.divergence, self.limit)

    @property
    def approximated(self) -> tuple[Choice, ...]:
        return tuple(c for c in self.plan.choices if c.form != UNTOUCHED)

    @property
    def untouched_bytes(self) -> int:
        """Bytes of the file that are no operator's: untouched tensors and the header."""
        return self.plan.stored - sum(c.stored for c in self.approximated)

    def forms(self) -> list[FormBytes]:
        """What every form takes, the largest first; sites left as they are count as a form."""
        out = []
        for form in dict.fromkeys(c.form for c in self.plan.choices):
            members = [c for c in self.plan.choices if c.form == form]
            weights, stored = sum(self.weights[c.site] for c in members), sum(c.stored for c in members)
            bits = 8 * stored / weights
            out.append(FormBytes(form, len(members), weights, stored, bits, sum(c.divergence for c in members)))
        return sorted(out, key=lambda f: -f.stored)

    def worst(self, count: int = 5) -> list[Choice]:
        """The sites with the most predicted damage."""
        return sorted(self.plan.choices, key=lambda c: -c.divergence)[:count]

    def reasons(self) -> list[tuple[str, int, int]]:
        """Why tensors were left as they are: (why, how many, bytes), the largest first."""
        found: dict[str, list[int]] = {}
        for _, _, size, why in self.untouched:
            found.setdefault(why, []).append(size)
        kept = [c.stored for c in self.plan.choices if c.form == UNTOUCHED]
        if kept:
            found["left as they are by the plan"] = kept
        return sorted(((why, len(sizes), sum(sizes)) for why, sizes in found.items()), key=lambda r: -r[2])

    def as_json(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "unit": self.unit,
            "original_bytes": self.original_bytes,
            "stored_bytes": self.plan.stored,
            "resident_bytes": self.plan.resident,
            "share": self.plan.stored / self.original_bytes,
            "plan": self.plan.as_json(),
            "forms": [vars(f) for f in self.forms()],
            "untouched_bytes": self.untouched_bytes,
            "untouched": [list(row) for row in self.untouched],
            "unused_sites": list(self.unused_sites),
            "judgement": self.judgement,
            "limit": self.limit,
            "times_limit": self.times_limit,
            "activations": self.activations,
        }


def account_of_artifact(folder: Path) -> Account:
    """The account of a small model on disk."""
    record = read_record(folder)
    return Account(
        record["model"]["source"],
        unit_of(record["divergence"]),
        record["model"]["stored_bytes"],
        Plan.from_json(record["plan"]),
        record["site_weights"],
        tuple((n, w, b, why) for n, w, b, why in record["untouched"]),
        tuple(record["unused_sites"]),
        record.get("judgement"),
        record.get("limit"),
        record.get("activations"),
    )


def account_of_run(run: Run, name: str, limit: Limit | None = None) -> Account:
    """The account of a plan of a run; `limit` is that of the run, if it was read before."""
    plan, limit = plan_named(run, name), limit or limit_of(run)
    return Account(
        run.get("source"),
        unit_of(run.get("divergence")),
        run.get("stored_bytes"),
        plan,
        {s.name: s.parameters for s in Layout.from_json(run.get("layout")).sites},
        tuple((n, w, b, why) for n, w, b, why in run.get("untouched")),
        tuple(run.get("unused_sites", [])),
        run.get(f"judgement/{name}"),
        None if limit is None else limit.divergence(plan.stored),
    )


def plan_to_show(run: Run) -> str:
    """The newest plan that was judged, else the newest."""
    names = run.plans()
    judged = [name for name in names if run.get(f"judgement/{name}") is not None]
    return (judged or names)[-1]


def study_facts(run: Run) -> dict[str, Any]:
    """What a study found, as plain values."""
    planner = planner_of(run)
    sites = planner.sites
    smallest, least_damage = planner.front()[0]
    measured = {plan: value for plan, site, _, value, *_ in run.ledger() if site == "*"}
    plans = [plan_named(run, name) for name in run.plans()]
    return {
        "model": run.get("source"),
        "run": str(run.folder),
        "unit": unit_of(run.get("divergence")),
        "original_bytes": run.get("stored_bytes"),
        "metric": run.get("metric"),
        "damping": run.get("damping"),
        "certainty": run.get("certainty"),
        "sites": len(sites),
        "weights": sum(s.parameters for s in sites),
        "site_bytes": sum(s.nbytes for s in sites),
        "candidates": sum(len(c) for c in planner.candidates),
        "forms": run.get("studied"),
        "smallest": {"stored_bytes": smallest, "divergence": least_damage},
        "untouched": run.get("untouched"),
        "unused_sites": run.get("unused_sites", []),
        "seconds": run.facts("seconds/"),
        "plans": [
            {"name": p.name, "stored_bytes": p.stored, "predicted": p.divergence, "measured": measured.get(p.name)}
            for p in plans
        ],
    }


def unit_of(divergence: str) -> str:
    """The unit of a divergence by its name."""
    known = DIVERGENCES.get(divergence)
    return "units of your own" if known is None else known.unit
