"""The steps, as a user calls them from Python or from the shell: study, plan, build, judge, and compress, all in one.

Each step reads what the step before left in the run folder and does nothing that stands there already.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tersor.build.artifact import planned_bytes, read_record, stored_dtypes
from tersor.build.build import Built, build, check_target
from tersor.build.load import load
from tersor.curves.draw import draw_all, probe_gain, settle_damping
from tersor.data import Data, read_data, read_pairs
from tersor.errors import TersorError
from tersor.forms import FORMS, form_named
from tersor.judge import Judgement, judge
from tersor.metrics import KINDS
from tersor.models import Batch, Divergence, Model, Site, Walk, open_model, walk
from tersor.models.compare import Reference
from tersor.observe import collect, store_summaries
from tersor.observe.store import file_of
from tersor.plan import UNTOUCHED, Choice, Limits, Plan, Planner, parse_limits
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
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)

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
        for name in forms or ():
            form_named(name)

        def size_of(choices: Sequence[Choice]) -> int:
            return planned_bytes(self.model.module, self.sites, choices, self.dtypes)

        return Planner.of(self.run, self.sites, size_of, forms)

    def plan(self, budget: str | None = None, *, forms: Sequence[str] | None = None, **limits: Any) -> Plan:
        """The best plan under a budget such as `35%`, `120MB` or `4.25bits`; see `parse_limits` for other limits."""
        found = parse_limits(budget, whole_bytes=self.stored_bytes, whole_flops=self.flops, **limits)
        return self.plan_within(found, forms)

    def plan_within(self, limits: Limits, forms: Sequence[str] | None = None) -> Plan:
        plan = self.planner(forms).plan(limits)
        plan = replace(plan, name=_plan_name(plan))
        self.run.put_plan(plan.name, plan.as_json())
        return plan


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
    """Open a model with its run folder, which is made where it does not exist, and refused where it is another model's."""
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
    return Study(opened, Walk(sites, found.untouched), folder, dtypes)


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
    workers: int | None = None,
    progress: Progress = silent,
    **options: Any,
) -> Study:
    """Observe the model on calibration data and draw the curves of all its sites.

    `metric` is one of `identity`, `diagonal`, `input`, `output`, `kronecker`; `input` needs no backward pass. One batch
    in five is held back, to choose the damping and to measure a gain for every site. Raises TersorError for bad input.
    """
    if metric not in KINDS:
        raise TersorError(f"There is no metric {metric!r}; choose one of {', '.join(KINDS)}.")
    forms = tuple(FORMS) if forms is None else tuple(forms)
    for name in forms:
        form_named(name)
    opened = open_study(model, run, **options)
    batches = list(opened.model.batches(read_data(data), samples, sequence_length, batch_size))
    if not batches:
        raise TersorError("The data gave no batch.")
    opened.run.belongs_to({"calibration_data": fingerprint_of(batches), "metric": metric, "seed": seed})
    opened.run.put("source", opened.model.identity.source)
    opened.run.put("stored_bytes", opened.stored_bytes)
    fit, check = _split(batches)
    _observe(opened, fit, check, gradients=metric != "input", seed=seed, progress=progress)
    if damping is not None:
        opened.run.put("damping", damping)
    progress("damping", "chosen on held-back data", 0, 1)
    settle_damping(opened.run, opened.model, opened.sites, metric)
    start = time.perf_counter()
    progress("draw", "curves of all sites", 0, len(opened.sites))
    for number, name in enumerate(draw_all(opened.run, opened.model, opened.sites, forms, workers), 1):
        progress("draw", name, number, len(opened.sites))
    opened.run.put("seconds/draw", opened.run.get("seconds/draw", 0.0) + time.perf_counter() - start)
    if gains:
        start = time.perf_counter()
        reference = Reference(opened.model, check)
        for number, site in enumerate(opened.sites):
            progress("probe", site.name, number, len(opened.sites))
            probe_gain(opened.run, opened.model, site, reference)
        opened.run.put("seconds/probe", opened.run.get("seconds/probe", 0.0) + time.perf_counter() - start)
    progress("study", "done", 1, 1)
    return opened


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
    opened.run.put("unused_sites", [s.name for s in opened.sites if not opened.run.has_tensors(file_of(s, "fit"))])
    opened.run.put("seconds/observe", time.perf_counter() - start)
    opened.run.put("observed", True)


def _plan_name(plan: Plan) -> str:
    limits = "_".join(f"{k}={v:g}" for k, v in plan.limits.items())
    return limits or "plan"


def build_plan(
    opened: Study,
    plan: Plan,
    out: str | Path,
    *,
    sequential: Sequence[Batch] | None = None,
    progress: Progress = silent,
) -> Built:
    """Fit `plan` and write it to `out`; the study's model is the built one afterwards, so open it anew to go on."""
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
    return built


def judge_artifact(
    original: Model,
    out: str | Path,
    data: str | Path | Data | Sequence[Any],
    *,
    samples: int | None = None,
    sequence_length: int = 256,
    batch_size: int = 16,
    pairs: str | Path | None = None,
    run: Run | None = None,
) -> Judgement:
    """Measure an artifact against the original on held-out data; writes the result beside it, and into the ledger."""
    out = Path(out)
    record = read_record(out)
    if record["model"]["fingerprint"] != original.identity.fingerprint:
        raise TersorError(f"{out} was made from another model than {original.identity.source}.")
    new = adopt(original, out)
    plan = Plan.from_json(record["plan"])
    batches = list(original.batches(read_data(data), samples, sequence_length, batch_size))
    dense_flops = sum(2 * s.shape[0] * s.shape[1] for s in walk(original.module).sites)
    untouched = dense_flops - sum(
        2 * s.shape[0] * s.shape[1] for s in walk(original.module).sites if s.name in {c.site for c in plan.choices}
    )
    found = judge(
        original,
        new,
        batches,
        stored=(original.identity.stored_bytes, (out / "model.safetensors").stat().st_size),
        flops=(dense_flops, untouched + plan.flops),
        predicted=plan.divergence,
        pairs=None if pairs is None else read_pairs(pairs),
        sequence_length=sequence_length,
    )
    if run is not None:
        d = found.divergence
        run.enter(plan.name, "*", plan.divergence, (d.value, d.low, d.high))
        run.put(f"judgement/{plan.name}", found.as_json())
    from tersor.build.artifact import update_record

    update_record(out, {"judgement": found.as_json()})
    return found


def adopt(original: Model, out: Path) -> Model:
    """The artifact `out` as a model that takes the batches of `original`."""
    import copy

    new = copy.copy(original)
    record = read_record(out)
    if record["model"]["kind"] == "huggingface":
        new.module = load(out, device=str(original.device), dtype=torch.float32)
    else:
        new.module = load(out, copy.deepcopy(original.module), device=str(original.device))
    return new


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
    progress: Progress = silent,
    **options: Any,
) -> Result:
    """Study, plan, build and judge in one call. Options are those of `study`.

    Without `held_out` nothing is judged. The module given, or read, is the built one afterwards.
    """
    check_target(Path(out))
    folder = Path(f"{out}.run") if run is None else Path(run)
    opened = study(model, data, folder, forms=forms, progress=progress, **options)
    plan = opened.plan(
        budget,
        forms=forms,
        memory_budget=memory_budget,
        flops_budget=flops_budget,
        divergence=max_divergence,
    )
    sizes = {k: options[k] for k in ("sequence_length", "batch_size") if k in options}
    again = None
    if sequential:
        again = list(opened.model.batches(read_data(data), options.get("samples"), *_shape(options)))
    judged_by = None
    if held_out is not None:
        import copy

        judged_by = copy.copy(opened.model)
        judged_by.module = copy.deepcopy(opened.model.module)
    built = build_plan(opened, plan, out, sequential=again, progress=progress)
    judgement = None
    if judged_by is not None and held_out is not None:
        progress("judge", "held-out data", 0, 1)
        judgement = judge_artifact(
            judged_by, out, held_out, samples=judge_samples, pairs=pairs, run=opened.run, **sizes
        )
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
    "open_study",
    "study",
]
