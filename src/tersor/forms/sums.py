"""Sums of two forms: fit one, then the other on what is left, and again, keeping the best iterate.

`int+lowrank` with no alternation is a low-rank correction of the quantisation error (P160 EoRA, P260 LQER by the
metric); with alternation it is P027 LQ-LoRA's decomposition.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tersor.errors import TersorError
from tersor.forms.base import Candidate, Form, Operator, Shape, cost_of, fitted_candidate
from tersor.forms.products import SumOperator
from tersor.metrics import Metric


@dataclass(frozen=True)
class SumSetting:
    """The settings of the two terms and how often the fit alternates between them after the first round."""

    first: Any
    second: Any
    alternations: int = 0

    @property
    def label(self) -> str:
        again = f" x{self.alternations}" if self.alternations else ""
        return f"{self.first.label} + {self.second.label}{again}"


class SumForm:
    """Two forms added; `pairs(shape)` is the ladder of their settings."""

    def __init__(self, first: Form, second: Form, pairs: Any, wins: str) -> None:
        self.first, self.second, self.pairs, self.wins = first, second, pairs, wins
        self.name = f"{first.name}+{second.name}"
        self.stores = f"what {first.name} and {second.name} store"

    def settings(self, shape: Shape) -> Iterable[SumSetting]:
        for first, second in self.pairs(shape):
            yield SumSetting(first, second)

    def setting(self, values: Mapping[str, Any]) -> SumSetting:
        if not {"first", "second"} <= set(values):
            raise TersorError(f"{self.name}: a setting needs `first` and `second`, but has {sorted(values)}.")
        return SumSetting(
            self.first.setting(values["first"]), self.second.setting(values["second"]), values.get("alternations", 0)
        )

    def probe(self, shape: Shape, curve: Sequence[Candidate]) -> None:
        return None

    def empty(self, shape: Shape, setting: SumSetting) -> SumOperator:
        return SumOperator(self.first.empty(shape, setting.first), self.second.empty(shape, setting.second), setting)

    def curve(self, weight: Tensor, metric: Metric, settings: Iterable[SumSetting] | None = None) -> list[Candidate]:
        """Settings that share their first term share its fit, and the curve of the second on what it leaves."""
        shape: Shape = (weight.shape[0], weight.shape[1])
        ladder = list(self.settings(shape) if settings is None else settings)
        drawn = {s: fitted_candidate(self, weight, metric, s)[1] for s in ladder if s.alternations}
        for first in dict.fromkeys(s.first for s in ladder if not s.alternations):
            sharing = [s for s in ladder if s.first == first and not s.alternations]
            left_over = weight.float() - self.first.fit(weight, metric, first).dense()
            seconds = self.second.curve(left_over, metric, [s.second for s in sharing])
            for setting, second in zip(sharing, seconds, strict=True):
                cost = cost_of(self, shape, setting)
                drawn[setting] = Candidate(self.name, setting, cost, second.divergence)
        return [drawn[setting] for setting in ladder]

    def fit(self, weight: Tensor, metric: Metric, setting: SumSetting) -> Operator:
        weight = weight.detach().float()
        best: tuple[float, SumOperator] | None = None
        correction = weight.new_zeros(weight.shape)
        for _ in range(setting.alternations + 1):
            first = self.first.fit(weight - correction, metric, setting.first)
            second = self.second.fit(weight - first.dense(), metric, setting.second)
            operator = SumOperator(first, second, setting)
            distance = metric.distance(weight - operator.dense())
            if best is None or distance < best[0]:
                best = distance, operator
            correction = second.dense()
        assert best is not None
        return best[1]
