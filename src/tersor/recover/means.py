"""Shifting biases, so that every layer of a built model gives in the mean what it gave before.

An error of a weight shifts the mean of a layer's outputs, and the layers behind it add their own. One batch runs
through the original, and the mean of every channel is kept; then it runs through the built model, and as each layer
with a bias is reached, what is missing in its means is added to the bias. Those behind it see it already mended. No
byte is added.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_CHANNELS_SECOND = ("BatchNorm", "Conv", "InstanceNorm", "GroupNorm")  # in the names of layers of images and signals


def means_of(module: nn.Module, run: Callable[[], Any], masks: Sequence[Tensor] = ()) -> dict[str, Tensor]:
    """The means (channels,) in a run of what the layers with a bias give, by name; of layers that run once.

    Positions where a mask (batch, length) of the shape of an output is zero do not count.
    """
    found: dict[str, Tensor] = {}
    calls: dict[str, int] = {}

    def keep(name: str, layer: nn.Module, _: Any, output: Tensor) -> None:
        found[name], calls[name] = _mean(output, layer, masks), calls.get(name, 0) + 1

    with _watching(module, _with_bias(module), keep), torch.no_grad():
        run()
    return {name: mean for name, mean in found.items() if calls[name] == 1}


def shift_biases(
    module: nn.Module, run: Callable[[], Any], expected: dict[str, Tensor], masks: Sequence[Tensor] = ()
) -> None:
    """Change the biases of a built model, in place, so that in a run the means of their layers are those `expected`."""

    def shift(name: str, layer: nn.Module, _: Any, output: Tensor) -> Tensor:
        missing = expected[name] - _mean(output, layer, masks)
        bias = layer.get_parameter("bias")
        bias.data += missing.to(bias)
        shape = (1, -1, *(1,) * (output.dim() - 2)) if _channels_second(output, layer) else (-1,)
        return output + missing.to(output).view(shape)

    with _watching(module, [name for name in _with_bias(module) if name in expected], shift), torch.no_grad():
        run()


def _with_bias(module: nn.Module) -> list[str]:
    """The layers and norms that add a bias to all they give."""
    names = []
    for name, child in module.named_modules():
        bias = child._parameters.get("bias")
        weighted = "weight" in child._parameters or hasattr(type(child), "weight")  # whose value may be long to make
        if bias is not None and bias.dim() == 1 and weighted:
            names.append(name)
    return names


def _mean(output: Tensor, layer: nn.Module, masks: Sequence[Tensor]) -> Tensor:
    """The mean of every channel of an output, in float64."""
    rows = output.movedim(1, -1) if _channels_second(output, layer) else output
    mask = next((m for m in masks if rows.shape[:-1] == m.shape), None)
    chosen = rows.flatten(0, -2) if mask is None else rows[mask.bool()]
    return chosen.mean(0, dtype=torch.float64)


def _channels_second(output: Tensor, layer: nn.Module) -> bool:
    return output.dim() > 2 and any(kind in type(layer).__name__ for kind in _CHANNELS_SECOND)


@contextmanager
def _watching(module: nn.Module, names: Sequence[str], hook: Callable[..., Any]) -> Iterator[None]:
    with ExitStack() as stack:
        for name in names:
            layer = module.get_submodule(name)
            stack.callback(layer.register_forward_hook(lambda *args, name=name: hook(name, *args)).remove)
        yield
