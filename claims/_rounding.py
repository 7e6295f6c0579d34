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

from _shared import Subject, hand_over
from tersor.build.activations import Activations
from tersor.build.calibrate import SURE, captured, fit_rounding, layers_of
from tersor.build.layers import install
from tersor.forms import Operator
from tersor.judge.intervals import mean_estimate
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


class Comparisons:
    """The comparisons of a claim on one subject, printed as they come, handed over at the end."""

    COLUMNS = ("null", "method", "layers kept", "predicted", "measured", "ratio", "difference [95 %]", "bytes")

    def __init__(self, claim: str, rounder: Rounder) -> None:
        self.claim, self.subject, self.layers = claim, rounder.subject, len(rounder.layers)
        self.holds, self.rows, self.short = True, [], []
        unit = self.subject.original.divergence.unit
        print(f"\n{claim}\n{self.subject.name}, {self.layers} layers, divergence in {unit}\n")
        print("  ".join(self.COLUMNS))

    def add(self, null: Rounding, method: Rounding, shown: bool = False) -> None:
        """A method beside its null; one that is `shown` alone has no part in the verdict."""
        before, after = float(null.divergences.mean()), float(method.divergences.mean())
        gap = mean_estimate(method.divergences - null.divergences)
        row = [
            null.label,
            method.label + (", beside the claim" if shown else ""),
            f"{method.kept}/{self.layers}",
            f"{null.predicted:.4f} -> {method.predicted:.4f}",
            f"{before:.4f} -> {after:.4f}",
            f"{after / before:.2f}",
            f"{gap.value:+.4f} [{gap.low:+.4f}, {gap.high:+.4f}]",
            f"{method.nbytes - null.nbytes:+,}",
        ]
        print("  ".join(row), flush=True)
        self.rows.append(row)
        if not shown:
            self.holds &= gap.high < 0
            self.short.append(f"{null.label} {before:.4f} -> {method.label} {after:.4f} ({after / before:.2f})")

    def close(self) -> bool:
        """Hand the table over; whether the method was the better one, beyond chance, in all that the claim is about."""
        hand_over(
            self.claim, self.subject.name, columns=list(self.COLUMNS), rows=self.rows, measured="; ".join(self.short)
        )
        return self.holds
