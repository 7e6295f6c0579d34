"""Costs as measured: latency of both models in turn, and the bytes that their tensors keep resident.

Latencies are paired: the two models take turns, so a busy machine slows both; the median of the ratios is what counts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tersor.forms import Operator
from tersor.models.model import Batch, Model
from tersor.models.timing import in_turn


@dataclass(frozen=True)
class Latency:
    """Medians in seconds of one batch, and the median of the paired ratios new / original."""

    original: float
    new: float
    ratio: float
    rounds: int


def latency(original: Model, new: Model, batch: Batch, rounds: int = 9) -> Latency:
    """Run one batch through both models in turn."""
    with torch.no_grad():
        a, b = in_turn(original.device, lambda: original.outputs(batch), lambda: new.outputs(batch), rounds)
    return Latency(float(np.median(a)), float(np.median(b)), float(np.median(b / a)), rounds)


def resident_bytes(module: nn.Module) -> int:
    """Bytes of the distinct tensors of a module, and of what its operators make of them to run."""
    tensors = {id(t): t for t in module.state_dict(keep_vars=True).values()}
    made: int = sum(m.resident - m.nbytes for m in module.modules() if isinstance(m, Operator))
    stored: int = sum(t.numel() * t.element_size() for t in tensors.values())
    return stored + made


def peak_bytes(run: Callable[[], Any], module: nn.Module, device: torch.device) -> int:
    """The most bytes that tensors took at once while `run` ran, the module's own included."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        run()
        peak: int = torch.cuda.max_memory_allocated(device)
        return peak
    with _LiveBytes() as live:
        run()
    return int(resident_bytes(module) + live.peak)


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages made by operations that are still alive, and the most there were at once."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        self._alive = {k: (r, n) for k, (r, n) in self._alive.items() if not r.expired()}
        inputs = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in inputs and storage._cdata not in self._alive:
                    self._alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, sum(n for _, n in self._alive.values()))
        return output
