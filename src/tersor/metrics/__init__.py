"""Norms on weight errors, made from summaries."""

from tersor.metrics.metric import KINDS, Metric, Side

__all__ = ["KINDS", "Metric", "Side"]
