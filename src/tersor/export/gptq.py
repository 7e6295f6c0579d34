"""The format of GPTQ checkpoints: `qweight`, `qzeros`, `scales`, `g_idx` a layer, settings in `quantize_config.json`.

Codes of an output, and zeros of a group, lie as one stream of bits in int32 words. Zeros are stored less 1 (version 1)
where all grids are symmetric, and as they are (`gptq_v2`) where one is not: readers of version 1 disagree there. Layers
that differ from the most common setting, and those left dense, are named under `dynamic`, as GPTQModel has it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tersor.export.grids import Grid, words
from tersor.forms.integers import IntOperator

OWNERS = ("Linear", "Conv1D")
WIDTHS = (2, 3, 4, 8)
MULTIPLE = 32  # of which both sides of a weight must be one


def tensors(name: str, grid: Grid, dtype: torch.dtype, settings: Mapping[str, Any]) -> dict[str, Tensor]:
    """What the file holds of a layer; scales in 16-bit floats, whatever the model computes in."""
    less = 1 if settings["checkpoint_format"] == "gptq" else 0
    return {
        f"{name}.qweight": words(grid.codes, grid.bits).T,
        f"{name}.qzeros": words(grid.zeros.T - less, grid.bits),
        f"{name}.scales": grid.scales.T.to(torch.float16),
        f"{name}.g_idx": grid.group_of_columns(),
    }


def refusal(operator: IntOperator) -> str | None:
    """Why the format cannot hold an operator."""
    if operator.setting.bits not in WIDTHS:
        return f"{operator.setting.bits} bits"
    if any(side % MULTIPLE for side in operator.shape):
        return f"{operator.shape[0]} x {operator.shape[1]}, no multiples of {MULTIPLE}"
    return None


def config(module: nn.Module, grids: Mapping[str, IntOperator]) -> dict[str, Any]:
    """The `quantization_config` for config.json; `module` is the model as it was."""

    def values(operator: IntOperator) -> tuple[int, int, bool]:
        setting = operator.setting
        return setting.bits, setting.group_size or -1, setting.symmetric

    settings = {name: values(operator) for name, operator in grids.items()}
    usual = Counter(settings.values()).most_common(1)[0][0]
    dynamic: dict[str, dict[str, Any]] = {
        f"+:^{re.escape(name)}$": _named(*setting) for name, setting in settings.items() if setting != usual
    }
    dense = [n for n, m in module.named_modules() if type(m).__name__ in OWNERS and n not in grids]
    dynamic |= {f"-:^{re.escape(name)}$": {} for name in dense}
    version = "gptq" if all(symmetric for *_, symmetric in settings.values()) else "gptq_v2"
    return {
        "quant_method": "gptq",
        "checkpoint_format": version,
        "format": version,
        "desc_act": False,
        "lm_head": any(name.endswith("lm_head") for name in grids),
        "pack_dtype": "int32",
        **_named(*usual),
        **({"dynamic": dynamic} if dynamic else {}),
    }


def _named(bits: int, group_size: int, symmetric: bool) -> dict[str, Any]:
    return {"bits": bits, "group_size": group_size, "sym": symmetric}
