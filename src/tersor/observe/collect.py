"""One pass over the calibration data, a group of batches at a time: here, or as units of work on an engine.

Every group has summaries of its own, which are added in the order of the groups, and the random probe of a batch
depends on the seed and its number alone. So the sums are the same to the bit for any number of workers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tersor.engine import map_units, threads
from tersor.errors import TersorError
from tersor.models.compare import substituted
from tersor.models.divergence import Divergence
from tersor.models.model import Batch, Model
from tersor.models.sites import Site
from tersor.observe.collector import Collector
from tersor.observe.sending import Part, SentPart, packed, received, sent, unpacked

GROUP = 4  # batches that share summaries: enough work to be worth adding these
Group = Sequence[tuple[int, Batch]]  # batches with their numbers, from 1


def collect(
    model: Model,
    sites: Iterable[Site],
    batches: Iterable[Batch],
    *,
    gradients: bool,
    seed: int,
    divergence: Divergence | None = None,
    workers: int | None = None,
    progress: Callable[[int, int], Any] = lambda *_: None,
) -> Collector:
    """Run the model over `batches` and return the collector with its summaries; the model is left as it was.

    Gradients are those of the probe of `divergence`, by default the model's. With `workers`, groups of batches are
    units of work of the engine, on one thread each. Without, or where the model cannot be sent, they run here, on all
    threads.
    """
    task = Pass(tuple(sites), divergence or model.divergence, gradients, seed)
    numbered = list(enumerate(batches, 1))
    count = -(-len(numbered) // GROUP)
    groups = [numbered[k::count] for k in range(count)]  # of like work, where batches are in the order of their length
    total, predictions, done = Collector(model, task.sites, gradients=gradients), 0, 0
    progress(0, len(numbered))
    for group, part in zip(groups, _parts(model, task, groups, workers), strict=True):
        total.add(part.summaries, part.rows_are_inputs)
        predictions, done = predictions + part.predictions, done + len(group)
        progress(done, len(numbered))
    total.finish(predictions)
    return total


@dataclass(frozen=True)
class Pass:
    """What is watched, and under which probes: the same for all groups."""

    sites: tuple[Site, ...]
    divergence: Divergence
    gradients: bool
    seed: int

    def over(self, model: Model, group: Group) -> Part:
        """The summaries of a group."""
        collector, predictions = Collector(model, self.sites, gradients=self.gradients), 0
        with frozen(model.module):
            for place, (number, batch) in enumerate(group, 1):
                collector.begin(model.masks(batch), len(group) - place)
                with torch.set_grad_enabled(self.gradients), collector:
                    output = outputs_of(model, batch, number)
                refuse_not_finite(output, number)
                predictions += output.shape[0]
                if self.gradients:
                    self.divergence.probe(output, generator_of(self.seed, number, model.device)).backward()
        return Part(collector.summaries, collector.rows_are_inputs, predictions)


def _parts(model: Model, task: Pass, groups: Sequence[Group], workers: int | None) -> Iterator[Part]:
    """The summaries of every group, in their order."""
    shared = None if workers is None else packed(model, task)
    if shared is None:
        for group in groups:
            yield task.over(model, group)
        return
    units = ((group, partial(tuple, [group])) for group in groups)
    for group, found in map_units(observe_group, units, workers, in_order=True, shared=(shared,)):
        if found is None:
            with threads(1):
                part = task.over(model, group)
            yield part
        else:
            yield received(found)


def observe_group(shared: Tensor, group: Group) -> SentPart | None:
    """The summaries of a group, with a model and a pass as they were packed; None where they cannot be unpacked."""
    found = unpacked(shared)
    return None if found is None else sent(found[1].over(found[0], group))


def generator_of(seed: int, number: int, device: torch.device) -> torch.Generator:
    """Where the random probe of a batch comes from."""
    state = np.random.SeedSequence([seed % (1 << 64), number]).generate_state(1)
    return torch.Generator(device).manual_seed(int(state[0]))


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Inside, a module is in evaluation mode and no parameter of it asks for a gradient."""
    required = [(p, p.requires_grad) for p in module.parameters()]
    training = module.training
    module.eval()
    module.requires_grad_(False)
    try:
        yield
    finally:
        module.train(training)
        for parameter, flag in required:
            parameter.requires_grad_(flag)


def refuse_not_finite(output: Tensor, number: int) -> None:
    """Raise TersorError where the output of a model for a batch has NaN or infinite entries."""
    if not output.isfinite().all():
        raise TersorError(f"The model's outputs for batch {number} of the data are NaN or infinite.")


def outputs_of(model: Model, batch: Batch, number: int) -> Tensor:
    """The outputs of the model; what it raises for data that do not suit it becomes a TersorError."""
    try:
        return model.outputs(batch)
    except (RuntimeError, IndexError, KeyError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise TersorError(f"The model failed on batch {number} of the data: {reason}.") from error


def unseen(model: Model, sites: Iterable[Site], batch: Batch) -> list[str]:
    """Names of the sites among those not observed that the model uses nevertheless, in a way that cannot be watched.

    With a weight at zero, the outputs for `batch` change if, and only if, something reads it.
    """
    with torch.no_grad():
        before = model.outputs(batch)
        found = []
        for site in sites:
            with substituted(model, site, torch.zeros(site.stack, *site.shape, device=model.device)):
                if not torch.equal(before, model.outputs(batch)):
                    found.append(site.name)
    return found
