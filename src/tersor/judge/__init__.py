"""Measuring a built model against the original on held-out data."""

from tersor.judge.intervals import Estimate, bootstrap
from tersor.judge.judge import Judgement, judge

__all__ = ["Estimate", "Judgement", "bootstrap", "judge"]
