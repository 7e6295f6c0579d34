"""Integers at their entropy on the blocks of BabyLlama, by rate: plans, and what every part of the form is worth.

    python bench/coded.py [--run DIR] [--rates 4.6,3.6,...]

Plans hit a rate from below; `one step` gives all sites the same step instead, and stands beside the same with one part
left out, changed or added. Equally good fits differ by several per cent in measured divergence at low rates, so a row
of one step is that of three fits within 1 % of the rate: the line through the logarithms of their divergences, at the
rate. Bits are those of the file: all tensors of the blocks, with their entries in its header (and also without).
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from code_models import bits_by_model
from models import Reference, reference
from observed import blocks_of, observed_again
from refit import refitted
from tersor.build.fits import fits_of, load_fit
from tersor.build.layout import Layout
from tersor.coding import decode
from tersor.curves.damping import Damping
from tersor.curves.draw import site_metrics
from tersor.errors import UnreachableBudget
from tersor.forms import CodedForm, CodedSetting, as_values
from tersor.forms.coded import CodedOperator
from tersor.judge.intervals import bootstrap
from tersor.metrics import Metric, Side
from tersor.models import Site
from tersor.models.compare import Reference as Outputs
from tersor.models.files import file_bytes
from tersor.observe import load_metrics
from tersor.plan import UNTOUCHED, Choice, Interaction, Limits
from tersor.run import Run
from tersor.steps import Study, limit_of

RESULTS = Path(__file__).parent / "results"
TARGETS = {4.6: 0.0021, 3.6: 0.0085, 3.0: 0.022, 2.6: 0.045, 2.0: 0.13}  # nats a token that were asked for, by bits
PLANS = {
    "plan of coded": ["coded"],
    "plan of int": ["int"],
    "plan of lowrank": ["lowrank"],
    "plan of int+lowrank": ["int+lowrank"],
    "plan of all forms": None,
}
NEAR = 0.002  # of the rate: how near the middle one of three fits must come
APART = 0.008  # of the rate: how far the other two are meant to lie from it
BASE = "one step"
FIRST_STEP = 2.0**-12.2  # where the search begins
Values = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Trial:
    """A whole model as one variant makes it: its choices, its matrices, bytes that no choice accounts for."""

    step: float
    choices: list[Choice]
    matrices: dict[str, Tensor]
    extra: int = 0


@dataclass(frozen=True)
class Measured:
    """A trial measured: bits a weight with and without header entries, nats predicted, nats of each held-out window."""

    bits: float
    bare_bits: float
    predicted: float
    values: Values


Variant = Callable[["Bench", float], Trial]


@dataclass(frozen=True)
class Bench:
    """The open study with the held-out outputs of the original, and what counts the bytes of its sites."""

    known: Reference
    opened: Study
    held: Outputs
    layout: Layout

    @property
    def run(self) -> Run:
        return self.opened.run

    @property
    def weights(self) -> int:
        return sum(site.parameters for site in self.opened.sites)

    @property
    def other_bytes(self) -> int:
        """Bytes of the file without the sites: all other tensors and their header."""
        replaced = {f"{m}.{p}".removeprefix(".") for site in self.layout.sites for m, p in site.places}
        return file_bytes([entry for entry in self.layout.tensors if entry[0] not in replaced])

    def bits(self, choices: Sequence[Choice], extra: int = 0) -> tuple[float, float]:
        """Bits a weight of the sites in the file, with header entries and without."""
        whole = self.layout.file_bytes([c for c in choices if c.form != UNTOUCHED]) - self.other_bytes
        bare = sum(choice.stored for choice in choices)
        return 8 * (whole + extra) / self.weights, 8 * (bare + extra) / self.weights

    def predicted(self, choices: Sequence[Choice]) -> float:
        return Interaction.of(self.run).whole(sum(choice.divergence for choice in choices))

    def measure(self, trial: Trial) -> Measured:
        """Put the matrices into the model, judge it on the held-out windows, put the original back."""
        module, kept = self.opened.model.module, []
        for site in self.opened.sites:
            if site.name in trial.matrices:
                parameter = site.parameter(module)
                kept.append((parameter, parameter.data))
                parameter.data = site.to_parameter(trial.matrices[site.name][None]).to(parameter.data).contiguous()
        try:
            values = self.held.divergences()
        finally:
            for parameter, data in kept:
                parameter.data = data
        return Measured(*self.bits(trial.choices, trial.extra), self.predicted(trial.choices), values)

    def choice(self, site: Site, setting: CodedSetting, divergence: float) -> Choice:
        """The choice of a fit; `divergence` is without the gain of the site."""
        whole = divergence * self.run.gain(site.name, "coded", divergence)
        return Choice(site.name, "coded", as_values(setting), setting.label, setting.stored or 0, 0, 0, whole)


def _fitted(bench: Bench, step: float, metric_of: Callable[[Site], Metric], trade: float, refit: int | None) -> Trial:
    """Every site at one step; `refit` is the bits of a refitted factor, 0 where they are not counted."""
    choices, matrices, extra = [], {}, 0
    for site in bench.opened.sites:
        (weight,), metric = site.matrices(bench.opened.model.module), metric_of(site)
        operator = CodedForm().fit(weight, metric, CodedSetting(step, trade))
        matrix = operator.dense()
        if refit is not None:
            matrix, added = refitted(weight, metric, decode(operator.stream.numpy().tobytes()), refit)
            extra += added
        matrices[site.name] = matrix
        choices.append(bench.choice(site, operator.setting, metric.distance(weight - matrix)))
    return Trial(step, choices, matrices, extra)


def one_step(trade: float | None = None, refit: int | None = None, **damping: float) -> Variant:
    """One step everywhere; `damping` replaces parts of what the study chose."""

    def make(bench: Bench, step: float) -> Trial:
        chosen = Damping(**{**bench.run.get("damping"), **damping})

        def metric_of(site: Site) -> Metric:
            return chosen.apply(load_metrics(bench.run, site, bench.run.get("metric"))[0], table=False)

        return _fitted(bench, step, metric_of, CodedSetting(step).trade if trade is None else trade, refit)

    return make


class _InOrder(Side):
    """A side that is factored in its own order."""

    @property
    def pivoted_order(self) -> Tensor:
        return torch.arange(self.size)


def natural_order(bench: Bench, step: float) -> Trial:
    def metric_of(site: Site) -> Metric:
        (metric,) = site_metrics(bench.run, site)
        return replace(metric, rows=_InOrder(metric.rows.moment), columns=_InOrder(metric.columns.moment))

    return _fitted(bench, step, metric_of, CodedSetting(step).trade, None)


def re_observed(gradients: bool) -> Variant:
    """Block after block with the inputs that the built prefix produces, on the batches that the study fitted to."""

    def make(bench: Bench, step: float) -> Trial:
        known, model = bench.known, bench.known.open()
        batches = list(model.batches(known.calibration, known.samples, known.sequence_length, known.batch_size))
        fitted = [batch for number, batch in enumerate(batches, 1) if number % 5]
        choices, matrices = [], {}
        for members in blocks_of(bench.opened.sites):
            metrics = observed_again(bench.run, model, members, fitted, gradients)
            for site in members:
                (weight,), metric = site.matrices(model.module).clone(), metrics[site.name]
                operator = CodedForm().fit(weight, metric, CodedSetting(step))
                matrices[site.name] = operator.dense()
                site.parameter(model.module).data = site.to_parameter(operator.dense()[None]).contiguous()
                choices.append(bench.choice(site, operator.setting, metric.distance(weight - operator.dense())))
        return Trial(step, choices, matrices)

    return make


VARIANTS: dict[str, Variant] = {
    BASE: one_step(),
    "no price on bits": one_step(trade=0.0),
    "price 0.5": one_step(trade=0.5),
    "natural order": natural_order,
    "refit of factors, 16 bits each": one_step(refit=16),
    "refit of factors, not counted": one_step(refit=0),
    "damping of gradients 0.3": one_step(gradients=0.3),
    "damping of gradients 1.0": one_step(gradients=1.0),
    "blocks observed again, forwards alone": re_observed(gradients=False),
}


def three_trials(bench: Bench, make: Variant, rate: float, step: float) -> list[Trial]:
    """Trials at the rate and a little below and above it; `step` is the first that is tried."""
    tried: list[tuple[float, float]] = []
    slope = -0.9  # bits a weight to an octave of the step
    for _ in range(8):
        trial = make(bench, step)
        bits, _ = bench.bits(trial.choices, trial.extra)
        if tried and abs(math.log2(step) - tried[-1][0]) > 0.02:
            slope = min(-0.3, max(-1.2, (bits - tried[-1][1]) / (math.log2(step) - tried[-1][0])))
        tried.append((math.log2(step), bits))
        if abs(bits - rate) <= NEAR * rate:
            break
        step *= 2 ** ((rate - bits) / slope)
    return [trial, *(make(bench, trial.step * 2 ** (side * APART * rate / slope)) for side in (-1, 1))]


def settled(found: Sequence[Measured], rate: float, index: Values) -> float:
    """The divergence at the rate on some of the windows: the line through the logarithms; one trial as it is."""
    means = np.log([float(m.values[index].mean()) for m in found])
    if len(found) == 1:
        return float(np.exp(means[0]))
    return float(np.exp(np.polyfit([m.bits - rate for m in found], means, 1)[1]))


def row_of(name: str, found: Sequence[Measured], base: Sequence[Measured] | None, rate: float) -> dict[str, Any]:
    """A row of the results; `against_one_step` is the ratio to the base on the same resamples of the windows."""
    count = len(found[0].values)
    logs, offs = np.log([m.values.mean() for m in found]), [m.bits - rate for m in found]
    rest = logs - np.polyval(np.polyfit(offs, logs, 1), offs) if len(found) > 1 else np.zeros(1)
    row: dict[str, Any] = {
        "name": name,
        "bits": [m.bits for m in found],
        "bits_without_header": [m.bare_bits for m in found],
        "divergence": asdict(bootstrap(lambda i: settled(found, rate, i), count)),
        "each": [float(m.values.mean()) for m in found],
        "predicted": float(np.exp(np.log([m.predicted for m in found]).mean())),
        "scatter": float(np.abs(rest).max()),
    }
    if base is not None:
        ratio = bootstrap(lambda i: settled(found, rate, i) / settled(base, rate, i), count)
        row["against_one_step"] = asdict(ratio)
    return row


def planned(bench: Bench, rate: float, forms: list[str] | None) -> Measured:
    """The planner's plan whose bits, as counted here, are the most that do not pass the rate."""
    planner = bench.opened.planner(forms)
    limit = bench.other_bytes + int(rate * bench.weights / 8)
    most, best = limit, None
    for _ in range(4):  # the planner counts header entries at their most, so it may be given a little more
        plan = planner.plan(Limits(stored=most))
        slack = limit - plan.stored
        if slack >= 0 and (best is None or plan.divergence < best.divergence):
            best = plan
        if 0 <= slack < 64:
            break
        most += slack if slack > 0 else slack - 64
    if best is None:
        raise UnreachableBudget("no plan at this rate")
    for _ in fits_of(bench.run, bench.opened.model, bench.opened.sites, best.choices):
        pass
    matrices = {
        site.name: load_fit(bench.run, site, choice).matrices()[0]
        for site, choice in zip(bench.opened.sites, best.choices, strict=True)
        if choice.form != UNTOUCHED
    }
    return bench.measure(Trial(0.0, list(best.choices), matrices))


def model_rows(bench: Bench, trial: Trial, bits: float) -> Iterator[dict[str, Any]]:
    """Bits a weight of the codes of one trial under other probability models, the rest of the file as it is."""
    totals: dict[str, float] = {}
    for site, choice in zip(bench.opened.sites, trial.choices, strict=True):
        (weight,), (metric,) = site.matrices(bench.opened.model.module), site_metrics(bench.run, site)
        operator = CodedForm().fit(weight, metric, CodedForm().setting(choice.setting))
        assert isinstance(operator, CodedOperator)
        for name, value in bits_by_model(decode(operator.stream.numpy().tobytes())).items():
            totals[name] = totals.get(name, 0.0) + value / bench.weights
    ships = next(iter(totals.values()))
    for name, value in totals.items():
        yield {"name": name, "codes": value, "bits": bits - ships + value}


def cell_of(bench: Bench, rate: float, steps: dict[str, float]) -> dict[str, Any]:
    """All rows at one rate; `steps` are those of a variant over that of the base at the last rate, and are renewed.

    That of the base itself is the step.
    """
    rows: list[dict[str, Any]] = []
    base: list[Measured] = []
    for name, make in VARIANTS.items():
        start = time.perf_counter()
        trials = three_trials(bench, make, rate, steps[BASE] * (1.0 if name == BASE else steps.get(name, 1.0)))
        found = [bench.measure(trial) for trial in trials]
        steps[name] = trials[0].step / (1.0 if name == BASE else steps[BASE])
        rows.append(row_of(name, found, base or None, rate))
        show(rows[-1], time.perf_counter() - start)
        if name == BASE:
            base, models = found, list(model_rows(bench, trials[0], found[0].bits))
    for name, forms in PLANS.items():
        start = time.perf_counter()
        try:
            rows.append(row_of(name, [planned(bench, rate, forms)], base, rate))
            show(rows[-1], time.perf_counter() - start)
        except UnreachableBudget as error:
            rows.append({"name": name, "note": str(error)})
            print(f"  {name:32} cannot: {error}", flush=True)
    for model in models:
        print(f"  bits of the codes of one step, {model['name']:24} {model['bits']:.4f}", flush=True)
    limit = limit_of(bench.run)
    least = None if limit is None else limit.divergence(limit.fixed_bytes + rate * bench.weights / 8)
    return {"rate": rate, "target": TARGETS.get(rate), "limit": least, "rows": rows, "models": models}


def show(row: dict[str, Any], seconds: float) -> None:
    d, against = row["divergence"], row.get("against_one_step")
    ratio = "" if against is None else f" x{against['value']:.3f} [{against['low']:.3f}, {against['high']:.3f}]"
    bits = ", ".join(f"{b:.3f}" for b in row["bits"])
    print(
        f"  {row['name']:32} {d['value']:.5f} [{d['low']:.5f}, {d['high']:.5f}] predicted {row['predicted']:.5f}"
        f"{ratio} scatter {row['scatter']:.1%} at {bits} bits, {seconds:.0f} s",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, default=None)
    parser.add_argument("--rates", default=",".join(str(rate) for rate in TARGETS))
    given = parser.parse_args()
    known = reference("babyllama")
    run = given.run or Path(tempfile.mkdtemp())
    start = time.perf_counter()
    opened = known.study(run, include=("model.layers.*",))
    print(f"study {time.perf_counter() - start:.0f} s, damping {opened.run.get('damping')}", flush=True)
    batches = opened.model.batches(known.held_out, known.held_out_samples, known.sequence_length, known.batch_size)
    with torch.no_grad():
        held = Outputs(opened.model, batches)
    bench = Bench(known, opened, held, Layout.from_json(opened.run.get("layout")))
    cells: list[dict[str, Any]] = []
    steps = {BASE: FIRST_STEP}
    rates = [float(rate) for rate in given.rates.split(",")]
    RESULTS.mkdir(exist_ok=True)
    target = RESULTS / "coded-babyllama.json"
    for number, rate in enumerate(rates):
        steps[BASE] *= 2.0 ** ((rates[number - 1] - rate) if number else 0.0)  # about a bit an octave
        print(f"{rate} bits a weight: nats a token asked for {TARGETS.get(rate)}", flush=True)
        cells.append(cell_of(bench, rate, steps))
        found = {"model": known.name, "weights": bench.weights, "damping": opened.run.get("damping"), "cells": cells}
        target.write_text(json.dumps(found, indent=1), encoding="utf8")
    print(f"written to {target.name}")


if __name__ == "__main__":
    main()
