"""The pass over the calibration data where weights are read on demand: all batches through block after block.

Memory holds one block, one batch and the summaries of the sites between two cuts; they are handed over before the next
stretch begins. With gradients the blocks run twice: forwards, and once more on the way back.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tersor.errors import TersorError
from tersor.models.divergence import Divergence
from tersor.models.model import Batch, Model
from tersor.models.passage import Passage
from tersor.models.sites import Site
from tersor.observe.collect import frozen, generator_of, outputs_of, refuse_not_finite
from tersor.observe.collector import Collector
from tersor.observe.summary import Summary

Progress = Callable[[int, int], Any]
_INSTEAD = "cannot be observed block by block; leave out --memory"


def collect_by_block(
    model: Model,
    sites: Iterable[Site],
    batches: Sequence[Batch],
    folder: Path,
    *,
    gradients: bool,
    seed: int,
    divergence: Divergence | None = None,
    key: str = "",
    progress: Progress = lambda *_: None,
) -> Iterator[Collector]:
    """Yield the collectors of all stretches of the model, each with the summaries of what ran there.

    What blocks hand on lies in `folder`, which is removed at the end. Where a process with the same `key` was stopped,
    the stretches whose collectors it yielded, and went on from, are not run again. Weights with several places, which
    may lie in several stretches, come last. Raises TersorError where the model is no chain of blocks, or where
    gradients go around them.
    """
    progress(0, 1)
    with frozen(model.module):
        passage = Passage(model.module, partial(_outputs, model, batches), batches, folder, key)
        try:
            if passage.stretches == 1:
                source = model.identity.source
                raise TersorError(f"{source} is no chain of blocks that run one after another, so it {_INSTEAD}.")
            chosen = divergence or model.divergence

            def probe(output: Tensor, number: int) -> Tensor:
                return chosen.probe(output, generator_of(seed, number, model.device))

            given = (batches, passage, probe if gradients else None, progress)
            observed = _Observed(model, tuple(sites), *given)
            yield from observed.collectors()
            passage.close()
        except TersorError as error:
            if not isinstance(error.__cause__, OSError):  # of the model or the data: the next process will meet it too
                passage.close()
            raise
        finally:
            passage.leave()


def _outputs(model: Model, batches: Sequence[Batch], number: int) -> Tensor:
    return outputs_of(model, batches[number], number + 1)


@dataclass
class _Observed:
    """A model on its passage; `probe` makes the scalar whose gradients are watched, of an output and its number."""

    model: Model
    sites: tuple[Site, ...]
    batches: Sequence[Batch]
    passage: Passage
    probe: Callable[[Tensor, int], Tensor] | None
    progress: Progress

    def collectors(self) -> Iterator[Collector]:
        numbers = range(self.passage.stretches)
        steps = len(numbers) * (1 if self.probe is None else 2)
        spool, visit, forget = self.passage.spool, self._forwards, self.passage.forget
        if self.probe is not None:
            for number in numbers[:-1]:
                self.progress(number, steps)
                if not spool.is_done(f"forwards {number}"):
                    self.passage.advance(number)
                    spool.mark(f"forwards {number}")
            numbers, visit, forget = numbers[::-1], self._backwards, self.passage.forget_gradients
        for done, number in enumerate(numbers, steps - len(numbers)):
            self.progress(done, steps)
            if not spool.is_done(f"observed {number}"):
                collector = self._stretch(number, visit)
                spool.put("tied", number, self._tied(collector))
                yield collector
                spool.mark(f"observed {number}")
            forget(number)
        yield self._of_tied(spool.get("tied", number) for number in numbers)

    def _collector(self, sites: tuple[Site, ...]) -> Collector:
        return Collector(self.model, sites, gradients=self.probe is not None)

    def _finished(self, collector: Collector) -> Collector:
        collector.finish(sum(len(self.model.units(batch)) for batch in self.batches))
        return collector

    def _stretch(self, number: int, visit: Callable[[int, int, Callable[[], None]], None]) -> Collector:
        """Put all batches through a stretch under a collector that counts from its beginning on."""
        collector = self._collector(self.sites)
        with self.passage.holding(number):
            for batch, given in enumerate(self.batches):
                collector.begin(self.model.masks(given), len(self.batches) - 1 - batch, counting=False)
                with collector:
                    visit(number, batch, collector.count)
        if collector.strays:
            raise TersorError(
                f"Gradients reach {min(collector.strays)} past the blocks between, so {self.model.identity.source} "
                f"{_INSTEAD}, or take --metric input."
            )
        return self._finished(collector)

    def _tied(self, collector: Collector) -> dict[str, Any]:
        """Take the summaries of weights with several places out of a collector; they come last."""
        tied = {site.name for site in self.sites if len(site.places) > 1}
        keys = [key for key in collector.summaries if key[0] in tied]
        return {json.dumps([*key, collector.rows_are_inputs[key]]): vars(collector.summaries.pop(key)) for key in keys}

    def _of_tied(self, parts: Iterable[dict[str, Any]]) -> Collector:
        """A collector with the sums of these."""
        collector = self._collector(())
        for text, values in (item for part in parts for item in part.items()):
            *found, rows_are_inputs = json.loads(text)
            key, summary = (found[0], found[1], found[2]), Summary(**values)
            collector.add({key: summary}, {key: rows_are_inputs})
        return self._finished(collector)

    def _forwards(self, number: int, batch: int, begun: Callable[[], None]) -> None:
        with torch.no_grad():
            output = self.passage.forward(number, batch, begun)
        if number == self.passage.stretches - 1:
            refuse_not_finite(output, batch + 1)

    def _backwards(self, number: int, batch: int, begun: Callable[[], None]) -> None:
        def loss(output: Tensor) -> Tensor:
            refuse_not_finite(output, batch + 1)
            assert self.probe is not None
            return self.probe(output, batch + 1)

        self.passage.backward(number, batch, begun, loss)
