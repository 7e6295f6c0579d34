"""Judging: the built model against the original on held-out data, with intervals, and what the plan had predicted.

The judge knows no form: it sees two models with the same inputs, the sizes of two sets of files, and a ledger.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tersor.build import decoded
from tersor.errors import TersorError
from tersor.judge.costs import Latency, latency, peak_bytes, resident_bytes
from tersor.judge.intervals import Estimate, mean_estimate
from tersor.judge.scores import Predicted, Score, pair_score, paired, score_all, spearman
from tersor.models.compare import mean_by_unit
from tersor.models.model import Batch, Model, size_of
from tersor.models.ondemand import is_on_demand

Pairs = tuple[list[str], list[str], np.ndarray]
Progress = Callable[[str, int, int], Any]


@dataclass(frozen=True)
class Sizes:
    """Bytes of the weights on disk, of tensors resident, and at the peak of one batch; FLOPs of weights a position."""

    stored: int
    resident: int
    peak: int | None
    flops: int


@dataclass(frozen=True)
class Judgement:
    """Everything that was measured. `divergence` is in `unit`; `predicted` is what the plan said, if known.

    `latency` is of the largest batch, `latency_of_one` of the largest of a few samples alone; `predicted_speed` is what
    the plan said of the latter, over the original's. Models that are read on demand are not timed: they would tell of
    the disk.
    """

    divergence_name: str
    unit: str
    divergence: Estimate
    predicted: float | None
    samples: int
    predictions: int
    scores: tuple[Score, ...]
    original: Sizes
    new: Sizes
    latency: Latency | None
    latency_of_one: Latency | None = None
    predicted_speed: float | None = None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def judge(
    original: Model,
    new: Model,
    batches: Sequence[Batch],
    *,
    stored: tuple[int, int],
    flops: tuple[int, int],
    one: Batch | None = None,
    predicted: float | None = None,
    predicted_speed: float | None = None,
    pairs: Pairs | None = None,
    sequence_length: int = 256,
    progress: Progress = lambda *_: None,
) -> Judgement:
    """Compare two models that take the same batches, `one` of a single sample. `pairs` are texts with a score."""
    before, after, values = compared(original, new, batches, progress)
    progress("scores, latency and memory", 0, 0)
    scores = score_all(original, batches, before, after)
    if pairs is not None:
        scores.append(_pairs(original, new, pairs, sequence_length))
    timed = not is_on_demand(original.module)
    largest = max(batches, key=size_of)
    peaks = [peak_bytes(_once(m, largest), m.module, m.device) if timed else None for m in (original, new)]
    sizes = [Sizes(stored[k], resident_bytes(m.module), peaks[k], flops[k]) for k, m in enumerate((original, new))]
    return Judgement(
        original.divergence.name,
        original.divergence.unit,
        mean_estimate(values),
        predicted,
        len(values),
        sum(len(original.units(batch)) for batch in batches),
        tuple(scores),
        sizes[0],
        sizes[1],
        latency(original, new, largest) if timed else None,
        None if one is None or not timed else latency(original, new, one),
        predicted_speed,
    )


def compared(
    original: Model, new: Model, batches: Sequence[Batch], progress: Progress = lambda *_: None
) -> tuple[list[Predicted], list[Predicted], np.ndarray]:
    """What both models predict for every batch, and the divergence of every sample (samples,).

    Memory holds the outputs for one batch: those for all would be larger than most models. Raises TersorError where the
    new model gives NaN or infinity.
    """
    before, after, values = [], [], []
    with torch.no_grad(), decoded(new.module):
        for number, batch in enumerate(batches):
            progress("held-out data", number, len(batches))
            a, b = original.outputs(batch).float().cpu(), new.outputs(batch).float().cpu()
            found = mean_by_unit(original.divergence.compare(a, b).double(), original.units(batch))
            if not np.isfinite(found).all():
                raise TersorError(f"{new.identity.source} gives NaN or infinity for batch {number + 1} of the data.")
            before.append(Predicted.of(original, batch, a))
            after.append(Predicted.of(new, batch, b))
            values.append(found)
    return before, after, np.concatenate(values)


def _once(model: Model, batch: Batch) -> Any:
    def run() -> None:
        with torch.no_grad():
            model.outputs(batch)

    return run


def _pairs(original: Model, new: Model, pairs: Pairs, sequence_length: int) -> Score:
    truth = pairs[2]

    def embedder(model: Any) -> Any:
        def embed(texts: list[str]) -> Tensor:
            with torch.no_grad(), decoded(model.module):
                found = [(n, model.outputs(b).cpu()) for n, b in model.encode_texts(texts, sequence_length, 64)]
            return torch.cat([outputs for _, outputs in found])[np.argsort(np.concatenate([n for n, _ in found]))]

        return embed

    a, b = pair_score(embedder(original), pairs), pair_score(embedder(new), pairs)
    return paired(
        "Spearman on pairs", len(truth), lambda i: spearman(a[i], truth[i]), lambda i: spearman(b[i], truth[i])
    )
