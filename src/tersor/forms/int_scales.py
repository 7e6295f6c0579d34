"""The search for the scales and zeros of integers in groups: those that make plain rounding do the least damage."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from tersor.forms.integers import IntSetting

LEAST_SQUARES = 3  # times that codes and the best scale and zero for them are found in turn


def search_grid(weight: Tensor, importance: Tensor, setting: IntSetting) -> tuple[Tensor, Tensor]:
    """Scale and zero of every group that make the importance-weighted error of plain rounding least.

    Starts from the extremes (all that is done where `setting.search` is off), tries shrunken ranges, then alternates
    codes and the closed-form least-squares scale and zero, and keeps the best of all iterates. `weight` and
    `importance` are (rows, columns); the compiled loops run on the CPU, the results lie where the weight does.
    """
    from tersor.forms.kernels import search_grids

    by_rows, top = setting.axis == "rows", 2.0**setting.bits - 1
    w, h = (m.float().cpu() for m in (weight, importance))
    w, h = (m.T.contiguous() if by_rows else m.contiguous() for m in (w, h))
    size = setting.group_size or w.shape[1]
    shares = np.linspace(0.95, 0.25 + 0.06 * setting.bits, 12 if setting.bits < 5 else 6, dtype=np.float32)
    found = [torch.empty(len(w), -(-w.shape[1] // size)) for _ in range(2)]
    search_grids(
        w.numpy(), h.numpy(), size, top, shares if setting.search else shares[:0],
        LEAST_SQUARES if setting.search else 0, setting.symmetric, setting.zeros == "whole", setting.half,
        *(f.numpy() for f in found),
    )  # fmt: skip
    scale, zero = ((f.T.contiguous() if by_rows else f).to(weight.device) for f in found)
    return scale, zero
