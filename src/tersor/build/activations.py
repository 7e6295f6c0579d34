"""Rounding what goes into a layer: integers or small floats, a scale a tensor or a token, channels shifted, dithered.

The values are those that hardware with the format would see, in the dtype of the model: it is the damage of the format
that is built and measured, not its speed. All that a rounding keeps is integers or bit patterns, counted in the file.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tersor.errors import TersorError
from tersor.forms.base import bits_of, from_bits
from tersor.forms.floats import levels_of, split_of

SCALES = ("token", "tensor")
NAMED = {"fp8": "e4m3", "fp6": "e2m3", "fp4": "e2m1"}
NOISE_STEPS = 128  # of the noise in one step of the integers
LEAST_SHIFT = -24


@dataclass(frozen=True)
class Activations:
    """How inputs are rounded: `int8`, `fp8`, `e5m2`, with `scale` a `token`, found as it comes, or a whole `tensor`.

    `shift` and `dither` are what may be tried where a model is to be built, and what is done where a layer has it.
    """

    format: str
    scale: str = "token"
    shift: bool = False
    dither: bool = False

    def __post_init__(self) -> None:
        if self.integer_bits is None and split_of(self.format) is None:
            raise TersorError(
                f"activations: {self.format!r} is no format; it must be int2 to int8, {', '.join(NAMED)}, or one like "
                "e4m3 of 3, 4, 5, 6 or 8 bits in all."
            )
        if self.scale not in SCALES:
            raise TersorError(f"activations: scale is {self.scale!r}, but must be one of {', '.join(SCALES)}.")
        if self.dither and (self.integer_bits is None or self.scale != "tensor"):
            raise TersorError(
                f"activations: dither needs integers with a scale of the whole tensor, as in int8,tensor,dither, "
                f"not {self.label!r}."
            )

    @classmethod
    def of(cls, text: str) -> Activations:
        """Read `int8`, `fp8,tensor`, `fp4,tensor,shift` or `int6,tensor,dither`; raises TersorError for others."""
        name, *words = (word.strip() for word in text.split(","))
        for word in words:
            if word not in (*SCALES, "shift", "dither") or words.count(word) > 1 or set(SCALES) <= set(words):
                raise TersorError(
                    f"activations: {text!r} cannot be read at {word!r}; after the format may come token or tensor, "
                    "shift, and dither."
                )
        scale = "tensor" if "tensor" in words else "token"
        return cls(NAMED.get(name, name), scale, "shift" in words, "dither" in words)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Activations:
        """A setting from its plain values."""
        try:
            return cls(**values)
        except TypeError as error:
            raise TersorError(f"activations: a setting has format, scale and others, not {sorted(values)}.") from error

    @property
    def label(self) -> str:
        extras = [word for word in ("shift", "dither") if getattr(self, word)]
        return ",".join([self.format, self.scale, *extras])

    @property
    def integer_bits(self) -> int | None:
        """The bits of integers; None for floats."""
        found = re.fullmatch(r"int([2-8])", self.format) if isinstance(self.format, str) else None
        return int(found[1]) if found else None

    @property
    def top(self) -> float:
        """The largest value of the format: integers are symmetric."""
        bits = self.integer_bits
        return 2.0 ** (bits - 1) - 1 if bits is not None else max(levels_of(self.format))


def nearest(values: Tensor, setting: Activations) -> Tensor:
    """The values of the format nearest to float32 `values`, ties to the even code, beyond the largest the largest.

    A float of `E` and `M` bits has steps of `2^(max(e, 1 - b) - M)` from `2^e` on, with `b = 2^(E - 1) - 1`.
    """
    if setting.integer_bits is not None:
        return values.round().clamp(-setting.top, setting.top)
    split = split_of(setting.format)
    assert split is not None
    exponent_bits, mantissa_bits = split
    exponent = ((values.view(torch.int32) >> 23) & 255) - 127
    step = power_of_two(exponent.clamp_min(2 - 2 ** (exponent_bits - 1)) - mantissa_bits)
    return ((values / step).round() * step).clamp(-setting.top, setting.top)


def power_of_two(exponent: Tensor) -> Tensor:
    """`2^k` in float32, exact, for integers `k` of -126 to 127."""
    return ((exponent.to(torch.int32) + 127) << 23).view(torch.float32)


class InputRounding(nn.Module):
    """`x` (..., channels, and as many more dimensions as are spatial) as the layer sees it: `2^k s Q(2^-k x / s + n)`.

    `s` is a scale, `2^k` a factor a channel, which belongs into the exponents of the weight's columns (P434 LLM-FP4:
    4-Bit Floating-Point Quantized Transformers), `n` a fixed noise a channel. The layer takes the noise away again with
    the constant `correction = -W 2^k s n` beside its bias (P448 NoisyQuant), stored in half precision.
    """

    scale: Tensor
    shift: Tensor
    noise: Tensor
    correction: Tensor
    __call__: Callable[..., Tensor]

    def __init__(self, setting: Activations, channels: int, outputs: int, spatial: int = 0) -> None:
        super().__init__()
        self.setting, self.spatial = setting, spatial
        if setting.scale == "tensor":
            self.register_buffer("scale", torch.ones(1, dtype=torch.float32).view(torch.int32))
        if setting.shift:
            self.register_buffer("shift", torch.zeros(channels, dtype=torch.int8))
        if setting.dither:
            self.register_buffer("noise", torch.zeros(channels, dtype=torch.int8))
            self.register_buffer("correction", torch.zeros(outputs, dtype=torch.int16))

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors that are stored."""
        return sum(b.numel() * b.element_size() for b in self.buffers())

    def set_scale(self, scale: float | Tensor) -> None:
        """Store the scale of the whole tensor."""
        self.scale = torch.as_tensor(scale, dtype=torch.float32, device=self.scale.device).reshape(1).view(torch.int32)

    def set_noise(self, noise: Tensor) -> None:
        """Store noise (channels,) in steps of the integers, between -1 and 1."""
        self.noise = (noise * NOISE_STEPS).round().clamp(-128, 127).to(torch.int8)

    def take_away(self, product: Callable[[Tensor], Tensor]) -> None:
        """Set what takes the noise away behind `product`, which gives `x W^T` for `x` (1, channels)."""
        self.correction = bits_of(-product(self.offset[None])[0])

    @property
    def factor(self) -> Tensor | None:
        """`2^k` (channels, 1...), or None without a shift."""
        return power_of_two(self._along(self.shift)) if self.setting.shift else None

    @property
    def offset(self) -> Tensor:
        """`2^k s n` (channels, 1...): what the noise adds to an input, in the input's units."""
        offset = self._along(self.noise.float() / NOISE_STEPS) * self.scale.view(torch.float32)
        return offset if self.factor is None else offset * self.factor

    def forward(self, x: Tensor) -> Tensor:
        """What the weight is multiplied by, noise included."""
        values = x.float()
        if self.factor is not None:
            values = values / self.factor
        if self.setting.scale == "tensor":
            scale = self.scale.view(torch.float32)
        else:
            axes = tuple(range(-1 - self.spatial, 0))
            scale = (values.abs().amax(axes, keepdim=True) / self.setting.top).clamp_min(1e-30)
        levels = values / scale
        if self.setting.dither:
            levels = levels + self._along(self.noise.float() / NOISE_STEPS)
        rounded = nearest(levels, self.setting) * scale
        return (rounded if self.factor is None else rounded * self.factor).to(x.dtype)

    def seen(self, x: Tensor) -> Tensor:
        """What the inputs come to once the noise is taken away."""
        return self(x) - self.offset.to(x.dtype) if self.setting.dither else self(x)

    def corrected(self, y: Tensor) -> Tensor:
        """The outputs (..., outputs) of the layer with the noise taken away."""
        return y + from_bits(self.correction).to(y.dtype) if self.setting.dither else y

    def extra_repr(self) -> str:
        return self.setting.label

    def _along(self, values: Tensor) -> Tensor:
        """Values a channel, to be broadcast over the spatial dimensions."""
        return values.view(-1, *(1,) * self.spatial)
