"""Measuring a divergence: the outputs of the model as it was against its outputs now, prediction by prediction.

Values are means over independent samples (windows, texts, images), so that intervals by resampling them are honest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tersor.models.files import read_tensors, write_safetensors
from tersor.models.model import Batch, Model
from tersor.models.ondemand import replaced
from tersor.models.prefix import Prefix
from tersor.models.sites import Site

FEWEST = 16  # independent samples that a standard error is told from


class Reference:
    """The outputs of a model on some batches as they were when this was made, in float32 on the CPU.

    With a `folder` they lie in files of it, and memory holds those of one batch.
    """

    def __init__(self, model: Model, batches: Sequence[Batch], folder: Path | None = None) -> None:
        self.model, self.batches = model, batches
        self._prefix = Prefix(model.module, self._output, len(batches))
        self._select: Callable[[int], None] = lambda _: None
        outputs = (self._output(number).cpu() for number in range(len(batches)))
        self.outputs: Sequence[Tensor] = list(outputs) if folder is None else _InFiles(folder, outputs)
        self.units = [model.units(batch) for batch in batches]

    def _output(self, number: int) -> Tensor:
        with torch.no_grad():
            return self.model.outputs(self.batches[number]).float()

    @contextmanager
    def starting_at(self, site: Site) -> Iterator[None]:
        """Inside, a divergence costs only what the model computes from `site` on; nothing before it may change."""
        with self._prefix.skipped(site, self.outputs[0]) as select:
            self._select = select
            try:
                yield
            finally:
                self._select = lambda _: None

    def divergences(self, batches: Iterable[int] | None = None) -> np.ndarray:
        """The mean divergence of every sample, of all batches or of these, between then and now, float64."""
        return np.concatenate(list(self._compared(range(len(self.batches)) if batches is None else batches)))

    def divergence(self, batches: Iterable[int] | None = None) -> float:
        return float(self.divergences(batches).mean())

    def told(self, within: float) -> tuple[float, list[int]]:
        """The divergence over as many samples as tell it with a standard error of `within` times it, and their batches.

        These are spread over all, as batches may be in the order of their lengths.
        """
        order, found = _spread(len(self.batches)), np.empty(0)
        for count, values in enumerate(self._compared(order), 1):
            found = np.concatenate([found, values])
            if len(found) >= FEWEST and 0 < found.std(ddof=1) <= within * found.mean() * len(found) ** 0.5:
                return float(found.mean()), order[:count]
        return float(found.mean()), order

    def _compared(self, batches: Iterable[int]) -> Iterator[np.ndarray]:
        """The divergences of the samples of each of these batches."""
        for number in batches:
            self._select(number)
            now = self._output(number)
            values = self.model.divergence.compare(self.outputs[number].to(now.device), now).double().cpu()
            yield mean_by_unit(values, self.units[number])


def _spread(count: int) -> list[int]:
    """The numbers below `count`, the middle first, then the middles of what lies on both sides of it, and so on."""
    found, parts = [], [(0, count)]
    for start, stop in parts:
        if start < stop:
            middle = (start + stop) // 2
            found.append(middle)
            parts += [(start, middle), (middle + 1, stop)]
    return found


class _InFiles(Sequence[Tensor]):
    """Tensors in files of a folder, each read when it is asked for."""

    def __init__(self, folder: Path, tensors: Iterable[Tensor]) -> None:
        self._paths: list[Path] = []
        for number, tensor in enumerate(tensors):
            self._paths.append(folder / f"{number}.safetensors")
            write_safetensors(self._paths[-1], {"output": tensor})

    def __getitem__(self, number: Any) -> Any:
        return read_tensors(self._paths[number])["output"]

    def __len__(self) -> int:
        return len(self._paths)


def mean_by_unit(values: Tensor, units: Tensor) -> np.ndarray:
    """Means of values (predictions,) over those of the same unit (predictions,)."""
    count = int(units.max()) + 1
    sums = torch.zeros(count, dtype=torch.float64).index_add_(0, units, values)
    sizes = torch.zeros(count, dtype=torch.float64).index_add_(0, units, torch.ones_like(values))
    return (sums / sizes.clamp_min(1)).numpy()


@contextmanager
def substituted(model: Model, site: Site, matrices: Tensor) -> Iterator[None]:
    """The model with the weight of `site` replaced by `matrices` (stack, rows, columns), put back at the end."""
    with replaced(site.parameter(model.module), site.to_parameter(matrices)):
        yield
