"""Any `torch.nn.Module`, from Python or from the shell as `package.module:factory` or `file.py:factory`.

Inputs are tensors, tuples or dictionaries, passed as the module's arguments; a batch may be (inputs, labels). Beside
the factory, a file may define `preprocess(arrays) -> Tensor`, or `MEAN` and `STD` for images.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tersor.data import Data
from tersor.errors import TersorError
from tersor.models.divergence import Divergence, divergence_named
from tersor.models.files import file_bytes, open_checkpoint, read_tensors
from tersor.models.model import Batch, Identity, device_of
from tersor.models.ondemand import is_on_demand, take_from_file, values_of, without_weights


@dataclass(frozen=True)
class Example:
    """One batch: `inputs` as a tuple of arguments or a dictionary of them, and labels where known."""

    inputs: tuple[Any, ...] | dict[str, Any]
    labels: Tensor | None = None


class ModuleModel:
    """A module whose outputs are (batch, ...): logits, embeddings or values, as its divergence says."""

    def __init__(
        self,
        module: nn.Module,
        divergence: str | Divergence = "kl",
        preprocess: Callable[[np.ndarray], Tensor] | None = None,
        source: str = "",
        device: str = "cpu",
    ) -> None:
        self.module = module.eval()
        if not is_on_demand(module):
            module.to(device)
        self.divergence = divergence_named(divergence) if isinstance(divergence, str) else divergence
        self.preprocess = preprocess or _as_tensor
        state = module.state_dict(keep_vars=True)
        self.identity = Identity(
            "module",
            source or type(module).__name__,
            _fingerprint(state),
            file_bytes((k, tuple(v.shape), v.dtype) for k, v in _distinct(module).items()),
        )

    def maker(self) -> Callable[[], ModuleModel]:
        source, divergence = self.identity.source, self.divergence
        if ":" in source:  # its classes may be those of a file, which only the factory knows
            return partial(_made_again, source, divergence, self.module.state_dict())
        return partial(ModuleModel, self.module, divergence, self.preprocess, source)

    @property
    def device(self) -> torch.device:
        return device_of(self.module)

    def batches(
        self, data: Data, samples: int | None, sequence_length: int, batch_size: int, seed: int | None = None
    ) -> Sequence[Batch]:
        if data.batches is not None:
            return [self._example(batch) for batch in data.batches]
        if data.arrays is None:
            raise TersorError(f"{data.source} holds text, but a module of its own takes arrays or batches.")
        count = min(samples or 512, len(data.arrays))
        chosen = data if seed is None else data.sampled(count, seed)
        assert chosen.arrays is not None
        out = []
        for start in range(0, count, batch_size):
            stop = min(start + batch_size, count)
            labels = None if chosen.labels is None else torch.as_tensor(chosen.labels[start:stop])
            out.append(Example((self.preprocess(chosen.arrays[start:stop]).to(self.device),), labels))
        return out

    def compact(self, batches: Sequence[Batch]) -> Sequence[Batch]:
        return batches

    def _example(self, batch: Any) -> Example:
        if isinstance(batch, Example):
            return batch
        labels = None
        if isinstance(batch, tuple | list) and len(batch) == 2 and isinstance(batch[1], Tensor):
            batch, labels = batch
        move = self.device

        def moved(value: Any) -> Any:
            return value.to(move) if isinstance(value, Tensor) else value

        if isinstance(batch, dict):
            return Example({k: moved(v) for k, v in batch.items()}, labels)
        if isinstance(batch, tuple | list):
            return Example(tuple(moved(v) for v in batch), labels)
        return Example((moved(batch),), labels)

    def masks(self, batch: Batch) -> list[Tensor]:
        return []

    def outputs(self, batch: Batch) -> Tensor:
        inputs = batch.inputs
        result = self.module(**inputs) if isinstance(inputs, dict) else self.module(*inputs)
        if not isinstance(result, Tensor):
            raise TersorError(f"The module must return one tensor, but returned {type(result).__name__}.")
        return result

    def labels(self, batch: Batch) -> Tensor | None:
        labels: Tensor | None = batch.labels
        return labels

    def units(self, batch: Batch) -> Tensor:
        values = batch.inputs.values() if isinstance(batch.inputs, dict) else batch.inputs
        return torch.arange(len(next(v for v in values if isinstance(v, Tensor))))


def open_module(
    spec: str,
    weights: Path | None,
    divergence: str | Divergence | None = None,
    device: str = "cpu",
    on_demand: bool = False,
) -> ModuleModel:
    """Open `package.module:factory` or `file.py:factory`, with weights from a safetensors file or read `on_demand`.

    Raises TersorError where the factory is missing or fails, or where the weights do not fit it.
    """
    namespace, factory = find_factory(spec)
    if on_demand and weights is None:
        raise TersorError(f"The weights of {spec} can be read on demand only from a file; give --weights.")
    try:
        with without_weights() if on_demand else nullcontext():
            module = factory()
    except Exception as error:
        raise TersorError(f"The factory {spec} failed: {error}.") from error
    if not isinstance(module, nn.Module):
        raise TersorError(f"The factory {spec} returned {type(module).__name__}, not a torch.nn.Module.")
    if weights is not None:
        open_checkpoint(weights).refuse_empty()
        if on_demand:
            take_from_file(module, open_checkpoint(weights), weights, device)
        else:
            _load(module, read_tensors(weights), f"{weights} does not fit {spec}")
    preprocess = getattr(namespace, "preprocess", None) or _normaliser(namespace)
    return ModuleModel(module, divergence or "kl", preprocess, spec, device)


def _made_again(spec: str, divergence: Divergence, state: dict[str, Tensor]) -> ModuleModel:
    model = open_module(spec, None, divergence)
    _load(model.module, state, f"What was made of {spec} does not fit it")
    return model


def _load(module: nn.Module, tensors: dict[str, Tensor], complaint: str) -> None:
    state = module.state_dict()
    for name, tensor in tensors.items():
        if name in state and tensor.shape != state[name].shape:
            raise TersorError(f"{complaint}: {name} has shape {tuple(tensor.shape)}, not {tuple(state[name].shape)}.")
        if name in state and state[name].is_floating_point() != tensor.is_floating_point():
            raise TersorError(f"{complaint}: {name} is kept as {tensor.dtype}, not as {state[name].dtype}.")
    lacking, strange = module.load_state_dict(tensors, strict=False)
    if lacking or strange:
        side, names = ("the file lacks", lacking) if lacking else ("the module lacks", strange)
        raise TersorError(f"{complaint}: {side} {names[0]}, and {len(lacking) + len(strange) - 1} other names differ.")


def find_factory(spec: str) -> tuple[Any, Callable[[], nn.Module]]:
    """The namespace and the function that `package.module:factory` or `file.py:factory` names."""
    place, _, name = spec.rpartition(":")
    try:
        if place.endswith(".py"):
            found = importlib.util.spec_from_file_location(Path(place).stem, place)
            if found is None or found.loader is None or not Path(place).exists():
                raise TersorError(f"The file {place} of the factory {spec} does not exist.")
            namespace: Any = importlib.util.module_from_spec(found)
            found.loader.exec_module(namespace)
        else:
            namespace = importlib.import_module(place)
    except ImportError as error:
        raise TersorError(f"The module {place} of the factory {spec} cannot be imported: {error}.") from error
    if not callable(getattr(namespace, name, None)):
        raise TersorError(f"{place} has no function {name!r}.")
    return namespace, getattr(namespace, name)


def _normaliser(namespace: Any) -> Callable[[np.ndarray], Tensor] | None:
    mean, std = getattr(namespace, "MEAN", None), getattr(namespace, "STD", None)
    if mean is None or std is None:
        return None
    shift, scale = (torch.tensor(v, dtype=torch.float32).view(1, -1, 1, 1) for v in (mean, std))

    def normalised(arrays: np.ndarray) -> Tensor:
        values = _as_tensor(arrays)
        if values.dim() != 4 or values.shape[1] not in (1, shift.shape[1]):
            raise TersorError(
                f"The data has shape {tuple(values.shape)}, but images of {shift.shape[1]} channels are due."
            )
        return (values - shift) / scale

    return normalised


def _as_tensor(arrays: np.ndarray) -> Tensor:
    """Arrays as a tensor; bytes are images, brought to 0..1 with channels first."""
    values = torch.as_tensor(np.ascontiguousarray(arrays))
    if values.dtype == torch.uint8 and values.dim() == 4:
        if values.shape[-1] in (1, 3, 4) and values.shape[1] not in (1, 3, 4):
            values = values.permute(0, 3, 1, 2)
        return values.float().contiguous() / 255
    return values.float() if values.is_floating_point() else values


def _distinct(module: nn.Module) -> dict[str, Tensor]:
    """The state without the second names of tied tensors."""
    seen: dict[int, str] = {}
    return {
        name: tensor
        for name, tensor in module.state_dict(keep_vars=True).items()
        if seen.setdefault(id(tensor), name) == name
    }


def _fingerprint(state: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        flat = values_of(tensor).reshape(-1)
        sample = flat[:: max(1, flat.numel() // 1024)].contiguous().cpu()
        digest.update(sample.view(torch.uint8).numpy().tobytes() if sample.numel() else b"")
    return digest.hexdigest()[:16]
