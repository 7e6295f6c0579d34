"""Norms on weight errors, made from summaries."""

from tersor.metrics.metric import KINDS, Kept, Metric, Side

__all__ = ["KINDS", "Kept", "Metric", "Side"]
