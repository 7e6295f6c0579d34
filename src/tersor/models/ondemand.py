"""Weights on demand: a module whose parameters lie in its checkpoint, and in memory only while they are used.

Such a parameter is on the meta device and can be read. A module that owns some has them while its forward runs, a block
of a chain all of its own at once; whoever holds a module for longer keeps them for longer. What reads a parameter
outside of a forward goes through `values_of`, what puts another weight in its place through `replaced`.
"""

from __future__ import annotations

import copy
import ctypes
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tersor.errors import TersorError
from tersor.models.files import Checkpoint, read_tensor

_OWNED = "_unread"  # in the __dict__ of a module: its parameters that are in a file, by name
Place = tuple[nn.Module, str, str]  # a module, the table of it (`_parameters` or `_buffers`), a name there


class Unread(nn.Parameter):
    """A parameter, or a buffer, that lies under `key` in a safetensors file; `read` gives it, or what stands in for it.

    `places` are the modules that have it, with its name there: more than one where weights are tied.
    """

    path: Path
    key: str
    home: torch.device
    places: list[Place]
    stand_in: Tensor | None
    holders: int

    def __new__(cls, like: Tensor, path: Path, key: str, home: torch.device) -> Unread:
        made: Unread = torch.Tensor._make_subclass(cls, torch.empty_like(like, device="meta"), False)
        made.path, made.key, made.home = path, key, home
        made.places, made.stand_in, made.holders = [], None, 0
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> Unread:
        made = Unread(self, self.path, self.key, self.home)
        memo[id(self)] = made
        made.stand_in, made.places = self.stand_in, copy.deepcopy(self.places, memo)
        return made

    def read(self) -> Tensor:
        if self.stand_in is not None:
            return self.stand_in
        return read_tensor(self.path, self.key).to(self.home, self.dtype)

    def hold(self) -> None:
        """Put the values in its places, if nobody did before."""
        self.holders += 1
        if self.holders == 1:
            values = self.read()
            if self.places[0][1] == "_parameters":
                values = nn.Parameter(values, requires_grad=False)
                values.unread = self  # type: ignore[attr-defined]
            for owner, table, name in self.places:
                owner.__dict__[table][name] = values

    def release(self) -> None:
        """The inverse of `hold`; the values go with the last who held them."""
        self.holders -= 1
        if self.holders == 0:
            for owner, table, name in self.places:
                owner.__dict__[table][name] = self
                forget: Any = getattr(owner, "forget", None)
                if forget is not None:
                    forget()  # what an operator made of it


class _Held:
    """The forward of a module that has its parameters, and those of all inside it if `whole`, while it runs."""

    def __init__(self, module: nn.Module, whole: bool) -> None:
        self.module, self.whole = module, whole

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        return type(self.module).forward.__get__(self.module)  # type: ignore[no-any-return]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with held(self.module, whole=self.whole):
            return self.__wrapped__(*args, **kwargs)


def is_on_demand(module: nn.Module) -> bool:
    """Whether weights of a module are in memory only while they are used."""
    return any(_OWNED in owner.__dict__ for owner in module.modules())


@contextmanager
def held(module: nn.Module, whole: bool = True) -> Iterator[None]:
    """Inside, the parameters of a module, of all inside it if `whole`, are in memory."""
    owners = list(module.modules()) if whole else [module]
    with ExitStack() as stack:
        for owner in (*owners, *(lent for user in owners for lent in _lent(user))):
            for parameter in owner.__dict__.get(_OWNED, {}).values():
                parameter.hold()
                stack.callback(parameter.release)
        yield
    _give_back()


def _give_back() -> None:
    """Have the allocator return what is free to the system: glibc keeps more with every block, up to gigabytes."""
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@cache
def _malloc_trim() -> Any:
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


def values_of(parameter: Tensor) -> Tensor:
    """The values of a parameter, wherever they are."""
    return parameter.read() if isinstance(parameter, Unread) else parameter.detach()


@contextmanager
def replaced(parameter: nn.Parameter, values: Tensor) -> Iterator[None]:
    """Inside, a parameter has other values."""
    if isinstance(parameter, Unread):
        before, parameter.stand_in = parameter.stand_in, values.to(parameter.home, parameter.dtype).contiguous()
        try:
            yield
        finally:
            parameter.stand_in = before
        return
    kept, parameter.data = parameter.data, values.to(parameter.data).contiguous()
    try:
        yield
    finally:
        parameter.data = kept


@contextmanager
def without_weights() -> Iterator[None]:
    """Inside, modules are made with parameters on the meta device and buffers in memory."""
    register = nn.Module.register_parameter

    def on_meta(self: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=False)
        register(self, name, parameter)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def take_from_file(module: nn.Module, checkpoint: Checkpoint, source: Path, device: str, prefix: str = "") -> None:
    """Have the parameters of `module`, which has none in memory, and the tensors of its operators read on demand.

    Its other buffers are read at once. A name in the files may have the `prefix` of a model inside a larger one, or
    lack it. Raises TersorError for a tensor of the module that the files have under another name or in another shape.
    """
    home, state = torch.device(device), module.state_dict(keep_vars=True)
    names: dict[int, list[str]] = {}
    places: dict[int, list[Place]] = {}
    for path, owner in module.named_modules():
        owner.__dict__.pop(_OWNED, None)
        for table in ("_parameters", "_buffers") if hasattr(owner, "forget") else ("_parameters",):
            for name, tensor in owner.__dict__[table].items():
                full = f"{path}.{name}".removeprefix(".")
                if tensor is not None and (table == "_parameters" or full in state):
                    names.setdefault(id(tensor), []).append(full)
                    places.setdefault(id(tensor), []).append((owner, table, name))
    for number, found in names.items():
        owner, table, name = places[number][0]
        like = owner.__dict__[table][name]
        key = _key_of(found, tuple(like.shape), checkpoint, source, prefix)
        unread = Unread(like, checkpoint.entries[key][0], key, home)
        unread.places = places[number]
        for owner, table, name in unread.places:
            owner.__dict__[table][name] = unread
            owner.__dict__.setdefault(_OWNED, {})[name] = unread
    for path, owner in module.named_modules():
        for name, buffer in owner._buffers.items():
            if buffer is None or isinstance(buffer, Unread):
                continue
            full = f"{path}.{name}".removeprefix(".")
            if full in state:
                key = _key_of([full], tuple(buffer.shape), checkpoint, source, prefix)
                buffer = read_tensor(checkpoint.entries[key][0], key).to(buffer.dtype)
            owner._buffers[name] = buffer.to(home)
    for owner, whole in units_of(module):
        owner.__dict__["forward"] = _Held(owner, whole)


def _key_of(names: list[str], shape: tuple[int, ...], checkpoint: Checkpoint, source: Path, prefix: str) -> str:
    """The name in the files of a tensor with these names in the module."""
    for name in names:
        for key in (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")):
            if key in checkpoint.entries:
                path, found, _ = checkpoint.entries[key]
                if found != shape:
                    raise TersorError(f"{path}: {key} has shape {found}, but the model asks for {shape}.")
                return key
    raise TersorError(
        f"{source} has no {names[0]} under that name, so its weights cannot be read on demand; leave out --memory."
    )


def units_of(module: nn.Module) -> Iterator[tuple[nn.Module, bool]]:
    """The modules that are given their weights as they run: whole blocks of chains (True), the others each its own.

    A module that takes tensors out of one that is never called, such as an operator, has those of all inside it.
    """
    called = all(isinstance(c, nn.ModuleList | nn.ModuleDict) or _has_forward(c) for c in module.children())
    if not called or any(hasattr(child, "forget") for child in module.children()):
        yield module, True
        return
    if module.__dict__.get(_OWNED) or next(_lent(module), None) is not None:
        yield module, False
    for child in module.children():
        if isinstance(module, nn.ModuleList | nn.Sequential):
            yield child, True
        else:
            yield from units_of(child)


def _has_forward(module: nn.Module) -> bool:
    return type(module).forward is not nn.Module.forward


def _lent(owner: nn.Module) -> Iterator[nn.Module]:
    """What a module uses without owning it: the operator of a weight that it is tied to."""
    for value in owner.__dict__.values():
        lent = getattr(value, "operator", value)
        if isinstance(lent, nn.Module):
            yield from lent.modules()
