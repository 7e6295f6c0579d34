"""The search for the scales and zeros of integers in groups: those that make plain rounding do the least damage."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from tersor.forms.integers import IntSetting

CHUNK = 1 << 17  # entries that are searched at a time


def search_grid(weight: Tensor, importance: Tensor, setting: IntSetting) -> tuple[Tensor, Tensor]:
    """Scale and zero of every group that make the importance-weighted error of plain rounding least.

    Starts from the extremes (all that is done where `setting.search` is off), tries shrunken ranges, then alternates
    codes and the closed-form least-squares scale and zero, and keeps the best of all iterates.
    """
    w, h = _grouped(weight, setting), _grouped(importance.to(weight), setting)
    rows = max(1, CHUNK * len(w) // max(1, w.numel()))  # few enough to stay in the cache through all iterates
    parts = [_search(*part, setting) for part in zip(w.split(rows), h.split(rows), strict=True)]
    return torch.cat([scale for scale, _ in parts]), torch.cat([zero for _, zero in parts])


def _search(w: Tensor, h: Tensor, setting: IntSetting) -> tuple[Tensor, Tensor]:
    """`search_grid` for weights and importances (..., groups, size), NaN where a group is short."""
    w, h = w.nan_to_num(), torch.where(w.isnan(), 0.0, h)
    top = 2.0**setting.bits - 1
    if setting.symmetric:
        centre, radius = torch.zeros_like(w[..., :1]), w.abs().amax(-1, keepdim=True)
    else:
        low, high = w.amin(-1, keepdim=True), w.amax(-1, keepdim=True)
        centre, radius = (low + high) / 2, (high - low) / 2
    radius = radius.clamp_min(1e-12)

    def error(scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
        codes = (w / scale + zero).round().clamp(0, top)
        return codes, (h * (w - (codes - zero) * scale).square()).sum(-1, keepdim=True)

    def zero_of(scale: Tensor) -> Tensor:
        return setting.snapped(top / 2 - centre / scale)

    scale = 2 * radius / top
    zero = zero_of(scale)
    if not setting.search:
        return scale.squeeze(-1), zero.squeeze(-1)
    codes, best = error(scale, zero)
    for share in torch.linspace(0.95, 0.25 + 0.06 * setting.bits, 12 if setting.bits < 5 else 6):
        trial = 2 * radius / top * float(share)
        trial_zero = zero_of(trial)
        trial_codes, trial_error = error(trial, trial_zero)
        better = trial_error < best
        best, scale = torch.where(better, trial_error, best), torch.where(better, trial, scale)
        zero, codes = torch.where(better, trial_zero, zero), torch.where(better, trial_codes, codes)
    for _ in range(3):
        trial, trial_zero = _least_squares(w, h, codes, zero, setting)
        trial_codes, trial_error = error(trial, trial_zero)
        better = trial_error < best
        best, scale = torch.where(better, trial_error, best), torch.where(better, trial, scale)
        zero, codes = torch.where(better, trial_zero, zero), torch.where(better, trial_codes, codes)
    return scale.squeeze(-1), zero.squeeze(-1)


def _least_squares(w: Tensor, h: Tensor, codes: Tensor, zero: Tensor, setting: IntSetting) -> tuple[Tensor, Tensor]:
    """Scale (and zero) that fit `w` by `s (codes - z)` in the norm of `h`."""

    def scale_at(zero: Tensor) -> Tensor:
        level = codes - zero
        scale = (h * level * w).sum(-1, keepdim=True) / (h * level.square()).sum(-1, keepdim=True).clamp_min(1e-20)
        return scale.clamp_min(1e-12)

    if setting.symmetric:
        return scale_at(zero), zero
    mass = h.sum(-1, keepdim=True).clamp_min(1e-20)
    mean_w, mean_c = (h * w).sum(-1, keepdim=True) / mass, (h * codes).sum(-1, keepdim=True) / mass
    covariance = (h * (codes - mean_c) * (w - mean_w)).sum(-1, keepdim=True)
    scale = (covariance / (h * (codes - mean_c).square()).sum(-1, keepdim=True).clamp_min(1e-20)).clamp_min(1e-12)
    zero = setting.snapped(mean_c - mean_w / scale)
    return (scale if setting.zeros == "fine" else scale_at(zero)), zero


def _grouped(matrix: Tensor, setting: IntSetting) -> Tensor:
    """(rows, columns) as (groups..., size), short last groups filled with NaN."""
    by_rows = setting.axis == "rows"
    matrix = matrix.T if by_rows else matrix
    size = setting.group_size or matrix.shape[1]
    pad = -matrix.shape[1] % size
    padded = torch.nn.functional.pad(matrix, (0, pad), value=float("nan")) if pad else matrix
    grouped = padded.reshape(matrix.shape[0], -1, size)
    return grouped.transpose(0, 1) if by_rows else grouped
