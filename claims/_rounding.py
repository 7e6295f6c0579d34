"""What the claims about activations share: a real model with whole weights, the inputs of some layers rounded.

The layers keep their weights as they are, so that all damage is that of the inputs. Roundings are fitted on calibration
data; divergences are measured on held-out samples that no step has seen.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from _shared import Subject
from tersor.build.activations import Activations
from tersor.build.calibrate import SURE, captured, fit_rounding, layers_of
from tersor.build.layers import install
from tersor.forms import Operator
from tersor.judge.intervals import Estimate, mean_estimate
from tersor.models import walk
from tersor.observe import collect

ALWAYS = -math.inf


class Whole(Operator):
    """A weight as it is."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__((weight.shape[0], weight.shape[1]), None)  # type: ignore[arg-type]
        self._decoded = weight


@dataclass(frozen=True)
class Rounding:
    """What rounding came to: predicted damage of the layers alone, summed, in how many layers the way was kept."""

    label: str
    predicted: float
    divergences: np.ndarray
    kept: int
    nbytes: int


class Rounder:
    """A subject whose layers that match a pattern may have their inputs rounded."""

    def __init__(self, subject: Subject, pattern: str) -> None:
        self.subject, model = subject, subject.original
        length = subject.options.get("sequence_length", 256)
        batches = list(model.batches(subject.calibration, subject.samples, length, 16))
        sites = [s for s in walk(model.module).sites if s.kind == "linear" and fnmatch.fnmatchcase(s.name, pattern)]
        found = collect(model, sites, batches, gradients=True, seed=0)
        self.weighed = {s.name: found.summaries[s.name, 0, "linear"].output_metric for s in sites}
        for site in sites:
            install(model.module, site, [Whole(site.matrices(model.module)[0].detach())])
        self.layers = {place: layer for place, (_, layer) in layers_of(model.module, sites)}
        self.inputs = captured(model, self.layers, batches)
        self.reference = subject.reference

    def rounded(self, label: str, formats: str | Iterable[str], sure: float = SURE) -> Rounding:
        """Round the inputs of all layers, each in the best of the formats, and measure."""
        asked = [Activations.of(text) for text in ([formats] if isinstance(formats, str) else formats)]
        predicted, kept, nbytes = 0.0, 0, 0
        for place, layer in self.layers.items():
            trials = [fit_rounding(layer, self.inputs[place], a, *self.weighed[place], sure) for a in asked]
            layer.rounding, damage, _ = min(trials, key=lambda trial: trial[1])
            predicted += damage
            kept += layer.rounding.setting.shift or layer.rounding.setting.dither
            nbytes += layer.rounding.nbytes
        divergences = self.reference.divergences()
        for layer in self.layers.values():
            layer.rounding = None
        return Rounding(label, predicted, divergences, kept, nbytes)


def row(null: Rounding, method: Rounding, layers: int, in_claim: bool = True) -> bool:
    """Print a line of a table; whether the whole interval of the paired difference lies below zero."""
    before, after = null.divergences.mean(), method.divergences.mean()
    gap: Estimate = mean_estimate(method.divergences - null.divergences)
    print(
        f"{null.label:20} {method.label:26} {method.kept:3}/{layers:<3} {null.predicted:9.2e} {method.predicted:9.2e} "
        f"{method.predicted / null.predicted:5.2f}  {before:9.2e} {after:9.2e} {after / before:5.2f}  "
        f"[{gap.low:+.1e}, {gap.high:+.1e}] {method.nbytes - null.nbytes:+,} bytes"
        f"{'' if in_claim else '  (beside the claim)'}",
        flush=True,
    )
    return gap.high < 0


def heading(claim: str, rounder: Rounder) -> None:
    subject, unit = rounder.subject, rounder.subject.original.divergence.unit
    print(f"\n{claim}\n{subject.name}, {len(rounder.layers)} layers, divergence in {unit}\n")
    print(
        f"{'null':20} {'method':26} {'kept':7} {'predicted':9} {'method':>9} {'ratio':>5}  "
        f"{'measured':9} {'method':>9} {'ratio':>5}  difference [95 %]"
    )
