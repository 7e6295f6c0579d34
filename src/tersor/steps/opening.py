"""Opening a model with its run folder, and planning from a run, with its model or without."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from tersor.build.activations import Activations
from tersor.build.artifact import stored_dtypes
from tersor.build.layout import Layout
from tersor.curves.limit import Limit
from tersor.errors import TersorError
from tersor.foreign import check
from tersor.forms import form_named
from tersor.models import Divergence, Model, Site, Walk, open_model, walk
from tersor.plan import PLAN, Latencies, Limits, Plan, Planner, parse_limits, parse_shard_size
from tersor.run import Run
from tersor.run.facts import LASTING
from tersor.steps.memory import Memory

Progress = Callable[[str, str, int, int], Any]
_AGAIN = "call `tersor study` with this run, its model and its data, which draws the rest"


def silent(step: str, what: str, done: int, total: int) -> None:
    """The progress that shows nothing."""


@dataclass
class Study:
    """An open study: the model with its sites, the run folder, and the planner over its curves."""

    model: Model
    walk: Walk
    run: Run
    memory: Memory | None = None

    @property
    def sites(self) -> tuple[Site, ...]:
        return self.walk.sites

    def workers(self, asked: int | None, forms: Iterable[str], metric: str) -> int | None:
        """The processes to fit with, of those asked for: as many as the memory allows."""
        return asked if self.memory is None else self.memory.workers(self.sites, asked, forms, metric)

    def batch_size(self, asked: int, sequence_length: int, gradients: bool) -> int:
        """The samples of a batch, of those asked for: as many as the memory allows."""
        known = self.memory
        return asked if known is None else known.batch_size(self.sites, asked, sequence_length, gradients)

    @property
    def stored_bytes(self) -> int:
        """Bytes of the weights of the original on disk."""
        return self.model.identity.stored_bytes

    @property
    def flops(self) -> int:
        """FLOPs of the original's sites for one position."""
        return sum(2 * s.shape[0] * s.shape[1] for s in self.sites)

    def limits(self, budget: str | None = None, **limits: Any) -> Limits:
        """Budgets as users write them, of this model; see `parse_limits`."""
        return limits_of(self.run, budget, **limits)

    def planner(self, forms: Sequence[str] | None = None) -> Planner:
        return planner_of(self.run, forms)

    def plan(self, budget: str | None = None, *, forms: Sequence[str] | None = None, **limits: Any) -> Plan:
        """The best plan under a budget such as `35%`, `120MB`, `4.25bits` or `40ms`; see `parse_limits`."""
        return plan_run(self.run, budget, forms=forms, **limits)

    def plan_within(self, limits: Limits, forms: Sequence[str] | None = None, name: str | None = None) -> Plan:
        return _plan_within(self.run, limits, forms, name)


def planner_of(run: Run, forms: Sequence[str] | None = None) -> Planner:
    """The planner over the curves in a run; it needs no model. `forms` restricts the menus."""
    for name in forms or ():
        form_named(name)
    left_out = (run.get("drawn_for") or {}).get("left_out", ())
    if forms and set(forms) & set(left_out):
        raise TersorError(f"{', '.join(left_out)}: drawn in part only in {run.folder}; {_AGAIN}.")
    layout = Layout.from_json(run.get("layout"))
    return Planner.of(run, layout.sites, layout.file_bytes, forms)


def limit_of(run: Run) -> Limit | None:
    """The rate-distortion limit of the sites of a run, without a model; None for a run of before there were limits."""
    layout = Layout.from_json(run.get("layout"))
    return Limit.of(run, layout.sites, layout.file_bytes)


def limits_of(
    run: Run,
    budget: str | None = None,
    *,
    activations: str | None = None,
    shard_size: str | None = None,
    **limits: Any,
) -> Limits:
    """Budgets as users write them, of the model of a run; see `parse_limits`.

    What rounding `activations`, and shards of a size, may store is taken from the bytes of the whole model beforehand.
    """
    latencies, layout = Latencies.of(run), Layout.from_json(run.get("layout"))
    found = parse_limits(
        budget,
        whole_bytes=run.get("stored_bytes"),
        whole_flops=layout.flops,
        whole_latency=None if latencies is None else latencies.whole,
        **limits,
    )
    kept = 0 if activations is None else layout.rounding_bytes(Activations.of(activations))
    most = parse_shard_size(shard_size)
    if most is not None:
        size = max((v for v in (found.stored, found.resident) if v is not None), default=0)
        kept += layout.shards_bytes(size, most)
    left = {k: v - kept for k in ("stored", "resident") if (v := getattr(found, k)) is not None}
    return replace(found, **left)


def plan_run(run: Run, budget: str | None = None, *, forms: Sequence[str] | None = None, **limits: Any) -> Plan:
    """The best plan of a run under a budget such as `35%`, `4.25bits` or `40ms`; see `parse_limits` for `limits`."""
    found = limits_of(run, budget, **limits)
    return _plan_within(run, found, forms, plan_name(budget, forms, **limits))


def _plan_within(run: Run, limits: Limits, forms: Sequence[str] | None, name: str | None) -> Plan:
    drawn_for, limited = run.get("drawn_for"), limits.of_bytes
    if drawn_for is not None and (limited is None or not set(limited) <= set(drawn_for["resources"])):
        raise TersorError(f"The study in {run.folder} drew what limits on other costs need; {_AGAIN}.")
    return _keep(run, planner_of(run, forms).plan(limits), name)


def _keep(run: Run, plan: Plan, name: str | None) -> Plan:
    plan = replace(plan, name=name or ",".join(f"{k}={v}" for k, v in plan.limits.items()) or "plan")
    run.put_plan(plan.name, plan.as_json())
    return plan


def plan_name(budget: str | None, forms: Sequence[str] | None = None, **limits: Any) -> str:
    """The limits of a plan as they were given: `35%`, `4.25bits,int`, `divergence=0.05`."""
    parts = [budget, *(f"{k}={v}" for k, v in limits.items() if v is not None), *(forms or ())]
    return ",".join(part for part in parts if part)


def plan_named(run: Run, name: str) -> Plan:
    """A plan made before; an unknown name is an error that says which there are."""
    value = run.plan(name)
    if value is None:
        known = ", ".join(run.plans()) or "none yet"
        raise TersorError(f"The run {run.folder} has no plan {name!r}; its plans are: {known}.")
    return Plan.from_json(check(value, PLAN, run.folder / "run.db", f"plan {name}"))


def open_run(folder: str | Path) -> Run:
    """The run of a finished study; raises TersorError where there is none, or where the study was cut short."""
    run = Run(Path(folder))
    if run.get("studied") is None:
        raise TersorError(f"The study in {folder} is not finished; call `tersor study` again to go on with it.")
    lacking = [name for name in LASTING if run.get(name) is None]
    if lacking:
        raise TersorError(f"{run.folder / 'run.db'} is damaged: it has no {lacking[0]!r}.")
    return run


def reopen(folder: str | Path, device: str = "cpu", memory: str | None = None) -> Study:
    """The study in a run folder with its model, opened again as it was the first time."""
    run = open_run(folder)
    opening = run.get("opening")
    if opening is None:
        raise TersorError(f"The study in {folder} was made of a module in memory; build from Python, with its model.")
    run.close()
    place = Path(str(opening["model"]).rpartition(":")[0])
    if place.resolve().is_relative_to(Path(folder).resolve()) and place.suffix == ".py":
        raise TersorError(f"The run {folder} names {place}, which lies in it, as its model; a run brings no code.")
    return open_study(opening.pop("model"), folder, device=device, memory=memory, create=False, **opening)


def open_study(
    model: str | Path | nn.Module | Model,
    run: str | Path,
    *,
    weights: str | Path | None = None,
    divergence: str | Divergence | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    device: str = "cpu",
    memory: str | None = None,
    create: bool = True,
) -> Study:
    """Open a model with its run folder, which is made where there is none, and refused where it is another model's.

    With a limit on `memory`, such as `6GB`, weights are read on demand, and what follows keeps within it.
    """
    limit = None if memory is None else Memory.of(memory)
    opened = open_model(model, weights=weights, divergence=divergence, device=device, on_demand=limit is not None)
    found = walk(opened.module, include, exclude)
    dtypes = stored_dtypes(opened.module, getattr(opened, "checkpoint", None))
    sites = tuple(replace(s, dtype=dtypes.get(s.parameter_name, s.dtype)) for s in found.sites)
    folder = Run(Path(run), create=create)
    folder.belongs_to(
        {
            "model": opened.identity.fingerprint,
            "divergence": opened.divergence.name,
            "sites": [s.name for s in sites],
        }
    )
    folder.put("layout", Layout.of(opened.module, sites, dtypes).as_json())
    folder.put("stored_bytes", opened.identity.stored_bytes)
    folder.put("untouched", found.untouched)
    if isinstance(model, str | Path):
        names = {"divergence": opened.divergence.name, "include": list(include), "exclude": list(exclude)}
        kept = None if weights is None else str(Path(weights).resolve())
        folder.put("opening", {"model": _absolute(str(model)), "weights": kept, **names})
    return Study(opened, Walk(sites, found.untouched), folder, limit)


def _absolute(source: str) -> str:
    """A model folder or `file.py:factory` by its full path; `package.module:factory` stays as it is."""
    path, colon, factory = source.rpartition(":") if ".py:" in source else (source, "", "")
    return f"{Path(path).resolve()}{colon}{factory}" if Path(path).exists() else source
