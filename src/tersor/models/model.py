"""What the steps need of a model: its module, how a batch becomes predictions, and what counts as damage.

A prediction is a token for language models, an image or a text for classifiers and encoders. Nothing here knows of
sites, forms or plans.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from tersor.data import Data
from tersor.models.divergence import Divergence
from tersor.models.ondemand import Unread

Batch = Any


@dataclass(frozen=True)
class Identity:
    """Where a model came from, so that a run and an artifact can name it: `kind` is `huggingface` or `module`."""

    kind: str
    source: str
    fingerprint: str
    stored_bytes: int
    details: dict[str, Any] = field(default_factory=dict)


def size_of(batch: Batch) -> int:
    """The numbers in the tensors of a batch."""
    leaves = tree_leaves(getattr(batch, "inputs", batch))
    return sum(leaf.numel() for leaf in leaves if isinstance(leaf, Tensor))


def device_of(module: nn.Module) -> torch.device:
    """Where a module lies; one built of operators alone has buffers only."""
    for tensor in (*module.parameters(), *module.buffers()):
        if not tensor.is_meta:
            return tensor.device
        if isinstance(tensor, Unread):
            return tensor.home
    return torch.device("cpu")


class Model(Protocol):
    """A model opened for compression. `outputs` is differentiable and holds real predictions only, no padding."""

    module: nn.Module
    divergence: Divergence
    identity: Identity

    @property
    def device(self) -> torch.device: ...

    def maker(self) -> Callable[[], Model]:
        """What makes this model again in another process, as it is now; no data need be read there."""
        ...

    def batches(
        self, data: Data, samples: int | None, sequence_length: int, batch_size: int, seed: int | None = None
    ) -> Sequence[Batch]:
        """The first `samples` of the data; with a seed, samples from anywhere in it."""
        ...

    def compact(self, batches: Sequence[Batch]) -> Sequence[Batch]:
        """The same samples, in batches with as little padding as can be."""
        ...

    def masks(self, batch: Batch) -> list[Tensor]: ...

    def outputs(self, batch: Batch) -> Tensor: ...

    def labels(self, batch: Batch) -> Tensor | None: ...

    def units(self, batch: Batch) -> Tensor:
        """For every prediction the number of the independent sample (window, text, image) of the batch it is of."""
        ...
