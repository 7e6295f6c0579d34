"""Finding the sites of a model by walking its parameters, not by a list of model names.

A site is one weight that can be approximated: the weight of a linear layer, a convolution, a table, or a fused stack of
expert weights. Tied weights are one parameter and so one site; everything else is listed as untouched.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from tersor.errors import TersorError
from tersor.models.ondemand import values_of

MINIMUM_WEIGHTS = 4096
EXCLUDED = "excluded by a pattern"
KINDS = ("linear", "transposed", "table", "convolution", "experts")


@dataclass(frozen=True)
class Site:
    """One weight: `name` is its first module (for experts, its parameter), `places` all (module, parameter) it has.

    Its matrices are (stack, rows, columns): one matrix but for experts; kernels are unfolded, GPT-2's weights turned.
    """

    name: str
    kind: str
    places: tuple[tuple[str, str], ...]
    parameter_shape: tuple[int, ...]
    dtype: torch.dtype
    stack: int
    shape: tuple[int, int]

    @property
    def parameters(self) -> int:
        return self.stack * self.shape[0] * self.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of the weight as it was."""
        return self.parameters * torch.empty(0, dtype=self.dtype).element_size()

    @property
    def parameter_name(self) -> str:
        module, parameter = self.places[0]
        return f"{module}.{parameter}" if module else parameter

    def parameter(self, module: nn.Module) -> nn.Parameter:
        return module.get_parameter(self.parameter_name)

    def matrices(self, module: nn.Module) -> Tensor:
        """The weight as (stack, rows, columns), float32, a copy."""
        return self.to_matrices(values_of(self.parameter(module))).float().contiguous()

    def to_matrices(self, parameter: Tensor) -> Tensor:
        turned = parameter.T if self.kind == "transposed" else parameter
        return turned.reshape(self.stack, *self.shape)

    def to_parameter(self, matrices: Tensor) -> Tensor:
        """The inverse of `to_matrices`."""
        if self.kind == "transposed":
            return matrices.reshape(self.shape).T
        return matrices.reshape(self.parameter_shape)


@dataclass(frozen=True)
class Walk:
    """The sites of a model and what is left untouched, as (name, parameters, bytes, why)."""

    sites: tuple[Site, ...]
    untouched: tuple[tuple[str, int, int, str], ...] = field(default=())


def walk(
    module: nn.Module,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    minimum: int = MINIMUM_WEIGHTS,
    check: bool = True,
) -> Walk:
    """All sites of `module` in the order of its modules; `include` and `exclude` are glob patterns on their names.

    Raises TersorError for a pattern that matches no site, for NaN or infinite weights, and where nothing is left.
    """
    places: dict[int, list[tuple[str, str, str | None, nn.Parameter]]] = {}
    for module_name, owner in module.named_modules():
        for parameter_name, parameter in owner.named_parameters(recurse=False):
            kind = _kind(owner, parameter_name, parameter)
            places.setdefault(id(parameter), []).append((module_name, parameter_name, kind, parameter))
    found: list[Site] = []
    untouched: list[tuple[str, int, int, str]] = []
    for uses in places.values():
        module_name, parameter_name, _, parameter = uses[0]
        kinds = [kind for *_, kind, _ in uses if kind is not None]
        full_name = f"{module_name}.{parameter_name}" if module_name else parameter_name
        size = parameter.numel() * parameter.element_size()
        if not kinds or not parameter.is_floating_point():
            untouched.append((full_name, parameter.numel(), size, "not a weight of a known kind"))
        elif parameter.numel() < minimum:
            untouched.append((full_name, parameter.numel(), size, f"under {minimum} weights"))
        else:
            found.append(_site(kinds[0], uses, parameter))
    for pattern in (*include, *exclude):
        if not any(fnmatch.fnmatchcase(site.name, pattern) for site in found):
            names = ", ".join(site.name for site in found[:3])
            raise TersorError(f"The pattern {pattern!r} matches no site; site names look like {names}.")
    kept = []
    for site in found:
        if (include and not _matches(site.name, include)) or _matches(site.name, exclude):
            untouched.append((site.parameter_name, site.parameters, site.nbytes, EXCLUDED))
        else:
            kept.append(site)
    used = [*(s.parameter_name for s in kept), *(name for name, *_, why in untouched if why != EXCLUDED)]
    for name in used if check else ():
        if not torch.isfinite(values_of(module.get_parameter(name))).all():
            raise TersorError(f"The weight {name} has NaN or infinite entries; mend the checkpoint first.")
    if not kept:
        raise TersorError(f"The model has no weight of at least {minimum} entries that could be approximated.")
    return Walk(tuple(kept), tuple(untouched))


def block_of(name: str) -> str:
    """The name of a site up to its first number: the block it belongs to."""
    parts = name.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts))
    return ".".join(parts[: number + 1])


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _kind(owner: nn.Module, name: str, parameter: nn.Parameter) -> str | None:
    if name == "weight" and isinstance(owner, nn.Embedding):
        return "table"
    if name == "weight" and isinstance(owner, nn.Linear):
        return "linear"
    if name == "weight" and isinstance(owner, nn.Conv1d | nn.Conv2d):
        return "convolution"
    if name == "weight" and type(owner).__name__ == "Conv1D" and parameter.dim() == 2:
        return "transposed"
    is_convolution = isinstance(owner, nn.modules.conv._ConvNd)
    if parameter.dim() == 3 and not is_convolution and min(parameter.shape[1:]) > 1:
        return "experts"
    return None


def _site(kind: str, uses: list[tuple[str, str, str | None, nn.Parameter]], parameter: nn.Parameter) -> Site:
    module_name, parameter_name = uses[0][:2]
    shape = tuple(parameter.shape)
    stack = shape[0] if kind == "experts" else 1
    matrix = (shape[1], shape[0]) if kind == "transposed" else (shape[-2], shape[-1])
    if kind == "convolution":
        matrix = (shape[0], parameter.numel() // shape[0])
    name = module_name if kind != "experts" else f"{module_name}.{parameter_name}".removeprefix(".")
    return Site(name, kind, tuple(u[:2] for u in uses), shape, parameter.dtype, stack, matrix)
