"""Choosing how the inputs of every layer of a built model are rounded, from what calibration data bring there.

The error of a rounding, `e = Q(x) - x`, is carried through the layer and weighed like any error of its outputs:
`E[(W e)^T G (W e)]` of the study's own moment of gradients, so rounded inputs are predicted in the nats of the weights.
Scales and shifts are fitted on half of the inputs; shift and dither are kept only where the other half shows that they
help (P448 NoisyQuant: dither is subtractive, and does harm where plain rounding is already better than uniform noise).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from tersor.build.activations import LEAST_SHIFT, Activations, InputRounding
from tersor.build.layers import ApproximateConvolution, ApproximateLinear, decoded
from tersor.metrics import Side
from tersor.models.model import Batch, Model
from tersor.models.sites import Site
from tersor.observe.store import load_output_metric
from tersor.run import Run

ROWS, IMAGES = 1024, 16  # inputs kept of a layer: tokens, or samples of a convolution
HELD_BYTES = 2**30  # of inputs kept at once; what is beyond takes another pass over the data
SHARES = tuple(2.0 ** (-k / 4) for k in range(17))  # of the largest input, where a scale of the whole tensor clips
NEAR = 2  # shares to either side that are tried with a dither
AMPLITUDES = (0.25, 0.5, 1.0)  # of a dither, in steps of the integers
SURE = 2.0  # standard errors of a difference
Layer = ApproximateLinear | ApproximateConvolution
Damage = Callable[[InputRounding, Tensor], Tensor]


@dataclass(frozen=True)
class Rounded:
    """How a layer's inputs are rounded, with the divergence predicted for that alone.

    `tests` has what each way that was tried came to on the same inputs, in the order tried.
    """

    site: str
    place: str
    setting: Activations
    nbytes: int
    divergence: float
    tests: dict[str, float]


def round_inputs(
    run: Run,
    model: Model,
    sites: Sequence[Site],
    asked: Activations,
    batches: Sequence[Batch],
    progress: Callable[[str, int, int], Any] = lambda *_: None,
) -> list[Rounded]:
    """Round the inputs of the linear layers and convolutions that stand in the place of `sites`, in place.

    Layers that the study saw no product of, stacks of experts and heads tied to a table are left as they are.
    """
    layers = dict(layers_of(model.module, sites))
    found: list[Rounded] = []
    with decoded(model.module):
        for group in _groups(layers):
            inputs = captured(model, {place: layers[place][1] for place in group}, batches)
            for place in group:
                site, layer = layers[place]
                progress(f"inputs of {place}", len(found), len(layers))
                weighed = load_output_metric(run, site)
                if weighed is None or place not in inputs:
                    continue
                rounding, damage, tests = fit_rounding(layer, inputs.pop(place).to(model.device), asked, *weighed)
                layer.rounding = rounding
                gain = run.gain(site.name, "int")
                tests = {way: gain * value for way, value in tests.items()}
                found.append(Rounded(site.name, place, rounding.setting, rounding.nbytes, gain * damage, tests))
    return found


def layers_of(module: nn.Module, sites: Sequence[Site]) -> Iterator[tuple[str, tuple[Site, Layer]]]:
    """The layers of a built module whose inputs can be rounded, by their names."""
    for site in sites:
        for place, _ in site.places if site.kind != "table" else ():
            layer = module.get_submodule(place)
            if isinstance(layer, Layer):
                yield place, (site, layer)


def captured(model: Model, layers: dict[str, Any], batches: Sequence[Batch]) -> dict[str, Tensor]:
    """What goes into each layer: about ROWS real tokens (rows, channels), or IMAGES samples of a convolution."""
    rows: dict[str, list[Tensor]] = {}
    masks: list[Tensor] = []

    def keep(place: str, many: int, x: Tensor) -> None:
        known = rows.setdefault(place, [])
        if not known or known[0].shape[1:] == x.shape[1:]:  # samples of a convolution may differ in size
            known.append(_evenly(x.detach().float(), -(-many // len(batches))).cpu())

    def image(place: str) -> Callable[[nn.Module, Any], None]:
        return lambda _, given: keep(place, IMAGES, given[0])

    def token(place: str) -> Callable[[nn.Module, Any], None]:
        def hook(_: nn.Module, given: Any) -> None:
            x = given[0].reshape(-1, given[0].shape[-1])
            mask = next((m for m in masks if m.numel() == len(x)), None)
            keep(place, ROWS, x if mask is None else x[mask.flatten()])

        return hook

    with ExitStack() as hooks, torch.no_grad():
        for place, layer in layers.items():
            hook = token if isinstance(layer, ApproximateLinear) else image
            hooks.callback(layer.register_forward_pre_hook(hook(place)).remove)
        for batch in batches:
            masks = [m.bool() for m in model.masks(batch)]
            model.outputs(batch)
    return {place: torch.cat(parts) for place, parts in rows.items()}


def fit_rounding(
    layer: Layer, inputs: Tensor, asked: Activations, gradients: Side, scale: float, sure: float = SURE
) -> tuple[InputRounding, float, dict[str, float]]:
    """The rounding of a layer that does the least damage of what was asked for: it, its damage, that of every way.

    `gradients` and `scale` are those of `Summary.output_metric`, so damage is in nats. A shift or a dither is kept
    where it is better by more than `sure` standard errors of the difference.
    """
    fit, test = inputs[0::2], inputs[1::2] if len(inputs) > 1 else inputs
    gradients = Side(gradients.moment.to(inputs.device))

    def damage(rounding: InputRounding, x: Tensor) -> Tensor:
        error = layer.product(rounding.seen(x) - x).float()
        error = error if error.dim() == 2 else error.flatten(2).transpose(1, 2).reshape(-1, error.shape[1])
        return scale * (gradients.felt(error) * error).sum(1)

    possible = layer.rounding_for(asked).setting
    best = _fitted(layer, fit, replace(possible, shift=False, dither=False), damage)
    least = damage(best, test)
    tests = {"plain": float(least.mean())}
    for way in ("shift", "dither"):
        if not getattr(possible, way):
            continue
        with_it = replace(best.setting, shift=True) if way == "shift" else replace(best.setting, dither=True)
        other = _fitted(layer, fit, with_it, damage)
        found = damage(other, test)
        tests[way] = float(found.mean())
        if _is_less(found, least, sure):
            best, least = other, found
    return best, float(least.mean()), tests


def _fitted(layer: Layer, inputs: Tensor, setting: Activations, damage: Damage) -> InputRounding:
    """The rounding of a setting that does the least damage to `inputs`."""
    rounding = layer.rounding_for(replace(setting, dither=False)).to(inputs.device)
    if setting.shift:
        rounding.shift = _shift(inputs, rounding.spatial)
    if setting.scale == "token":
        return rounding
    whole = inputs if rounding.factor is None else inputs / rounding.factor
    largest = float(whole.abs().max().clamp_min(1e-30)) / setting.top
    shares = _tried(rounding, [largest * share for share in SHARES], inputs, damage)
    scale, _ = min(shares, key=lambda found: found[1])
    rounding.set_scale(scale)
    return _dithered(layer, rounding, scale, inputs, damage) if setting.dither else rounding


def _dithered(layer: Layer, plain: InputRounding, scale: float, inputs: Tensor, damage: Damage) -> InputRounding:
    """The same rounding with the amplitude of noise, and the scale near that of before, that do the least damage."""
    rounding = layer.rounding_for(replace(plain.setting, dither=True)).to(inputs.device)
    if plain.setting.shift:
        rounding.shift = plain.shift
    noise = 2 * torch.rand(len(rounding.noise), generator=torch.Generator().manual_seed(0)).to(inputs.device) - 1
    scales = [scale * 2.0 ** (k / 4) for k in range(-NEAR, NEAR + 1)]
    trials = []
    for amplitude in AMPLITUDES:
        rounding.set_noise(amplitude * noise)
        trials += [(amplitude, *found) for found in _tried(rounding, scales, inputs, damage)]
    amplitude, scale, _ = min(trials, key=lambda trial: trial[2])
    rounding.set_noise(amplitude * noise)
    rounding.set_scale(scale)
    rounding.take_away(layer.product)
    return rounding


def _tried(
    rounding: InputRounding, scales: Sequence[float], inputs: Tensor, damage: Damage
) -> list[tuple[float, float]]:
    """Every scale with the mean damage that it does."""
    found = []
    for scale in scales:
        rounding.set_scale(scale)
        found.append((scale, float(damage(rounding, inputs).mean())))
    return found


def _shift(inputs: Tensor, spatial: int) -> Tensor:
    """`k` (channels,) for which no channel less `2^k` goes beyond the largest, and none falls short of half of it.

    A channel with nothing in it stays as it is.
    """
    channels = inputs.movedim(-1 - spatial, -1).flatten(0, -2).abs().amax(0).float()
    ratio = channels / channels.max().clamp_min(1e-30)
    exponent = torch.frexp(ratio).exponent.clamp(LEAST_SHIFT, 0)
    return torch.where(channels > 0, exponent, 0).to(torch.int8)


def _is_less(found: Tensor, before: Tensor, sure: float) -> bool:
    """Whether a mean is below another one by more than `sure` standard errors of their paired difference."""
    gap = (found - before).double()
    return bool(gap.mean() < -sure * gap.std(correction=0).clamp_min(1e-300) / math.sqrt(len(gap)))


def _evenly(rows: Tensor, many: int) -> Tensor:
    """At most `many` of the rows, evenly spread."""
    return rows if len(rows) <= many else rows[torch.arange(many, device=rows.device) * len(rows) // many]


def _groups(layers: dict[str, tuple[Site, Layer]]) -> Iterator[list[str]]:
    """The names of layers in groups whose inputs may be held at once."""
    group: list[str] = []
    held = 0
    for place, (site, layer) in layers.items():
        size = 4 * ROWS * site.shape[1] if isinstance(layer, ApproximateLinear) else HELD_BYTES // 4
        if group and held + size > HELD_BYTES:
            yield group
            group, held = [], 0
        group.append(place)
        held += size
    if group:
        yield group
