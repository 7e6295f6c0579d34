"""tensorly-torch: convolutions and linear layers as factorised ones, decomposed from trained weights without data."""

from __future__ import annotations

import warnings

import torch
from task import linear_layers, open_model, read_task, timed, write_result
from tltorch import FactorizedConv, FactorizedLinear
from torch import nn


def factorised(layer: nn.Module, setting: dict[str, object]) -> nn.Module:
    """The layer of tensorly-torch in the place of another, at a share of its parameters."""
    rank, factorization = setting["rank"], setting["factorization"]
    if isinstance(layer, nn.Conv2d):
        return FactorizedConv.from_conv(layer, rank=rank, factorization=factorization)
    return FactorizedLinear.from_linear(
        layer, auto_tensorize=True, n_tensorized_modes=2, rank=rank, factorization=factorization
    )


def main() -> None:
    warnings.filterwarnings("ignore")
    task = read_task()
    module = open_model(task)
    layers = {
        name: layer
        for name, layer in linear_layers(module, (nn.Linear, nn.Conv2d)).items()
        if layer.weight.numel() >= 4096 and name != "conv1"
    }

    def decompose() -> dict[str, nn.Module]:
        return {name: factorised(layer, task.setting) for name, layer in layers.items()}

    made, spent = timed(decompose)
    dense, stored = {}, {}
    with torch.no_grad():
        for name, layer in made.items():
            weight = layer.weight.to_matrix() if isinstance(layers[name], nn.Linear) else layer.weight.to_tensor()
            original = layers[name].weight
            dense[f"{name}.weight"] = weight.reshape(original.shape)
            stored[f"{name}.weight"] = sum(2 * p.numel() for p in layer.weight.parameters())  # as factors in 16 bits
    write_result(task, dense, stored, spent, ("tensorly-torch", "tensorly"))


if __name__ == "__main__":
    main()
