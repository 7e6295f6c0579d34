"""One judge for all benchmarks: divergence to the original and task score on held-out data, with their intervals."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from models import Reference
from tersor.judge.intervals import bootstrap
from tersor.models import Model
from tersor.models.compare import Reference as Outputs


@dataclass(frozen=True)
class Judge:
    """The outputs of a model as it was, against which the same model is judged with other weights in it."""

    known: Reference
    model: Model
    held: Outputs

    @classmethod
    def of(cls, known: Reference, model: Model) -> Judge:
        batches = model.batches(known.held_out, known.held_out_samples, known.sequence_length, known.batch_size)
        with torch.no_grad():
            return cls(known, model, Outputs(model, model.compact(batches)))

    def divergences(self) -> np.ndarray:
        """The divergence (samples,) of every held-out sample, of the model as it is now."""
        return self.held.divergences()

    def score(self) -> dict[str, float]:
        """The task score of the model as it is now."""
        scores, summarise = self.known.score(self.model), self.known.summarise
        return asdict(bootstrap(lambda i: summarise(scores, i), len(scores), resamples=400))

    def measured(self) -> dict[str, Any]:
        """Divergence and score of the model as it is now."""
        return {"divergence": mean_of(self.divergences()), "score": self.score()}


def mean_of(values: np.ndarray) -> dict[str, float]:
    """The mean of values (samples,) with its interval."""
    return asdict(bootstrap(lambda i: float(values[i].mean()), len(values)))


def ratio_of(values: np.ndarray, others: np.ndarray) -> dict[str, float]:
    """The ratio of two means over the same samples (samples,), with its paired interval."""
    return asdict(bootstrap(lambda i: float(values[i].mean() / others[i].mean()), len(values)))
