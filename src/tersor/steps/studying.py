"""The study: observe a model on calibration data, draw the curves of its sites, measure what scales the predictions."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from tersor.build.interaction import measure_interaction
from tersor.build.latency import measure_latencies, one_sample
from tersor.curves.draw import Ladders, damping_sites, draw_all, settle_damping
from tersor.curves.gains import probe_gains
from tersor.curves.limit import store_spectra
from tersor.data import Data, read_data
from tersor.engine import pool_of
from tersor.errors import TersorError
from tersor.forms import USUAL, form_named
from tersor.metrics import KINDS
from tersor.models import Batch, Divergence, Model, Site
from tersor.models.compare import Reference
from tersor.models.divergence import softened
from tersor.models.model import size_of
from tersor.models.ondemand import is_on_demand
from tersor.observe import Collector, collect, collect_by_block, store_summaries, unseen
from tersor.observe.certainty import certainty
from tersor.observe.store import file_of
from tersor.run import Run, fingerprint_of
from tersor.steps.memory import observers
from tersor.steps.opening import Progress, Study, open_study, silent

CHECK_SHARE = 0.2


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
    check_data: str | Path | Data | Sequence[Any] | None = None,
    latency: bool = False,
    resources: Sequence[str] | None = None,
    workers: int | None = None,
    engine: str = "local",
    ray_address: str | None = None,
    progress: Progress = silent,
    **options: Any,
) -> Study:
    """Observe the model on calibration data and draw the curves of all its sites.

    `metric` is one of `identity`, `diagonal`, `input`, `output`, `kronecker`; `input` needs no backward pass. Damping
    is chosen and gains are measured on `check_data`, half as many samples; without it, on one calibration batch
    in five, held back. `settings` replaces the ladder of a form, by its name, with settings as plain values. With
    `latency` every site is timed in every form on this machine, for budgets of time. With `resources`, of `stored` and
    `resident`, forms that no plan under limits on these would use are found on a few sites, and drawn there alone.
    With a limit on `memory`, such as `6GB`, weights are read on demand, block by block, and batches and processes are
    no more than it allows. `workers` processes observe and fit, or as many cores of a Ray cluster with the engine
    `ray`. Raises TersorError for bad input.
    """
    if metric not in KINDS:
        raise TersorError(f"There is no metric {metric!r}; choose one of {', '.join(KINDS)}.")
    forms = USUAL if forms is None else tuple(forms)
    for name in forms:
        form_named(name)
    if latency and options.get("memory") is not None:
        raise TersorError("Time cannot be told while weights are read from disk: leave out --memory or the latency.")
    calibration, fresh = read_data(data), not Path(run).exists()
    checked = None if check_data is None else read_data(check_data)
    opened = open_study(model, run, **options)
    with opened.run.alone():
        try:
            workers = opened.workers(workers, forms, metric)
            if calibration.batches is None:
                batch_size = opened.batch_size(batch_size, sequence_length, metric != "input")
            sizes = (sequence_length, batch_size, seed)
            batches = _batches(opened, calibration, samples, *sizes)
            fit, check = _split(batches)
            if checked is not None:
                many = sum(int(opened.model.units(b).max()) + 1 for b in batches)
                fit, check = batches, _batches(opened, checked, max(1, many // 2), *sizes)
            fit, check = (list(opened.model.compact(part)) for part in (fit, check))
        except TersorError:
            if fresh:
                opened.run.discard()
            raise
        opened.run.belongs_to({"calibration_data": fingerprint_of(batches), "metric": metric, "seed": seed})
        opened.run.belongs_to({"check_data": "held back" if checked is None else fingerprint_of(check)})
        opened.run.belongs_to({"settings": _ladders_key(settings)})
        opened.run.put("source", opened.model.identity.source)
        with pool_of(workers, engine, ray_address):
            if not opened.run.get("observed"):
                watched: dict[str, Any] = {"gradients": metric != "input", "seed": seed}
                with clocked(opened.run, "observe"):
                    _observe(opened, fit, check, workers, progress, unseen_data=checked is not None, **watched)
                opened.run.put("observed", True)
            if damping is not None:
                opened.run.belongs_to({"damping": damping})
            _settle(opened, metric, progress)
            with clocked(opened.run, "draw"):
                progress("draw", "curves of all sites", 0, len(opened.sites))
                drawing = draw_all(opened.run, opened.model, opened.sites, forms, workers, settings, resources)
                for number, name in enumerate(drawing, 1):
                    progress("draw", name, number, len(opened.sites))
            if gains:
                _probe(opened, check, forms, workers, progress)
        if latency:
            with clocked(opened.run, "time"):
                sample = one_sample(opened.model, calibration, sequence_length, seed)
                measure_latencies(opened.run, opened.model, opened.sites, sample, partial(progress, "time"))
        opened.run.put("studied", sorted({*forms, *opened.run.get("studied", [])}))
        progress("study", "done", 1, 1)
    return opened


def _settle(opened: Study, metric: str, progress: Progress) -> None:
    """Choose the damping, and find the spectra of the limit."""
    with clocked(opened.run, "damping"):
        settle_damping(
            opened.run, opened.model, opened.sites, metric, partial(progress, "damping", "chosen on held-back data")
        )
    with clocked(opened.run, "limit"):
        for number, name in enumerate(store_spectra(opened.run, opened.model, opened.sites), 1):
            progress("limit", name, number, len(opened.sites))


def _probe(opened: Study, check: list[Batch], forms: Sequence[str], workers: int | None, progress: Progress) -> None:
    """Measure the gain of every form at every site, and a few whole plans."""
    with clocked(opened.run, "probe"), ExitStack() as stack:
        folder = None if opened.memory is None else opened.run.folder / "outputs"
        if folder is not None:
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
        reference = Reference(opened.model, check, folder)
        progress("probe", "gains of all sites", 0, len(opened.sites))
        gained = probe_gains(opened.run, opened.model, opened.sites, reference, forms, workers)
        for number, name in enumerate(gained, 1):
            progress("probe", name, number, len(opened.sites))
        planner = opened.planner()
        shown = partial(progress, "probe plans")
        measure_interaction(opened.run, opened.model, opened.sites, planner, reference, workers, shown)


@contextmanager
def clocked(run: Run, step: str) -> Iterator[None]:
    """Add the seconds of what is done inside to those of a step, where it ends well."""
    start = time.perf_counter()
    yield
    run.put(f"seconds/{step}", run.get(f"seconds/{step}", 0.0) + time.perf_counter() - start)


def _ladders_key(settings: Ladders | None) -> str:
    """A short name for the ladders that a study draws."""
    if settings is None:
        return "those of the forms"
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def _batches(
    opened: Study, data: Data, samples: int | None, sequence_length: int, batch_size: int, seed: int
) -> list[Batch]:
    batches = list(opened.model.batches(data, samples, sequence_length, batch_size, seed))
    if not batches:
        raise TersorError(f"{data.source} gave no batch.")
    return batches


def _split(batches: list[Batch]) -> tuple[list[Batch], list[Batch]]:
    """Every fifth batch is held back; a single batch serves both, as there is nothing else."""
    every = round(1 / CHECK_SHARE)
    check = batches[every - 1 :: every] or batches[-1:]
    fit = [b for i, b in enumerate(batches) if (i + 1) % every] if len(batches) > 1 else batches
    if len(batches) < every and len(batches) > 1:
        fit = batches[:-1]
    return fit, check


def _observe(
    opened: Study,
    fit: list[Batch],
    check: list[Batch],
    workers: int | None,
    progress: Progress,
    *,
    unseen_data: bool,
    gradients: bool,
    seed: int,
) -> None:
    divergence = opened.model.divergence
    if gradients and divergence.name == "kl":
        if opened.run.get("certainty") is None:
            found = certainty(opened.model, fit, check, soften=unseen_data)
            opened.run.put("certainty", {**asdict(found), "is_certain": found.is_certain})
        divergence = softened(divergence, opened.run.get("certainty")["temperature"])

    def watch(part: str, batches: list[Batch], sites: tuple[Site, ...], probed: Divergence) -> None:
        if opened.run.get(f"observed/{part}"):
            return
        options = {"gradients": gradients, "seed": seed, "divergence": probed}
        shown = partial(progress, "observe", part)
        for collector in _collectors(opened, sites, batches, workers, progress=shown, **options):
            store_summaries(opened.run, sites, collector, part)
        opened.run.put(f"observed/{part}", True)

    watch("fit", fit, opened.sites, divergence)
    few = damping_sites(opened.run, opened.sites)
    if not few:
        raise TersorError("The model used none of its sites on the calibration data, so nothing was observed.")
    watch("check", check, tuple(few), opened.model.divergence)
    missing = [s for s in opened.sites if not opened.run.has_tensors(file_of(s, "fit"))]
    opened.run.put("unseen_sites", unseen(opened.model, missing, fit[0]))
    opened.run.put("unused_sites", [s.name for s in missing])


def _collectors(
    opened: Study, sites: Sequence[Site], batches: list[Batch], workers: int | None, **options: Any
) -> Iterator[Collector]:
    """The summaries of the sites: of all at once, or block by block where weights are read on demand."""
    if is_on_demand(opened.model.module):
        spool, names = opened.run.folder / "spool", [site.name for site in sites]
        key = json.dumps([names, fingerprint_of(batches), [size_of(batch) for batch in batches]])
        yield from collect_by_block(opened.model, sites, batches, spool, key=key, **options)
        return
    count = observers(opened.sites, batches, workers, options["gradients"])
    yield collect(opened.model, sites, batches, workers=count, **options)
