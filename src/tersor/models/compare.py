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


class Reference:
    """The outputs of a model on some batches as they were when this was made, in float32 on the CPU.

    With a `folder` they lie in files of it, and memory holds those of one batch.
    """

    def __init__(self, model: Model, batches: Sequence[Batch], folder: Path | None = None) -> None:
        self.model, self.batches = model, batches
        self._prefix = Prefix(model.module, self._output, len(batches))
        self._select: Callable[[int], None] = lambda _: None
        outputs = (output.cpu() for output in self._run())
        self.outputs: Sequence[Tensor] = list(outputs) if folder is None else _InFiles(folder, outputs)
        self.units = [model.units(batch) for batch in batches]

    def _output(self, number: int) -> Tensor:
        with torch.no_grad():
            return self.model.outputs(self.batches[number]).float()

    def _run(self) -> Iterator[Tensor]:
        for number in range(len(self.batches)):
            self._select(number)
            yield self._output(number)

    @contextmanager
    def starting_at(self, site: Site) -> Iterator[None]:
        """Inside, a divergence costs only what the model computes from `site` on; nothing before it may change."""
        with self._prefix.skipped(site, self.outputs[0]) as select:
            self._select = select
            try:
                yield
            finally:
                self._select = lambda _: None

    def divergences(self) -> np.ndarray:
        """The mean divergence of every independent sample between then and now, float64."""
        out = []
        for before, now, units in zip(self.outputs, self._run(), self.units, strict=True):
            values = self.model.divergence.compare(before.to(now.device), now).double().cpu()
            out.append(mean_by_unit(values, units))
        return np.concatenate(out)

    def divergence(self) -> float:
        return float(self.divergences().mean())


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
