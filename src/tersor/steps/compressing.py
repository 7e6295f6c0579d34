"""Building a plan of a study, and the whole way from a model to a judged artifact in one call."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from tersor.build.activations import Activations
from tersor.build.build import ON_DEMAND, Built, build, check_target
from tersor.data import Data, read_data, read_pairs
from tersor.engine import pool_of
from tersor.errors import TersorError
from tersor.forms import USUAL
from tersor.judge.artifact import judge_artifact
from tersor.judge.judge import Judgement
from tersor.models import Batch, Model
from tersor.plan import UNTOUCHED, Limits, Plan, parse_limits, parse_shard_size
from tersor.steps.opening import Progress, Study, plan_name, silent
from tersor.steps.studying import clocked, study

RECOVERED = 256  # samples that biases are shifted on


def build_plan(
    opened: Study,
    plan: Plan,
    out: str | Path,
    *,
    sequential: Sequence[Batch] | None = None,
    activations: str | None = None,
    calibration: Sequence[Batch] = (),
    recover: Batch | None = None,
    shard_size: str | None = None,
    workers: int | None = None,
    engine: str = "local",
    ray_address: str | None = None,
    progress: Progress = silent,
) -> Built:
    """Fit `plan` and write it to `out`; the study's model is the built one afterwards, so open it anew to go on.

    With `activations`, such as `int8` or `fp4,tensor,shift`, inputs of layers are rounded, by batches of `calibration`.
    With a batch to `recover` on, biases are shifted at the end, so that every layer gives its old means there. With a
    `shard_size`, such as `2GB`, no weights file is larger, unless a tensor alone is.
    """
    built_of = {choice.form for choice in plan.choices} - {UNTOUCHED}
    workers = opened.workers(workers, built_of, opened.run.get("metric"))
    rounding = None if activations is None else Activations.of(activations)
    if rounding is not None and "activations=" not in plan.name:
        plan = replace(plan, name=f"{plan.name},activations={activations}")
    with opened.run.alone(), pool_of(workers, engine, ray_address), clocked(opened.run, "build"):
        built = build(
            opened.run,
            opened.model,
            opened.sites,
            plan,
            Path(out),
            sequential=sequential,
            activations=rounding,
            calibration=calibration,
            recover=recover,
            workers=workers,
            shard_bytes=parse_shard_size(shard_size),
            progress=lambda what, done, total: progress("build", what, done, total),
        )
        opened.run.put_plan(
            plan.name, {**plan.as_json(), "fitted_divergence": built.plan.divergence, "out": Path(out).name}
        )
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
    latency_budget: str | None = None,
    max_divergence: float | None = None,
    sequential: bool = False,
    activations: str | None = None,
    recover: bool = False,
    shard_size: str | None = None,
    judge_samples: int | None = None,
    choose: Callable[[Study, Limits], Plan] | None = None,
    progress: Progress = silent,
    **options: Any,
) -> Result:
    """Study, plan, build and judge in one call. Options are those of `study`.

    `choose` makes the plan from the study and the limits, where it is not the planner's. With `activations`, such as
    `int8` or `fp4,tensor,shift`, inputs of the layers that the plan approximates are rounded too. With `recover`,
    biases are shifted at the end so that every layer gives its old means on calibration data. With a `shard_size`, such
    as `2GB`, no weights file is larger, unless a tensor alone is. Without `held_out` nothing is judged. The module
    given, or read, is the built one afterwards.
    """
    check_target(Path(out))
    asked: dict[str, Any] = {
        "memory_budget": memory_budget,
        "flops_budget": flops_budget,
        "latency_budget": latency_budget,
        "divergence": max_divergence,
    }
    # What cannot be read is refused before the work.
    asked_for = parse_limits(budget, whole_bytes=1, whole_flops=1, whole_latency=1.0, **asked)
    timed = asked_for.latency is not None
    parse_shard_size(shard_size)
    if activations is not None:
        Activations.of(activations)
    if options.get("memory") is not None and (sequential or activations is not None or recover):
        raise TersorError(ON_DEMAND)
    data = read_data(data)
    held_out = None if held_out is None else read_data(held_out)
    if options.get("check_data") is not None:
        options["check_data"] = read_data(options["check_data"])
    if pairs is not None:
        read_pairs(pairs)
    folder = Path(f"{out}.run") if run is None else Path(run)
    drawn = (*USUAL, "trellis") if forms is None and memory_budget is not None else forms
    options["latency"] = timed or options.get("latency", False)
    if forms is None and choose is None:
        options.setdefault("resources", asked_for.of_bytes)
    workers = options.get("workers")
    with pool_of(workers, options.get("engine", "local"), options.get("ray_address")):
        opened = study(model, data, folder, forms=drawn, progress=progress, **options)
        asked |= {"activations": activations, "shard_size": shard_size}
        limits = opened.limits(budget, **asked)
        progress("plan", "", 0, 0)
        if choose is None:
            plan = opened.plan_within(limits, forms, plan_name(budget, forms, **asked))
        else:
            plan = choose(opened, limits)
        again: list[Batch] = []
        if sequential or activations is not None:
            again = list(opened.model.batches(data, options.get("samples"), *_shape(options), options.get("seed", 0)))
        judged_by = None
        if held_out is not None:
            judged_by = copy.copy(opened.model)
            if opened.memory is None:  # else the model stays as it is
                judged_by.module = copy.deepcopy(opened.model.module)
        built = build_plan(
            opened,
            plan,
            out,
            sequential=again if sequential else None,
            activations=activations,
            calibration=again,
            shard_size=shard_size,
            recover=one_batch(opened.model, data, _shape(options)[0], options.get("seed", 0)) if recover else None,
            workers=workers,
            progress=progress,
        )
    judgement = None
    if judged_by is not None and held_out is not None:
        sequence_length, batch_size = _shape(options)
        with clocked(opened.run, "judge"):
            judgement = judge_artifact(
                judged_by,
                out,
                held_out,
                samples=judge_samples,
                sequence_length=sequence_length,
                batch_size=opened.batch_size(batch_size, sequence_length, gradients=False),
                pairs=pairs,
                run=opened.run,
                progress=progress,
            )
    progress("compress", "done", 1, 1)
    return Result(built.plan, built.weights_bytes, judgement, opened)


def one_batch(model: Model, data: Data, sequence_length: int, seed: int, samples: int = RECOVERED) -> Batch:
    """A batch of so many samples to recover on; of the user's batches the first."""
    return next(iter(model.batches(data, samples, sequence_length, samples, seed)))


def _shape(options: dict[str, Any]) -> tuple[int, int]:
    return options.get("sequence_length", 256), options.get("batch_size", 16)
