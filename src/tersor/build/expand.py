"""Expanding: every operator of a built model decoded once into a plain parameter of the layer that it had replaced.

The module then has no operators, takes the memory of the original and runs at its speed. Tied weights stay tied.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tersor.build.layers import ApproximateLayer, StandIn


def plain(module: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """A built module with plain weights; one of transformers forgets that it was quantised."""
    if getattr(module, "hf_quantizer", None) is None:
        return expand(module, dtype)
    found: nn.Module = module.dequantize(dtype)  # type: ignore[operator]
    return found


def expand(module: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Give a built module plain weights again, in place, in `dtype` or each in the dtype it once had."""
    expanded = _Expanded(dtype)
    for name, child in list(module.named_modules(remove_duplicate=False)):
        if isinstance(child, ApproximateLayer):
            parent, _, attribute = name.rpartition(".")
            setattr(module.get_submodule(parent), attribute, expanded.layer(child))
            continue
        for attribute, stand_in in [*child._modules.items(), *child.__dict__.items()]:
            if isinstance(stand_in, StandIn):
                child._modules.pop(attribute, None)
                child.__dict__.pop(attribute, None)
                child.register_parameter(attribute, expanded.stand_in(stand_in))
    return module


class _Expanded:
    """The parameters made so far: one a tied weight, and one layer a layer that has several names."""

    def __init__(self, dtype: torch.dtype | None) -> None:
        self.dtype = dtype
        self.parameters: dict[int, nn.Parameter] = {}
        self.layers: dict[int, nn.Module] = {}

    def layer(self, layer: ApproximateLayer) -> nn.Module:
        if id(layer) not in self.layers:
            operator = layer.weight_operator()
            if id(operator) not in self.parameters:
                matrix = operator.dense(self.dtype or layer.kept.dtype)
                self.parameters[id(operator)] = _parameter(layer.shaped(matrix))
            plain = layer.kept.restored(self.parameters[id(operator)], layer.bias)
            self.layers[id(layer)] = plain.train(layer.training)
        return self.layers[id(layer)]

    def stand_in(self, stand_in: StandIn) -> nn.Parameter:
        key = id(stand_in.operators[0])
        if key not in self.parameters:
            tensor = stand_in.tensor()
            self.parameters[key] = _parameter(tensor if self.dtype is None else tensor.to(self.dtype))
        return self.parameters[key]


def _parameter(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach().clone(memory_format=torch.contiguous_format))
