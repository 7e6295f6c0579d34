"""Opening models, finding their sites, comparing their outputs."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from tersor.errors import TersorError
from tersor.models.divergence import DIVERGENCES, Divergence, custom_divergence
from tersor.models.model import Batch, Identity, Model
from tersor.models.sites import Site, Walk, walk


def open_model(
    source: str | Path | nn.Module | Model,
    *,
    weights: str | Path | None = None,
    divergence: str | Divergence | None = None,
    device: str = "cpu",
    on_demand: bool = False,
) -> Model:
    """Open a Hugging Face folder, a `file.py:factory` with `weights`, or a module that is already in memory.

    Weights that are read `on_demand` are in memory only while they are used. Raises TersorError, naming what is wrong,
    where `source` is none of these.
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise TersorError(f"The device {device!r} is not at hand on this machine.") from error
    if isinstance(source, nn.Module):
        from tersor.models.module import ModuleModel

        return ModuleModel(source, divergence or "kl", device=device)
    if not isinstance(source, str | Path):
        return source
    path = Path(source)
    if path.is_dir():
        from tersor.models.huggingface import HuggingFaceModel

        return HuggingFaceModel(path, divergence, device, on_demand)
    if ":" in str(source):
        from tersor.models.module import open_module

        return open_module(str(source), None if weights is None else Path(weights), divergence, device, on_demand)
    raise TersorError(f"{source} is neither a model folder nor a factory such as file.py:function.")


__all__ = [
    "DIVERGENCES",
    "Batch",
    "Divergence",
    "Identity",
    "Model",
    "Site",
    "Walk",
    "custom_divergence",
    "open_model",
    "walk",
]
