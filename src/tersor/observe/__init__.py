"""Summaries from one pass over calibration data."""

from tersor.observe.collect import Collector, collect, unseen
from tersor.observe.store import load_metrics, store_summaries
from tersor.observe.summary import Summary, nearest_kronecker

__all__ = ["Collector", "Summary", "collect", "load_metrics", "nearest_kronecker", "store_summaries", "unseen"]
