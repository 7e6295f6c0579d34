"""The layout of a model's weights file: which tensors it holds, and which of them the operators of a plan replace.

It is made of names, shapes and dtypes alone and goes into the run as JSON, so every plan's file is known to the byte
without opening the model again.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tersor.build.activations import Activations, InputRounding
from tersor.build.layers import layer_for
from tersor.foreign import understood
from tersor.forms import Operator, form_named, setting_of, settings_of
from tersor.models.files import DTYPES, SHARD_BYTES, Entry, file_bytes
from tersor.models.sites import Site
from tersor.plan import Choice

OPERATOR_TENSORS = 16  # more than any operator has
_BY_NAME = {name: dtype for dtype, name in DTYPES.items()}


@dataclass(frozen=True)
class Layout:
    """The sites, the name of the operators of each in the file (`{}`: number in the stack), all tensors as they are."""

    sites: tuple[Site, ...]
    prefixes: tuple[str, ...]
    tensors: tuple[Entry, ...]

    @classmethod
    def of(cls, module: nn.Module, sites: Iterable[Site], dtype_of: Mapping[str, torch.dtype]) -> Layout:
        """The layout of `module` stored in the dtypes of `dtype_of`."""
        sites = tuple(sites)
        tensors = tuple((n, tuple(t.shape), dtype_of.get(n, t.dtype)) for n, t in distinct_state(module).items())
        return cls(sites, tuple(_prefix(module, site) for site in sites), tensors)

    @property
    def flops(self) -> int:
        """FLOPs of the sites of the original for one position."""
        return sum(2 * s.shape[0] * s.shape[1] for s in self.sites)

    def file_bytes(self, choices: Sequence[Choice], beside: Iterable[Entry] = ()) -> int:
        """The size of the weights file with these choices built and everything else as it is, to the byte.

        `beside` are tensors that the file has besides.
        """
        return file_bytes(self.entries(choices, beside))

    def entries(self, choices: Sequence[Choice], beside: Iterable[Entry] = ()) -> list[Entry]:
        """The tensors of that file."""
        stacks = {site.name: (site.shape, site.stack) for site in self.sites}
        specs: list[Entry] = []
        settings: dict[str, list[Any]] = {}
        for prefix, choice, number in self.operators(choices):
            form, (shape, stack) = form_named(choice.form), stacks[choice.site]
            if not number:
                settings[choice.site] = settings_of(setting_of(form, choice.setting), stack)
            with torch.device("meta"):
                state = form.empty(shape, settings[choice.site][number]).state_dict()
            specs += [(f"{prefix}.{n}", tuple(b.shape), b.dtype) for n, b in state.items()]
        chosen = {choice.site for choice in choices}
        replaced = {f"{m}.{p}".removeprefix(".") for s in self.sites if s.name in chosen for m, p in s.places}
        return [*specs, *beside, *(entry for entry in self.tensors if entry[0] not in replaced)]

    def operators(self, choices: Sequence[Choice]) -> Iterator[tuple[str, Choice, int]]:
        """The operators of these choices by their names in the file, each with its number in the stack of its site."""
        chosen = {choice.site: choice for choice in choices}
        for site, prefix in zip(self.sites, self.prefixes, strict=True):
            for number in range(site.stack if site.name in chosen else 0):
                yield prefix.format(number), chosen[site.name], number

    def rounding_bytes(self, asked: Activations) -> int:
        """At most what rounding the inputs of all layers takes in the file."""
        size = 0
        for site, prefix in zip(self.sites, self.prefixes, strict=True):
            if site.kind == "table" or not prefix.endswith("operator"):
                continue
            channels = site.parameter_shape[1] if site.kind == "convolution" else site.shape[1]
            rounding = InputRounding(asked, channels, site.shape[0])
            for place, _ in site.places:
                header = sum(len(f"{place}.rounding.{n}{list(b.shape)}") + 80 for n, b in rounding.named_buffers())
                size += rounding.nbytes + header
        return size

    def shards_bytes(self, size: int, most: int) -> int:
        """At most what it takes to divide a file of so many bytes into files of `most`."""
        tensors = len(self.tensors) + OPERATOR_TENSORS * sum(site.stack for site in self.sites)
        files = 2 * (size + SHARD_BYTES * tensors) // most  # two that follow one another do not fit into one
        return SHARD_BYTES * min(files, tensors)

    def as_json(self) -> dict[str, Any]:
        return {
            "sites": [
                {
                    "name": s.name,
                    "kind": s.kind,
                    "places": s.places,
                    "parameter_shape": s.parameter_shape,
                    "dtype": DTYPES[s.dtype],
                    "stack": s.stack,
                    "shape": s.shape,
                }
                for s in self.sites
            ],
            "prefixes": self.prefixes,
            "tensors": [(name, shape, DTYPES[dtype]) for name, shape, dtype in self.tensors],
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Layout:
        """The inverse of `as_json`."""
        with understood("The layout of the run"):
            sites = tuple(
                Site(
                    s["name"],
                    s["kind"],
                    tuple((m, p) for m, p in s["places"]),
                    tuple(s["parameter_shape"]),
                    _BY_NAME[s["dtype"]],
                    s["stack"],
                    (s["shape"][0], s["shape"][1]),
                )
                for s in value["sites"]
            )
            tensors = tuple((name, tuple(shape), _BY_NAME[dtype]) for name, shape, dtype in value["tensors"])
            if any(math.prod(s.parameter_shape) != s.parameters for s in sites):
                raise ValueError("a site has other shapes than its weight")
        return cls(sites, tuple(value["prefixes"]), tensors)


def _prefix(module: nn.Module, site: Site) -> str:
    """The name under which `install` puts the operators of a site: in a layer of ours, or in a stand-in."""
    place = site.places[0][0]
    operator = Operator(site.shape, None)  # type: ignore[arg-type]
    owner, replaceable = module.get_submodule(place), site.stack == 1 and place
    replaced = replaceable and layer_for(owner, operator, False, site.dtype) is not None
    return f"{place}.operator" if replaced else f"{site.parameter_name}.operators.{{}}"


def distinct_state(module: nn.Module) -> dict[str, Tensor]:
    """The state of a module with every tied tensor once, under its first name."""
    seen: set[int] = set()
    out: dict[str, Tensor] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            out[name] = tensor.detach()
    return out
