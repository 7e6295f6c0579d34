"""The format `pack-quantized` of compressed-tensors: packed integers a layer, settings in `config.json`.

Codes lie in a row as one stream of bits in int32 words, zeros along the rows; a symmetric grid has its zero in the
middle and stores none. Layers of one setting make one group; everything else that could be quantised is on `ignore`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tersor.export.grids import Grid, words
from tersor.forms.integers import IntOperator

OWNERS = ("Linear",)
WIDTHS = (2, 4, 8)  # other widths lie in words one way before version 0.18 and another from there on


def tensors(name: str, grid: Grid, dtype: torch.dtype, settings: Mapping[str, Any]) -> dict[str, Tensor]:
    """What the file holds of a layer; scales in the dtype of the model, in which its loader computes."""
    found = {
        f"{name}.weight_packed": words(grid.codes, grid.bits),
        f"{name}.weight_scale": grid.scales.to(dtype),
        f"{name}.weight_shape": torch.tensor(grid.codes.shape),
    }
    if not grid.symmetric:
        found[f"{name}.weight_zero_point"] = words(grid.zeros.T, grid.bits).T
    return found


def refusal(operator: IntOperator) -> str | None:
    """Why the format cannot hold an operator."""
    return None if operator.setting.bits in WIDTHS else f"{operator.setting.bits} bits"


def config(module: nn.Module, grids: Mapping[str, IntOperator]) -> dict[str, Any]:
    """The `quantization_config` for config.json; `module` is the model as it was."""
    settings = {name: (s.bits, s.group_size, s.symmetric) for name, s in ((n, o.setting) for n, o in grids.items())}
    groups = {}
    for number, (bits, size, symmetric) in enumerate(dict.fromkeys(settings.values())):
        weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "dynamic": False}
        weights |= {"strategy": "channel"} if size is None else {"strategy": "group", "group_size": size}
        alone = len(set(settings.values())) == 1
        targets = ["Linear"] if alone else [n for n, s in settings.items() if s == (bits, size, symmetric)]
        groups[f"group_{number}"] = {"targets": targets, "weights": weights, "format": "pack-quantized"}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [n for n, m in module.named_modules() if isinstance(m, nn.Linear) and n not in grids],
    }
