"""The pass over the calibration data where weights are read on demand: all batches through block after block.

Memory holds one block, one batch and the summaries of the sites between two cuts; they are handed over before the next
stretch begins. With gradients the blocks run twice: forwards, and once more on the way back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tersor.errors import TersorError
from tersor.models.divergence import Divergence
from tersor.models.model import Batch, Model, size_of
from tersor.models.passage import Passage
from tersor.models.sites import Site
from tersor.observe.collect import Collector, frozen, outputs_of, refuse_not_finite

Progress = Callable[[int, int], Any]


def collect_by_block(
    model: Model,
    sites: Iterable[Site],
    batches: Sequence[Batch],
    folder: Path,
    *,
    gradients: bool,
    seed: int,
    divergence: Divergence | None = None,
    progress: Progress = lambda *_: None,
) -> Iterator[Collector]:
    """Yield the collectors of all stretches of the model, each with the summaries of what ran there.

    What blocks hand on lies in `folder`, which is removed at the end. Weights with several places, which may lie in
    several stretches, come last. Raises TersorError where the model is no chain of blocks, or where
    gradients go around them.
    """
    sites, divergence = tuple(sites), divergence or model.divergence
    generator = torch.Generator(model.device).manual_seed(seed)
    predictions = sum(len(model.units(batch)) for batch in batches)
    smallest = min(range(len(batches)), key=lambda number: size_of(batches[number]))

    def run(number: int) -> Tensor:
        return outputs_of(model, batches[number], number + 1)

    with frozen(model.module):
        passage = Passage(model.module, run, len(batches), smallest, folder)
        if passage.stretches == 1:
            passage.close()
            raise TersorError(
                f"{model.identity.source} is no chain of blocks that run one after another, so it cannot be observed "
                "block by block; leave out --memory."
            )
        steps = passage.stretches * (2 if gradients else 1)
        tied, late = {site.name for site in sites if len(site.places) > 1}, Collector(model, (), gradients=gradients)

        def stretch(number: int, done: int, visit: Callable[[Collector, int], None]) -> Collector:
            """Put all batches through a stretch under a collector that counts from its beginning on."""
            collector = Collector(model, sites, gradients=gradients)
            with passage.holding(number):
                for batch, given in enumerate(batches):
                    progress(done, steps)
                    collector.begin(model.masks(given), counting=False)
                    with collector:
                        visit(collector, batch)
            if collector.strays:
                raise TersorError(
                    f"Gradients reach {min(collector.strays)} past the blocks between, so {model.identity.source} "
                    "cannot be observed block by block; leave out --memory, or take --metric input."
                )
            for key in [key for key in collector.summaries if key[0] in tied]:
                summary = collector.summaries.pop(key)
                late.rows_are_inputs[key] = collector.rows_are_inputs[key]
                late.summaries[key] = late.summaries[key] + summary if key in late.summaries else summary
            collector.finish(predictions)
            return collector

        def forwards(number: int, collector: Collector | None, batch: int) -> None:
            with torch.no_grad():
                output = passage.forward(number, batch, lambda: _count(collector))
            if number == passage.stretches - 1:
                refuse_not_finite(output, batch + 1)

        def backwards(number: int, collector: Collector, batch: int) -> None:
            def loss(output: Tensor) -> Tensor:
                refuse_not_finite(output, batch + 1)
                return divergence.probe(output, generator)

            passage.backward(number, batch, lambda: _count(collector), loss)

        try:
            if not gradients:
                for number in range(passage.stretches):
                    yield stretch(number, number, partial(forwards, number))
                    passage.forget(number)
            else:
                for number in range(passage.stretches - 1):
                    with passage.holding(number):
                        for batch in range(len(batches)):
                            progress(number, steps)
                            forwards(number, None, batch)
                for done, number in enumerate(reversed(range(passage.stretches)), passage.stretches):
                    yield stretch(number, done, partial(backwards, number))
            late.finish(predictions)
            yield late
        finally:
            passage.close()


def _count(collector: Collector | None) -> None:
    if collector is not None:
        collector.counting = True
