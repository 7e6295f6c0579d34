"""What goes between a study and its workers: the model, packed once, and the summaries of every group of batches back.

A large model has hundreds of tensors, and so have its summaries. Each would take a file handle of its own on its way
through shared memory, so they travel end to end in one or two.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tersor.errors import TersorError
from tersor.models.model import Model
from tersor.observe.collector import Key
from tersor.observe.summary import Summary


@dataclass(frozen=True)
class Part:
    """What a group of batches adds to the summaries."""

    summaries: Mapping[Key, Summary]
    rows_are_inputs: Mapping[Key, bool]
    predictions: int


@dataclass(frozen=True)
class SentPart:
    """The same on its way: fields of summaries with types and shapes in the place of tensors, and all values."""

    fields: Mapping[Key, Mapping[str, Any]]
    values: Mapping[torch.dtype, Tensor]
    rows_are_inputs: Mapping[Key, bool]
    predictions: int


def packed(model: Model, task: Any) -> Tensor | None:
    """A model, and what to do with it, as bytes; None where it cannot be sent.

    So it is on another device than the CPU, and where classes or functions have no name that a worker could import.
    """
    if model.device.type != "cpu" or any(type(m).__module__ == "__main__" for m in model.module.modules()):
        return None
    buffer = io.BytesIO()
    try:
        torch.save((model.maker(), task), buffer)
    except (pickle.PicklingError, AttributeError, TypeError, RuntimeError):
        return None
    return torch.frombuffer(buffer.getbuffer(), dtype=torch.uint8)


def unpacked(sent: Tensor) -> tuple[Model, Any] | None:
    """The model and the task that the process in charge packed, no file; None where a worker lacks what they need."""
    try:
        make, task = torch.load(io.BytesIO(sent.numpy().tobytes()), weights_only=False)
        return make(), task
    except (AttributeError, ImportError, TersorError):
        return None


def sent(part: Part) -> SentPart:
    """A part with the values of its tensors end to end, by type."""
    tensors = [v for summary in part.summaries.values() for v in vars(summary).values() if isinstance(v, Tensor)]
    types = dict.fromkeys(tensor.dtype for tensor in tensors)
    values = {dtype: torch.cat([t.flatten() for t in tensors if t.dtype == dtype]) for dtype in types}
    fields = {
        key: {k: (v.dtype, v.shape) if isinstance(v, Tensor) else v for k, v in vars(summary).items()}
        for key, summary in part.summaries.items()
    }
    return SentPart(fields, values, part.rows_are_inputs, part.predictions)


def received(sent: SentPart) -> Part:
    """The part that was sent; its tensors are views of the values."""
    done = dict.fromkeys(sent.values, 0)

    def next_of(dtype: torch.dtype, shape: torch.Size) -> Tensor:
        start, done[dtype] = done[dtype], done[dtype] + shape.numel()
        return sent.values[dtype][start : done[dtype]].view(shape)

    summaries = {}
    for key, fields in sent.fields.items():
        values: dict[str, Any] = {k: next_of(*v) if isinstance(v, tuple) else v for k, v in fields.items()}
        summaries[key] = Summary(**values)
    return Part(summaries, sent.rows_are_inputs, sent.predictions)
