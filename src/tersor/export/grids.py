"""Which sites of a built model are integer grids that other formats hold, and those grids as plain codes and zeros.

Such a grid is `W = s (C - z)` with whole `z`, a scale a row or a group of columns, all groups of one size. A layer
that shares its weight with another is never one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tersor.build.layers import ApproximateLayer
from tersor.forms import form_named, setting_of, settings_of
from tersor.forms.integers import IntOperator
from tersor.forms.packing import unpack


@dataclass(frozen=True)
class Grid:
    """Codes (rows, columns) of `bits` bits; scales and zeros (rows, groups). `group_size` None is a whole row."""

    bits: int
    group_size: int | None
    symmetric: bool
    codes: Tensor
    scales: Tensor
    zeros: Tensor

    @classmethod
    def of(cls, operator: IntOperator) -> Grid:
        setting = operator.setting
        codes = unpack(operator.codes, setting.bits, operator.shape[1])
        scales, zeros = operator.grid()
        return cls(setting.bits, setting.group_size, setting.symmetric, codes, scales, zeros.to(torch.uint8))

    def group_of_columns(self) -> Tensor:
        """The number of the group of every column."""
        size = self.group_size or self.codes.shape[1]
        return torch.arange(self.codes.shape[1], dtype=torch.int32) // size


@dataclass(frozen=True)
class Held:
    """The layers whose weights are whole grids, by name, and every other site with what it is instead."""

    operators: Mapping[str, IntOperator]
    others: Mapping[str, str]


def held_by(module: nn.Module, sites: Mapping[str, Mapping[str, Any]], owners: tuple[str, ...]) -> Held:
    """The sites of an artifact whose grids are whole and whose original layer is of a class named in `owners`."""
    operators: dict[str, IntOperator] = {}
    others: dict[str, str] = {}
    for name, value in sites.items():
        places = [place for place, _ in value["places"]]
        layer = module.get_submodule(places[0])
        operator, owner = None, layer
        if isinstance(layer, ApproximateLayer):
            operator, owner = layer.weight_operator(), layer.kept.owner
        form = form_named(value["form"])
        setting = settings_of(setting_of(form, value["setting"]), 1)[0]
        if not isinstance(operator, IntOperator) or not _is_whole(operator):
            others[name] = setting.label if value["form"] in setting.label else f"{value['form']} {setting.label}"
        elif len(places) > 1:
            others[name] = f"tied to {places[1]}"
        elif not _is_of(owner, owners):
            others[name] = f"the weight of a layer of class {type(owner).__name__}"
        else:
            operators[places[0]] = operator
    return Held(operators, others)


def _is_of(owner: nn.Module, names: tuple[str, ...]) -> bool:
    return any(cls.__name__ in names for cls in type(owner).__mro__)


def _is_whole(operator: IntOperator) -> bool:
    setting, columns = operator.setting, operator.shape[1]
    divides = setting.group_size is None or columns % setting.group_size == 0
    return setting.zeros == "whole" and setting.axis == "columns" and divides


def words(codes: Tensor, bits: int) -> Tensor:
    """Codes (rows, n) as a stream of bits a row, the lowest first, in int32 (rows, ceil(n bits / 32))."""
    rows, length = codes.shape
    padded = nn.functional.pad(codes, (0, -length % 32)).to(torch.int64)
    streams = (padded[..., None] >> torch.arange(bits)) & 1
    of_words = streams.reshape(rows, -1, 32) << torch.arange(32)
    whole = of_words.sum(-1)[:, : -(-length * bits // 32)]
    return torch.where(whole >= 2**31, whole - 2**32, whole).to(torch.int32)
