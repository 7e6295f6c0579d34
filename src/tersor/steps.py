"""The steps, as a user calls them from Python or from the shell: study, plan, build, judge, and compress, all in one.

Each step reads what the step before left in the run folder and does nothing that stands there already.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from tersor.build.artifact import stored_dtypes
from tersor.build.build import Built, build, check_target
from tersor.build.interaction import measure_interaction
from tersor.build.layout import Layout
from tersor.curves.draw import Ladders, draw_all, probe_gains, settle_damping
from tersor.data import Data, read_data, read_pairs
from tersor.errors import TersorError
from tersor.forms import FORMS, form_named
from tersor.judge.artifact import adopt, judge_artifact, judge_sites
from tersor.judge.judge import Judgement
from tersor.metrics import KINDS
from tersor.models import Batch, Divergence, Model, Site, Walk, open_model, walk
from tersor.models.compare import Reference
from tersor.observe import collect, store_summaries, unseen
from tersor.observe.store import file_of
from tersor.plan import UNTOUCHED, Limits, Plan, Planner, parse_limits
from tersor.run import Run, fingerprint_of

CHECK_SHARE = 0.2
Progress = Callable[[str, str, int, int], Any]


def silent(step: str, what: str, done: int, total: int) -> None:
    """The progress that shows nothing."""


@dataclass
class Study:
    """An open study: the model with its sites, the run folder, and the planner over its curves."""

    model: Model
    walk: Walk
    run: Run

    @property
    def sites(self) -> tuple[Site, ...]:
        return self.walk.sites

    @property
    def stored_bytes(self) -> int:
        """Bytes of the weights of the original on disk."""
        return self.model.identity.stored_bytes

    @property
    def flops(self) -> int:
        """FLOPs of the original's sites for one position."""
        return sum(2 * s.shape[0] * s.shape[1] for s in self.sites)

    def planner(self, forms: Sequence[str] | None = None) -> Planner:
        return planner_of(self.run, forms)

    def plan(self, budget: str | None = None, *, forms: Sequence[str] | None = None, **limits: Any) -> Plan:
        """The best plan under a budget such as `35%`, `120MB` or `4.25bits`; see `parse_limits`."""
        return plan_run(self.run, budget, forms=forms, **limits)

    def plan_within(self, limits: Limits, forms: Sequence[str] | None = None, name: str | None = None) -> Plan:
        return _keep(self.run, self.planner(forms).plan(limits), name)


def planner_of(run: Run, forms: Sequence[str] | None = None) -> Planner:
    """The planner over the curves in a run; it needs no model. `forms` restricts the menus."""
    for name in forms or ():
        form_named(name)
    layout = Layout.from_json(run.get("layout"))
    return Planner.of(run, layout.sites, layout.file_bytes, forms)


def plan_run(run: Run, budget: str | None = None, *, forms: Sequence[str] | None = None, **limits: Any) -> Plan:
    """The best plan of a run under a budget such as `35%`, `120MB`, `4.25bits`; see `parse_limits` for `limits`."""
    flops = Layout.from_json(run.get("layout")).flops
    found = parse_limits(budget, whole_bytes=run.get("stored_bytes"), whole_flops=flops, **limits)
    return _keep(run, planner_of(run, forms).plan(found), plan_name(budget, forms, **limits))


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
    return Plan.from_json({k: v for k, v in value.items() if k in Plan.__dataclass_fields__})


def open_run(folder: str | Path) -> Run:
    """The run of a finished study; raises TersorError where there is none, or where the study was cut short."""
    run = Run(Path(folder))
    if run.get("studied") is None:
        raise TersorError(f"The study in {folder} is not finished; call `tersor study` again to go on with it.")
    return run


def reopen(folder: str | Path, device: str = "cpu") -> Study:
    """The study in a run folder with its model, opened again as it was the first time."""
    run = open_run(folder)
    opening = run.get("opening")
    if opening is None:
        raise TersorError(f"The study in {folder} was made of a module in memory; build from Python, with its model.")
    run.close()
    return open_study(opening.pop("model"), folder, device=device, create=False, **opening)


def open_study(
    model: str | Path | nn.Module | Model,
    run: str | Path,
    *,
    weights: str | Path | None = None,
    divergence: str | Divergence | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    device: str = "cpu",
    create: bool = True,
) -> Study:
    """Open a model with its run folder, which is made where there is none, and refused where it is another model's."""
    opened = open_model(model, weights=weights, divergence=divergence, device=device)
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
    return Study(opened, Walk(sites, found.untouched), folder)


def _absolute(source: str) -> str:
    """A model folder or `file.py:factory` by its full path; `package.module:factory` stays as it is."""
    path, colon, factory = source.rpartition(":") if ".py:" in source else (source, "", "")
    return f"{Path(path).resolve()}{colon}{factory}" if Path(path).exists() else source


def study(
    model: str | Path | nn.Module | Model,
    data: str | Path | Data | Sequence[Any],
    run: str | Path,
    *,
    metric: str = "kronecker",
    forms: Sequence[str] | None = None,
    samples: int | None = None,
    sequence_length: int = 256,
    batch_size: int = 16,
    seed: int = 0,
    gains: bool = True,
    damping: dict[str, float] | None = None,
    settings: Ladders | None = None,
    workers: int | None = None,
    progress: Progress = silent,
    **options: Any,
) -> Study:
    """Observe the model on calibration data and draw the curves of all its sites.

    `metric` is one of `identity`, `diagonal`, `input`, `output`, `kronecker`; `input` needs no backward pass. One batch
    in five is held back, to choose the damping and to measure a gain for every site. `settings` replaces the ladder of
    a form, by its name, with settings as plain values. Raises TersorError for bad input.
    """
    if metric not in KINDS:
        raise TersorError(f"There is no metric {metric!r}; choose one of {', '.join(KINDS)}.")
    forms = tuple(FORMS) if forms is None else tuple(forms)
    for name in forms:
        form_named(name)
    calibration, fresh = read_data(data), not Path(run).exists()
    opened = open_study(model, run, **options)
    try:
        batches = list(opened.model.batches(calibration, samples, sequence_length, batch_size))
        if not batches:
            raise TersorError("The data gave no batch.")
    except TersorError:
        if fresh:
            opened.run.discard()
        raise
    opened.run.belongs_to({"calibration_data": fingerprint_of(batches), "metric": metric, "seed": seed})
    opened.run.belongs_to({"settings": _ladders_key(settings)})
    opened.run.put("source", opened.model.identity.source)
    fit, check = _split(batches)
    _observe(opened, fit, check, gradients=metric != "input", seed=seed, progress=progress)
    if damping is not None:
        opened.run.belongs_to({"damping": damping})
    start = time.perf_counter()
    settle_damping(
        opened.run,
        opened.model,
        opened.sites,
        metric,
        lambda done, total: progress("damping", "chosen on held-back data", done, total),
    )
    _add_seconds(opened.run, "damping", start)
    start = time.perf_counter()
    progress("draw", "curves of all sites", 0, len(opened.sites))
    for number, name in enumerate(draw_all(opened.run, opened.model, opened.sites, forms, workers, settings), 1):
        progress("draw", name, number, len(opened.sites))
    _add_seconds(opened.run, "draw", start)
    if gains:
        start = time.perf_counter()
        reference = Reference(opened.model, check)
        for number, site in enumerate(opened.sites):
            progress("probe", site.name, number, len(opened.sites))
            probe_gains(opened.run, opened.model, site, reference, forms)
        measure_interaction(
            opened.run,
            opened.model,
            opened.sites,
            opened.planner(),
            reference,
            workers,
            lambda what, done, total: progress("probe plans", what, done, total),
        )
        _add_seconds(opened.run, "probe", start)
    opened.run.put("studied", sorted({*forms, *opened.run.get("studied", [])}))
    progress("study", "done", 1, 1)
    return opened


def _add_seconds(run: Run, step: str, start: float) -> None:
    run.put(f"seconds/{step}", run.get(f"seconds/{step}", 0.0) + time.perf_counter() - start)


def _ladders_key(settings: Ladders | None) -> str:
    """A short name for the ladders that a study draws."""
    if settings is None:
        return "those of the forms"
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def _split(batches: list[Batch]) -> tuple[list[Batch], list[Batch]]:
    """Every fifth batch is held back; a single batch serves both, as there is nothing else."""
    every = round(1 / CHECK_SHARE)
    check = batches[every - 1 :: every] or batches[-1:]
    fit = [b for i, b in enumerate(batches) if (i + 1) % every] if len(batches) > 1 else batches
    if len(batches) < every and len(batches) > 1:
        fit = batches[:-1]
    return fit, check


def _observe(
    opened: Study, fit: list[Batch], check: list[Batch], *, gradients: bool, seed: int, progress: Progress
) -> None:
    if opened.run.get("observed"):
        return
    start = time.perf_counter()
    for part, batches in (("fit", fit), ("check", check)):

        def reported(batches: list[Batch] = batches, part: str = part) -> Any:
            for number, batch in enumerate(batches):
                progress("observe", part, number, len(batches))
                yield batch

        collector = collect(opened.model, opened.sites, reported(), gradients=gradients, seed=seed)
        store_summaries(opened.run, opened.sites, collector, part)
    if not any(opened.run.has_tensors(file_of(s, "fit")) for s in opened.sites):
        raise TersorError("The model used none of its sites on the calibration data, so nothing was observed.")
    missing = [s for s in opened.sites if not opened.run.has_tensors(file_of(s, "fit"))]
    opened.run.put("unseen_sites", unseen(opened.model, missing, fit[0]))
    opened.run.put("unused_sites", [s.name for s in missing])
    _add_seconds(opened.run, "observe", start)
    opened.run.put("observed", True)


def build_plan(
    opened: Study,
    plan: Plan,
    out: str | Path,
    *,
    sequential: Sequence[Batch] | None = None,
    progress: Progress = silent,
) -> Built:
    """Fit `plan` and write it to `out`; the study's model is the built one afterwards, so open it anew to go on."""
    start = time.perf_counter()
    built = build(
        opened.run,
        opened.model,
        opened.sites,
        plan,
        Path(out),
        sequential=sequential,
        progress=lambda what, done, total: progress("build", what, done, total),
    )
    opened.run.put_plan(
        plan.name, {**plan.as_json(), "fitted_divergence": built.plan.divergence, "out": Path(out).name}
    )
    _add_seconds(opened.run, "build", start)
    return built


@dataclass(frozen=True)
class Result:
    """What `compress` made: the plan as built, the bytes of its file, and what the judge measured, if asked."""

    plan: Plan
    weights_bytes: int
    judgement: Judgement | None
    study: Study


def compress(
    model: str | Path | nn.Module | Model,
    data: str | Path | Data | Sequence[Any],
    budget: str | None = None,
    out: str | Path = "compressed",
    *,
    run: str | Path | None = None,
    held_out: str | Path | Data | Sequence[Any] | None = None,
    pairs: str | Path | None = None,
    forms: Sequence[str] | None = None,
    memory_budget: str | None = None,
    flops_budget: str | None = None,
    max_divergence: float | None = None,
    sequential: bool = False,
    judge_samples: int | None = None,
    choose: Callable[[Study, Limits], Plan] | None = None,
    progress: Progress = silent,
    **options: Any,
) -> Result:
    """Study, plan, build and judge in one call. Options are those of `study`.

    `choose` makes the plan from the study and the limits, where it is not the planner's. Without `held_out` nothing is
    judged. The module given, or read, is the built one afterwards.
    """
    check_target(Path(out))
    asked: dict[str, Any] = {"memory_budget": memory_budget, "flops_budget": flops_budget, "divergence": max_divergence}
    parse_limits(budget, whole_bytes=1, whole_flops=1, **asked)  # what cannot be read is refused before the work
    data = read_data(data)
    held_out = None if held_out is None else read_data(held_out)
    if pairs is not None:
        read_pairs(pairs)
    folder = Path(f"{out}.run") if run is None else Path(run)
    opened = study(model, data, folder, forms=forms, progress=progress, **options)
    limits = parse_limits(budget, whole_bytes=opened.stored_bytes, whole_flops=opened.flops, **asked)
    progress("plan", "", 0, 0)
    if choose is None:
        plan = opened.plan_within(limits, forms, plan_name(budget, forms, **asked))
    else:
        plan = choose(opened, limits)
    sizes = {k: options[k] for k in ("sequence_length", "batch_size") if k in options}
    again = None
    if sequential:
        again = list(opened.model.batches(data, options.get("samples"), *_shape(options)))
    judged_by = None
    if held_out is not None:
        import copy

        judged_by = copy.copy(opened.model)
        judged_by.module = copy.deepcopy(opened.model.module)
    built = build_plan(opened, plan, out, sequential=again, progress=progress)
    judgement = None
    if judged_by is not None and held_out is not None:
        start = time.perf_counter()
        judgement = judge_artifact(
            judged_by, out, held_out, samples=judge_samples, pairs=pairs, run=opened.run, progress=progress, **sizes
        )
        _add_seconds(opened.run, "judge", start)
    progress("compress", "done", 1, 1)
    return Result(built.plan, built.weights_bytes, judgement, opened)


def _shape(options: dict[str, Any]) -> tuple[int, int]:
    return options.get("sequence_length", 256), options.get("batch_size", 16)


__all__ = [
    "UNTOUCHED",
    "Result",
    "Study",
    "adopt",
    "build_plan",
    "compress",
    "judge_artifact",
    "judge_sites",
    "open_run",
    "open_study",
    "plan_name",
    "plan_named",
    "plan_run",
    "planner_of",
    "reopen",
    "study",
]
