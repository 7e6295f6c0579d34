"""The quantiser that lets `from_pretrained` of transformers read an artifact.

Before weights are loaded it lays empty operators at the sites that the config names; transformers fills their tensors
like any others. Saving again writes the same tensors and the same config.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.quantizers.base import HfQuantizer
from transformers.utils import logging
from transformers.utils.quantization_config import QuantizationConfigMixin

from tersor.build.artifact import install_empty
from tersor.build.expand import expand
from tersor.build.load import Progress, prepare


class TersorConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """`quantization_config` of an artifact: the form and setting of every site."""

    def __init__(self, sites: dict[str, Any] | None = None, version: int = 1, **_: Any) -> None:
        self.quant_method = "tersor"
        self.sites, self.version = sites or {}, version


def _shown() -> Progress:
    """Progress as transformers shows it, where it shows any."""
    bars: list[Any] = []

    def progress(name: str, done: int, total: int) -> None:
        if not bars:
            bars.append(logging.tqdm(total=total, desc="Decoding weights"))
        bars[0].update(1)
        if done == total:
            bars[0].close()

    return progress


class TersorQuantizer(HfQuantizer):  # type: ignore[misc]
    """Lays out operators before the weights are loaded."""

    requires_calibration = True

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        install_empty(model, self.quantization_config.sites)
        gone = {
            f"{m}.{p}".removeprefix(".") for site in self.quantization_config.sites.values() for m, p in site["places"]
        }
        tied = getattr(model, "all_tied_weights_keys", None)
        if tied:  # what is left to tie: pairs of which neither is an operator now
            model.all_tied_weights_keys = {k: v for k, v in tied.items() if k not in gone and v not in gone}
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if hasattr(model.config, "_experts_implementation"):
            model.config._experts_implementation = "eager"
        for child in model.modules():
            like = child._buffers.get("_like")
            if isinstance(like, torch.Tensor) and like.is_meta:
                child._buffers["_like"] = torch.empty(0, dtype=like.dtype)
        prepare(model, _shown())
        return model

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        model.__dict__.pop("_weight_conversions", None)  # those of the artifact; it is saved under the usual names
        return expand(model, dtype)

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True
