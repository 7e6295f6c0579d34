"""Shifting the biases of a reference model whose weights stand for a built one, as `tersor compress --recover` does.

On samples that the study has seen: of the check data, or of the calibration data where a model has none.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from models import Reference
from tersor.models import Model
from tersor.recover import means_of, shift_biases
from tersor.steps.compressing import RECOVERED, one_batch


class Recovery:
    """What the layers of a model that is still as it was give in the mean."""

    def __init__(self, known: Reference, model: Model) -> None:
        self._model = model
        seen, data = (known.samples, known.calibration) if known.check is None else (known.samples // 2, known.check)
        self._batch = one_batch(model, data, known.sequence_length, 0, min(seen, RECOVERED))
        self._masks = model.masks(self._batch)
        self._expected = means_of(model.module, self._run, self._masks)

    @property
    def layers(self) -> int:
        """How many layers have a bias to shift."""
        return len(self._expected)

    @contextmanager
    def shifted(self) -> Iterator[None]:
        """Inside, the biases of the model, whose weights have been replaced, are shifted."""
        if not self._expected:
            yield
            return
        biases = {name: self._model.module.get_submodule(name).get_parameter("bias") for name in self._expected}
        kept = {name: bias.detach().clone() for name, bias in biases.items()}
        try:
            shift_biases(self._model.module, self._run, self._expected, self._masks)
            yield
        finally:
            for name, bias in biases.items():
                bias.data.copy_(kept[name])

    def _run(self) -> object:
        return self._model.outputs(self._batch)
