"""Metrics of one block of sites whose inputs are observed anew, as a prefix that is already built produces them.

The study weights inputs by the gradients that they meet and brings the product of both moments to the scale of nats;
inputs that are observed without gradients have another scale, which differs from site to site, so they are brought to
the trace of the study's. With gradients, the inputs are weighted as the study's are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

from tersor.curves.damping import Damping
from tersor.metrics import Metric, Side
from tersor.models import Batch, Model, Site
from tersor.observe import collect, load_metrics
from tersor.run import Run


def blocks_of(sites: Sequence[Site]) -> Iterator[list[Site]]:
    """The sites of every layer in their order."""
    for _, members in groupby(sites, key=lambda site: site.name.split(".")[2]):
        yield list(members)


def observed_again(
    run: Run, model: Model, members: Sequence[Site], batches: Sequence[Batch], gradients: bool
) -> dict[str, Metric]:
    """The damped metric of every member: inputs as the model now produces them, output moments as in the study."""
    collector = collect(model, members, batches, gradients=gradients, seed=0)
    damping = Damping(**run.get("damping"))
    metrics = {}
    for site in members:
        (known,), summary = load_metrics(run, site, run.get("metric")), collector.summaries[site.name, 0, "linear"]
        inputs = (summary.weighted_inputs if gradients else summary.inputs).float()
        inputs = inputs * (known.columns.moment.trace() / inputs.trace())
        again = damping.apply(Metric(known.kind, known.rows, Side(inputs), known.scale), table=False)
        metrics[site.name] = Metric(again.kind, again.rows, again.columns, again.scale, known)
    return metrics
