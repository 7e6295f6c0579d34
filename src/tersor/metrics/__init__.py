"""Norms on weight errors, made from summaries."""

from tersor.metrics.metric import KINDS, Felt, Kept, Metric, Side

__all__ = ["KINDS", "Felt", "Kept", "Metric", "Side"]
