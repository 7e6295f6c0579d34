"""Summaries in the run folder, and the metrics that are made of them.

A file a site; in it the summaries of every matrix of its stack and of every way in which the model uses it.
"""

from __future__ import annotations

from torch import Tensor

from tersor.metrics import Metric, Side
from tersor.models.sites import Site
from tersor.observe.collector import Collector
from tersor.observe.summary import Summary, nearest_kronecker
from tersor.run.folder import Run

FEW_POSITIONS = 0.1  # an expert that saw less than this share of the mean borrows the moments of all


def file_of(site: Site, part: str) -> str:
    """The name under which the summaries of `part` (`fit` or `check`) of a site are stored."""
    return f"summaries/{part}/{site.name}"


def store_summaries(run: Run, sites: tuple[Site, ...], collector: Collector, part: str) -> None:
    """Write the summaries of all sites that the model used; a site without a file was not used."""
    for site in sites:
        tensors: dict[str, Tensor] = {}
        for (name, index, use), summary in collector.summaries.items():
            if name == site.name:
                orientation = "rows" if collector.rows_are_inputs[name, index, use] else "columns"
                for field, value in summary.tensors().items():
                    tensors[f"{index}|{use}|{orientation}|{field}"] = value
        if tensors:
            run.put_tensors(file_of(site, part), tensors)


def load_metrics(run: Run, site: Site, kind: str, part: str = "fit") -> list[Metric]:
    """The undamped metric of every matrix of the stack of a site that was used."""
    found = _load(run, site, part)
    uses = sorted({(use, orientation) for _, use, orientation in found})
    pooled = {use: _sum([s for (_, *u), s in found.items() if tuple(u) == use]) for use in uses}
    metrics = []
    for index in range(site.stack):
        parts = []
        for use in uses:
            summary = found.get((index, *use))
            mean = pooled[use].positions / site.stack
            own = 0.0 if summary is None else summary.positions
            seen = summary if summary and own >= FEW_POSITIONS * mean else pooled[use]
            seen = seen.with_unseen_rows() if use[0] == "table" else seen
            metric = seen.metric(kind, rows_are_inputs=use[1] == "rows")
            scale = 0.5 * max(own, 1.0) / max(pooled[use].predictions, 1.0)
            parts.append(Metric(metric.kind, metric.rows, metric.columns, scale))
        metrics.append(nearest_kronecker(parts))
    return [Metric(kind, m.rows, m.columns, m.scale) for m in metrics]


def load_output_metric(run: Run, site: Site) -> tuple[Side, float] | None:
    """What errors of the outputs of a site's matrix are predicted to cost; None where no product with it was seen."""
    if not run.has_tensors(file_of(site, "fit")):
        return None
    found = [s for (_, use, _), s in _load(run, site, "fit").items() if use == "linear"]
    return _sum(found).output_metric if found else None


def captured_share(run: Run, site: Site) -> float:
    """The captured share of the most-used matrix of a site (NaN for tables and without gradients)."""
    return max(_load(run, site, "fit").values(), key=lambda s: s.positions).captured_share


def _load(run: Run, site: Site, part: str) -> dict[tuple[int, str, str], Summary]:
    grouped: dict[tuple[int, str, str], dict[str, Tensor]] = {}
    stored = run.tensors(file_of(site, part))
    with run.reading(file_of(site, part)):
        for key, tensor in stored.items():
            index, use, orientation, field = key.split("|")
            grouped.setdefault((int(index), use, orientation), {})[field] = tensor
        return {key: Summary.from_tensors(tensors) for key, tensors in grouped.items()}


def _sum(summaries: list[Summary]) -> Summary:
    total = summaries[0]
    for summary in summaries[1:]:
        total = total + summary
    total.predictions = summaries[0].predictions
    return total
