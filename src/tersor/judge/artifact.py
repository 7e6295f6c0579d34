"""Judging an artifact: the built model on disk against its original, and each of its sites alone.

What is measured is written beside the artifact and, where a run is given, into its ledger.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tersor.build.artifact import read_record, update_record
from tersor.build.latency import one_sample
from tersor.build.layers import ApproximateLayer, operators_at
from tersor.build.load import load
from tersor.data import Data, read_data, read_pairs
from tersor.errors import TersorError
from tersor.judge.intervals import Estimate, mean_estimate
from tersor.judge.judge import Judgement, judge
from tersor.models import Model, walk
from tersor.models.compare import Reference, substituted
from tersor.models.files import open_checkpoint, temporary_of
from tersor.models.ondemand import is_on_demand
from tersor.models.passage import by_stretches
from tersor.plan import UNTOUCHED, Plan
from tersor.run import Run, fingerprint_of

Progress = Callable[[str, str, int, int], Any]
Source = str | Path | Data | Sequence[Any]


def judge_artifact(
    original: Model,
    out: str | Path,
    data: Source,
    *,
    samples: int | None = None,
    sequence_length: int = 256,
    batch_size: int = 16,
    pairs: str | Path | None = None,
    run: Run | None = None,
    progress: Progress = lambda *_: None,
) -> Judgement:
    """Measure an artifact against the original on held-out data; writes the result beside it, and into the ledger."""
    out = Path(out)
    plan = plan_of(original, out)
    read = None if pairs is None else read_pairs(pairs)
    held_out = read_data(data)
    batches = original.compact(original.batches(held_out, samples, sequence_length, batch_size, seed=0))
    new = adopt(original, out)
    known = walk(original.module).sites
    chosen = {c.site for c in plan.choices}
    one = one_sample(original, held_out, sequence_length)
    dense_flops = sum(2 * s.shape[0] * s.shape[1] for s in known)
    untouched = sum(2 * s.shape[0] * s.shape[1] for s in known if s.name not in chosen)
    with ExitStack() as stack:
        if is_on_demand(original.module):
            spool = temporary_of(out.resolve())
            stack.callback(shutil.rmtree, spool, ignore_errors=True)
            original, new = (
                stack.enter_context(by_stretches(model, batches, spool / what, partial(progress, "judge", what)))
                for what, model in (("original by blocks", original), ("result by blocks", new))
            )
        found = judge(
            original,
            new,
            batches,
            stored=(original.identity.stored_bytes, open_checkpoint(out).file_bytes),
            flops=(dense_flops, untouched + plan.flops),
            one=one,
            predicted=plan.divergence,
            predicted_speed=plan.latency_share,
            pairs=read,
            sequence_length=sequence_length,
            progress=partial(progress, "judge"),
        )
    if run is not None:
        _check_run(run, original)
        d = found.divergence
        run.enter(plan.name, "*", plan.divergence, (d.value, d.low, d.high))
        run.put(f"judgement/{plan.name}", found.as_json())
    sizes = {"samples": samples, "sequence_length": sequence_length, "batch_size": batch_size}
    update_record(out, {"judgement": found.as_json(), "judged_on": {"data": fingerprint_of(batches), **sizes}})
    return found


def judge_sites(
    original: Model,
    out: str | Path,
    data: Source,
    *,
    samples: int | None = None,
    sequence_length: int = 256,
    batch_size: int = 16,
    run: Run | None = None,
    progress: Progress = lambda *_: None,
) -> dict[str, tuple[float, Estimate]]:
    """The divergence of every site alone, all others as they were: predicted and measured, by site.

    The weights are those of the artifact itself. Where it rounds the inputs of a layer, these are measured alone, too,
    as `PLACE (inputs)`. Writes the result beside it, and into the ledger of `run`.
    """
    out = Path(out)
    plan = plan_of(original, out)
    batches = original.compact(original.batches(read_data(data), samples, sequence_length, batch_size, seed=0))
    built = adopt(original, out).module
    sites = {site.name: site for site in walk(original.module).sites}
    choices = [c for c in plan.choices if c.form != UNTOUCHED]
    progress("judge sites", "the original", 0, len(choices))
    reference = Reference(original, batches)
    found = {}
    for number, choice in enumerate(choices):
        progress("judge sites", choice.site, number, len(choices))
        site = sites[choice.site]
        matrices = torch.stack([op.dense() for op in operators_at(built, *site.places[0])])
        with reference.starting_at(site), substituted(original, site, matrices):
            found[choice.site] = choice.divergence, mean_estimate(reference.divergences())
    rounded = read_record(out).get("activations", {"layers": {}})["layers"]
    for number, (place, values) in enumerate(rounded.items()):
        progress("judge inputs", place, number, len(rounded))
        with reference.starting_at(sites[values["site"]]), _rounding_inputs(original, built, place):
            found[f"{place} (inputs)"] = values["divergence"], mean_estimate(reference.divergences())
    if run is not None:
        _check_run(run, original)
        for name, (predicted, measured) in found.items():
            run.enter(plan.name, name, predicted, (measured.value, measured.low, measured.high))
    ledger = {name: [p, m.value, m.low, m.high] for name, (p, m) in found.items()}
    update_record(out, {"ledger": ledger})
    return found


@contextmanager
def _rounding_inputs(original: Model, built: nn.Module, place: str) -> Iterator[None]:
    """The original with the inputs of one of its layers rounded as the built one has them."""
    layer = built.get_submodule(place)
    assert isinstance(layer, ApproximateLayer) and layer.rounding is not None
    rounding = layer.rounding
    hook = original.module.get_submodule(place).register_forward_pre_hook(lambda _, given: rounding.seen(given[0]))
    try:
        yield
    finally:
        hook.remove()


def adopt(original: Model, out: Path) -> Model:
    """The artifact `out` as a model that takes the batches of `original`."""
    new = copy.copy(original)
    new.identity = replace(original.identity, source=str(out))
    record = read_record(out)
    given = None if record["model"]["kind"] == "huggingface" else copy.deepcopy(original.module)
    dtype = torch.float32 if given is None else None
    on_demand = is_on_demand(original.module)
    new.module = load(out, given, device=str(original.device), dtype=dtype, on_demand=on_demand)
    return new


def plan_of(original: Model, out: Path) -> Plan:
    """The plan of an artifact; raises TersorError where it was made from another model than `original`."""
    record = read_record(out)
    if record["model"]["fingerprint"] != original.identity.fingerprint:
        raise TersorError(f"{out} was made from another model than {original.identity.source}.")
    return Plan.from_json(record["plan"])


def _check_run(run: Run, original: Model) -> None:
    if run.get("model") != original.identity.fingerprint:
        raise TersorError(f"The run folder {run.folder} is that of another model than {original.identity.source}.")
