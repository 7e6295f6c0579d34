"""Least squares by conjugate gradients: the values that codes, supports and ties leave free, fitted under a metric."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

ENOUGH = 1e-24  # share of the first squared residual at which steps end


def conjugate_gradients(
    values: Tensor,
    residual: Tensor,
    felt: Callable[[Tensor], Tensor],
    steps: int,
    curvature: Tensor | float = 1.0,
    *,
    alone: int | None = None,
) -> Tensor:
    """`values` after some steps towards the solution of `felt(values) = target`, whose `residual` is given.

    `felt` is linear, symmetric and not negative; `curvature` is its diagonal or what stands for it, of the shape of the
    values. Where no row is felt by another (`alone` 0), or no column (1), each takes steps of its own length.
    """

    def dot(a: Tensor, b: Tensor) -> Tensor:
        return (a.double() * b.double()).sum(*(() if alone is None else (1 - alone, True)))

    direction = scaled = residual / curvature
    size = first = dot(residual, scaled)
    for _ in range(steps):
        going = size > ENOUGH * first
        if not bool(going.any()):
            break
        image = felt(direction)
        step = torch.where(going, size / dot(direction, image).clamp_min(1e-300), 0).to(values.dtype)
        values, residual = values + step * direction, residual - step * image
        scaled = residual / curvature
        before, size = size, dot(residual, scaled)
        direction = scaled + torch.where(going, size / before.clamp_min(1e-300), 0).to(values.dtype) * direction
    return values
