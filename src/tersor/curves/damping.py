"""How much to damp the two moments of a metric, chosen on calibration data that was not used for them.

With too little damping a fit hides its error in directions that the sample saw little of, and the prediction fools
itself. So a few sites are fitted under each damping and judged under the moments of the held-back batches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from tersor.forms import IntForm, IntSetting, LowRankForm, LowRankSetting
from tersor.metrics import Metric

LADDER = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
NEAR = 1.01  # times the least divergence on held-back data, which is as good: of such dampings the largest is taken


@dataclass(frozen=True)
class Damping:
    """Shares of the mean diagonal added to the moment of inputs, of output gradients, of a table's frequencies."""

    inputs: float = 0.03
    gradients: float = 0.3
    frequencies: float = 0.3

    def apply(self, metric: Metric, *, table: bool) -> Metric:
        if table:
            return metric.damped(rows=self.frequencies, columns=self.gradients)
        return metric.damped(rows=self.gradients, columns=self.inputs)


@dataclass(frozen=True)
class Sample:
    """A weight with its metric from the fitted part of the calibration data and from the part held back."""

    weight: Tensor
    fitted: Metric
    held_back: Metric
    table: bool


def choose_damping(
    samples: list[Sample], progress: Callable[[int, int], Any] = lambda *_: None
) -> tuple[Damping, list[dict[str, Any]]]:
    """The damping with the least predicted divergence on held-back data, one coordinate after the other.

    What is held back is a sample too, and what is a little better there may be far worse in use where less is damped.
    Returns the damping with its evidence: for every one tried, what the fitted part and the held-back part predict.
    """
    chosen = Damping()
    evidence: list[dict[str, Any]] = []
    linear, tables = [s for s in samples if not s.table], [s for s in samples if s.table]
    tries = len(LADDER) * (2 * bool(linear) + bool(tables))

    def total(damping: Damping, members: list[Sample], fit: Callable[[Tensor, Metric], Tensor]) -> float:
        inside = outside = 0.0
        progress(len(evidence), tries)
        for sample in members:
            error = sample.weight - fit(sample.weight, damping.apply(sample.fitted, table=sample.table))
            inside += sample.fitted.distance(error)
            outside += sample.held_back.distance(error)
        evidence.append({**asdict(damping), "fitted": inside, "held_back": outside, "table": members[0].table})
        return outside

    def settle(name: str, members: list[Sample], fit: Callable[[Tensor, Metric], Tensor]) -> None:
        nonlocal chosen
        if members:
            values = asdict(chosen)
            found = {x: total(Damping(**{**values, name: x}), members, fit) for x in LADDER}
            least = min(found.values())
            chosen = Damping(**{**values, name: max(x for x in LADDER if found[x] <= NEAR * least)})

    settle("inputs", linear, _integers)
    settle("gradients", linear, _integers)
    settle("frequencies", tables, _factors)
    return chosen, evidence


def _integers(weight: Tensor, metric: Metric) -> Tensor:
    return IntForm().fit(weight, metric, IntSetting(3, 64)).dense()


def _factors(weight: Tensor, metric: Metric) -> Tensor:
    return LowRankForm().fit(weight, metric, LowRankSetting(max(1, weight.shape[1] // 3))).dense()
