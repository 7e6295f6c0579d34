"""Summaries from one pass over calibration data."""

from tersor.observe.by_block import collect_by_block
from tersor.observe.collect import collect, unseen
from tersor.observe.collector import Collector
from tersor.observe.store import load_metrics, store_summaries
from tersor.observe.summary import Summary, nearest_kronecker

__all__ = [
    "Collector",
    "Summary",
    "collect",
    "collect_by_block",
    "load_metrics",
    "nearest_kronecker",
    "store_summaries",
    "unseen",
]
