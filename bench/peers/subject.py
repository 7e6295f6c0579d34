"""One model under test: its calibration batches as a file for the peers, its judge, and weights put into it in turn."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from judging import Judge
from models import ASSETS, Reference, reference
from tersor.models import Batch, Model

SCORED_EVERY = {"minilm": 3}  # of the pairs of STS-B: all of them take longer than all else that is judged


@dataclass(frozen=True)
class Subject:
    """A reference model with the scratch folder of its runs, and the tensors that everybody calibrates on."""

    known: Reference
    model: Model
    judge: Judge
    scratch: Path
    samples: int
    calibration: Path
    fingerprint: str

    @property
    def name(self) -> str:
        return self.known.name

    @property
    def file_bytes(self) -> int:
        return self.model.identity.stored_bytes

    def bytes_of(self, names: list[str]) -> int:
        """Bytes of some parameters as they were."""
        return sum(p.numel() * p.element_size() for p in map(self.model.module.get_parameter, names))

    def description(self) -> dict[str, Any]:
        """How an adapter opens the model."""
        if self.model.identity.kind == "huggingface":
            folder = Path(self.model.identity.source)
            config = json.loads((folder / "config.json").read_text(encoding="utf8"))
            return {"kind": "huggingface", "folder": str(folder), "class": config["architectures"][0]}
        weights = ASSETS / "resnet-cifar10" / f"{self.name}.safetensors"
        return {
            "kind": "module", "file": str(ASSETS / "resnet_cifar.py"), "factory": self.name, "weights": str(weights)
        }  # fmt: skip

    @contextmanager
    def holding(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """The model with these weights, by parameter name, in the place of its own, put back at the end."""
        kept = {name: self.model.module.get_parameter(name) for name in weights}
        data = {name: parameter.data for name, parameter in kept.items()}
        try:
            for name, parameter in kept.items():
                parameter.data = weights[name].to(parameter.data).reshape(parameter.shape)
            yield
        finally:
            for name, parameter in kept.items():
                parameter.data = data[name]


def open_subject(name: str, scratch: Path, samples: int | None = None) -> Subject:
    """Open a reference model; its calibration is all that Tersor's study reads, check data included, in that order."""
    known = reference(name, scored_every=SCORED_EVERY.get(name, 1))
    model = known.open()
    samples = samples or known.samples
    sizes = (known.sequence_length, known.batch_size, 0)
    batches = list(model.batches(known.calibration, samples, *sizes))
    if known.check is not None:
        count = sum(int(model.units(b).max()) + 1 for b in batches)
        batches += model.batches(known.check, max(1, count // 2), *sizes)
    tensors = {f"{i}.{key}": value for i, batch in enumerate(batches) for key, value in _tensors(batch).items()}
    digest = hashlib.sha256()
    for key, tensor in tensors.items():
        digest.update(f"{key}{tuple(tensor.shape)}".encode() + tensor.numpy().tobytes())
    scratch.mkdir(parents=True, exist_ok=True)
    target = scratch / f"calibration-{samples}.safetensors"
    save_file(tensors, target)
    with torch.no_grad():
        judge = Judge.of(known, model)
    return Subject(known, model, judge, scratch, samples, target, digest.hexdigest()[:12])


def _tensors(batch: Batch) -> dict[str, Tensor]:
    """A batch as contiguous tensors by the names of the model's inputs; images have none."""
    found = batch if isinstance(batch, dict) else {"images": batch.inputs[0]}
    return {key: value.contiguous() for key, value in found.items()}
