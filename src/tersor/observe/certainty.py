"""How sure a model is of its calibration data, beside data that it was not trained on.

Where a classifier is certain of every prediction, a sampled label is always the one it expects and no gradient is seen:
a network that knows its training images by heart seems to bear any damage. So labels are sampled at the temperature at
which the model is as unsure of the calibration data as it is of the data that predictions are checked on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tersor.models import Batch, Model
from tersor.observe.collect import outputs_of

BATCHES = 8
PREDICTIONS = 4096
ENOUGH = 0.98  # of the entropy on the other data: no softer than this
HOTTEST = 64.0
CERTAIN = 0.01  # of the entropy of a guess: below it, a model is all but certain


@dataclass(frozen=True)
class Certainty:
    """Mean entropies of the predictions, in nats, on the two parts of the data, and the temperature of the labels."""

    fitted: float
    checked: float
    classes: int
    temperature: float

    @property
    def is_certain(self) -> bool:
        """Whether hardly any damage can be seen on either part."""
        return max(self.fitted, self.checked) < CERTAIN * math.log(max(self.classes, 2))


def certainty(model: Model, fit: Sequence[Batch], check: Sequence[Batch], *, soften: bool = True) -> Certainty:
    """Compare the two parts on some of their batches; the outputs of the model are logits (predictions, classes).

    Where both parts are of the same data any difference is that of samples, so there is nothing to `soften`.
    """
    fitted, checked = (_logits(model, batches) for batches in (fit, check))
    target = mean_entropy(checked, 1.0)
    temperature = 1.0
    if soften and mean_entropy(fitted, 1.0) < ENOUGH * target:
        low, high = 0.0, math.log(HOTTEST)
        while high - low > 1e-3:
            middle = (low + high) / 2
            low, high = (middle, high) if mean_entropy(fitted, math.exp(middle)) < target else (low, middle)
        temperature = math.exp(high)
    return Certainty(mean_entropy(fitted, 1.0), target, fitted.shape[-1], temperature)


def mean_entropy(logits: Tensor, temperature: float) -> float:
    """The mean entropy of predictions (n, classes) at a temperature, in nats."""
    logs = (logits / temperature).log_softmax(-1)
    return float(-(logs.exp() * logs).sum(-1).mean())


def _logits(model: Model, batches: Sequence[Batch]) -> Tensor:
    chosen = range(0, len(batches), max(1, len(batches) // BATCHES))[:BATCHES]
    with torch.no_grad():
        outputs = [outputs_of(model, batches[number], number + 1).float() for number in chosen]
    few = [o.reshape(-1, o.shape[-1]) for o in outputs]
    return torch.cat([o[:: max(1, len(o) * len(few) // PREDICTIONS)].cpu() for o in few])
