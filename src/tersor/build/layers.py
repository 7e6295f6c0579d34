"""Putting operators into a model: layers that apply an operator where a weight was.

Plain layers are replaced by a layer of ours; where a module uses its weight in a way of its own (a scaled table, fused
experts), the module stays and its parameter is replaced by a stand-in that decodes when it is used. Tied weights share
one operator, which is saved once.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tersor.build.activations import Activations, InputRounding
from tersor.coding import StreamError
from tersor.errors import TersorError
from tersor.foreign import understood
from tersor.forms import Operator
from tersor.models.ondemand import is_on_demand
from tersor.models.sites import Site


class _Borrowed:
    """Holds an operator without registering it, for the second place of a tied weight."""

    def __init__(self, operator: Operator) -> None:
        self.operator = operator


class _Kept:
    """Holds the layer that was replaced, without its tensors, for when it is wanted back."""

    def __init__(self, owner: nn.Module, dtype: torch.dtype) -> None:
        self.owner, self.dtype = copy.copy(owner), dtype
        self.owner._parameters = dict.fromkeys(owner._parameters)

    def restored(self, weight: nn.Parameter, bias: Tensor | None) -> nn.Module:
        owner = copy.copy(self.owner)
        owner._parameters = {**self.owner._parameters, "weight": weight}
        if "bias" in owner._parameters:
            owner._parameters["bias"] = bias  # type: ignore[assignment]
        return owner


class ApproximateLayer(nn.Module):
    """A layer whose weight is an operator; `weight` decodes it for those who ask. `kept` is set by `install`.

    Its inputs may be rounded; a layer whose inputs can be says so in `rounding_for`.
    """

    kept: _Kept
    rounding: InputRounding | None

    def __init__(self, operator: Operator, bias: Tensor | None, borrowed: bool) -> None:
        super().__init__()
        if borrowed:
            self._borrowed = _Borrowed(operator)
        else:
            self.operator = operator
        self.bias = bias
        self.register_module("rounding", None)

    def rounding_for(self, setting: Activations) -> InputRounding:
        """A rounding of this layer's inputs that is still to be filled."""
        raise TersorError(f"activations: the inputs of {type(self.kept.owner).__name__} are not numbers to be rounded.")

    def rounded(self, x: Tensor) -> Tensor:
        """The inputs as the weight is to see them."""
        return x if self.rounding is None else self.rounding(x)

    def weight_operator(self) -> Operator:
        """The operator, be it this layer's own or that of the layer it is tied to."""
        borrowed = self.__dict__.get("_borrowed")
        return borrowed.operator if borrowed is not None else self.operator

    @property
    def weight(self) -> Tensor:
        like = self.bias
        return self.weight_operator().dense(torch.float32 if like is None else like.dtype)

    def shaped(self, matrix: Tensor) -> Tensor:
        """The matrix of the operator as the weight that the replaced layer had."""
        return matrix

    def extra_repr(self) -> str:
        operator = self.weight_operator()
        return f"{operator.shape[1]} -> {operator.shape[0]}, {getattr(operator.setting, 'label', '')}"


class ApproximateLinear(ApproximateLayer):
    """`operator(x) + bias`, for linear layers and GPT-2's turned ones."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.product(self.rounded(x))
        y = y if self.rounding is None else self.rounding.corrected(y)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def product(self, x: Tensor) -> Tensor:
        """`x W^T`."""
        return self.weight_operator().forward(x)

    def rounding_for(self, setting: Activations) -> InputRounding:
        return InputRounding(setting, self.in_features, self.out_features)

    def shaped(self, matrix: Tensor) -> Tensor:
        return matrix.T if type(self.kept.owner).__name__ == "Conv1D" else matrix

    @property
    def in_features(self) -> int:
        return self.weight_operator().shape[1]

    @property
    def out_features(self) -> int:
        return self.weight_operator().shape[0]


class ApproximateTable(ApproximateLayer):
    """Rows of the operator, looked up. `dtype` follows the model's casts through an empty buffer."""

    def __init__(self, operator: Operator, padding_idx: int | None, borrowed: bool, dtype: torch.dtype) -> None:
        super().__init__(operator, None, borrowed)
        self.padding_idx = padding_idx
        self.register_buffer("_like", torch.empty(0, dtype=dtype), persistent=False)

    def forward(self, index: Tensor) -> Tensor:
        like = self.get_buffer("_like")
        return self.weight_operator().take(index, like.dtype)

    @property
    def num_embeddings(self) -> int:
        return self.weight_operator().shape[0]

    @property
    def embedding_dim(self) -> int:
        return self.weight_operator().shape[1]


class ApproximateConvolution(ApproximateLayer):
    """A convolution whose unfolded kernel (out, in / groups x size) is an operator."""

    def __init__(self, operator: Operator, layer: nn.Conv1d | nn.Conv2d, borrowed: bool) -> None:
        super().__init__(operator, layer.bias, borrowed)
        self.kernel = tuple(layer.weight.shape[1:])
        self.arguments = {k: getattr(layer, k) for k in ("stride", "padding", "dilation", "groups")}
        self.function = nn.functional.conv2d if isinstance(layer, nn.Conv2d) else nn.functional.conv1d

    def shaped(self, matrix: Tensor) -> Tensor:
        return matrix.reshape(-1, *self.kernel)

    def forward(self, x: Tensor) -> Tensor:
        y = self.product(self.rounded(x))
        if self.bias is None:
            return y
        return y + self.bias.to(y.dtype).view(-1, *(1,) * (y.dim() - 2))

    def product(self, x: Tensor) -> Tensor:
        """The convolution without its bias."""

        def convolution(x: Tensor, matrix: Tensor) -> Tensor:
            return self.function(x, self.shaped(matrix), None, **self.arguments)

        operator = self.weight_operator()
        if self.arguments["groups"] == 1:
            return operator.convolve(x, convolution)
        return convolution(x, operator.dense(x.dtype))  # factors would mix the inputs of all groups

    def rounding_for(self, setting: Activations) -> InputRounding:
        """Without dither, which a constant would not take away at padded edges; grouped channels are not shifted."""
        setting = replace(setting, dither=False, shift=setting.shift and self.arguments["groups"] == 1)
        return InputRounding(setting, self.kernel[0], 0, spatial=len(self.kernel) - 1)


class StandIn(nn.Module):
    """In the place of a parameter: a stack of operators that decodes where a function takes it as a tensor."""

    def __init__(self, operators: list[Operator], site: Site, dtype: torch.dtype) -> None:
        super().__init__()
        self.operators = nn.ModuleList(operators)
        self.site_shape, self.stack, self.turned = site.parameter_shape, site.stack, site.kind == "transposed"
        self.register_buffer("_like", torch.empty(0, dtype=dtype), persistent=False)

    def tensor(self) -> Tensor:
        """The weight in its original shape."""
        dtype = self.get_buffer("_like").dtype
        matrices = [op.dense(dtype) for op in self._members()]
        if self.turned:
            return matrices[0].T
        return torch.stack(matrices).reshape(self.site_shape)

    def _members(self) -> list[Operator]:
        return list(self.operators)  # type: ignore[arg-type]

    def __getitem__(self, index: Any) -> Tensor:
        if self.stack > 1 and (isinstance(index, int) or (isinstance(index, Tensor) and index.dim() == 0)):
            return self._members()[int(index)].dense(self.get_buffer("_like").dtype)
        return self.tensor()[index]

    def __len__(self) -> int:
        return self.site_shape[0]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or not hasattr(Tensor, name):
                raise
        if name == "shape":
            return torch.Size(self.site_shape)
        if name == "ndim":
            return len(self.site_shape)
        if name in ("dtype", "device"):
            return getattr(self._buffers["_like"], name)
        return getattr(self.tensor(), name)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def decoded(value: Any) -> Any:
            return value.tensor() if isinstance(value, StandIn) else value

        if func is nn.functional.embedding and isinstance(args[1], StandIn) and args[1].stack == 1:
            return args[1]._members()[0].take(args[0], args[1].get_buffer("_like").dtype)
        args = tuple(decoded(a) for a in args)
        return func(*args, **{k: decoded(v) for k, v in (kwargs or {}).items()})


def install(module: nn.Module, site: Site, operators: list[Operator]) -> None:
    """Replace the weight of `site` in `module` by `operators`, one a matrix of its stack, at all of its places."""
    dtype = site.parameter(module).dtype
    for number, (name, parameter_name) in enumerate(site.places):
        owner = module.get_submodule(name)
        borrowed = number > 0
        replaceable = site.stack == 1 and name  # a model that is one layer stays itself
        replacement = layer_for(owner, operators[0], borrowed, dtype) if replaceable else None
        if replacement is not None:
            replacement.kept = _Kept(owner, dtype)
            parent, _, attribute = name.rpartition(".")
            setattr(module.get_submodule(parent), attribute, replacement)
            continue
        del owner._parameters[parameter_name]
        stand_in = StandIn(operators, site, dtype)
        if borrowed:
            owner.__dict__[parameter_name] = stand_in
        else:
            owner._modules[parameter_name] = stand_in


def layer_for(owner: nn.Module, operator: Operator, borrowed: bool, dtype: torch.dtype) -> ApproximateLayer | None:
    """The layer of ours that does what `owner` does, None where it has a forward of its own or hooks."""
    forward = type(owner).forward
    if type(owner).__name__ == "Conv1D" or (isinstance(owner, nn.Linear) and forward is nn.Linear.forward):
        return ApproximateLinear(operator, owner.bias, borrowed)  # type: ignore[arg-type]
    if isinstance(owner, nn.Embedding) and forward is nn.Embedding.forward and owner.max_norm is None:
        return ApproximateTable(operator, owner.padding_idx, borrowed, dtype)
    is_convolution = isinstance(owner, nn.Conv1d | nn.Conv2d) and forward in (nn.Conv1d.forward, nn.Conv2d.forward)
    if is_convolution and owner.padding_mode == "zeros":
        return ApproximateConvolution(operator, owner, borrowed)  # type: ignore[arg-type]
    return None


def operators_of(module: nn.Module) -> Mapping[str, Operator]:
    """All operators of a built model that belong to no other operator, by the prefix of their tensors."""
    found: dict[str, Operator] = {}
    for name, child in module.named_modules():
        if isinstance(child, Operator) and not any(name.startswith(f"{outer}.") for outer in found):
            found[name] = child
    return found


def operators_at(module: nn.Module, place: str, parameter: str) -> list[Operator]:
    """The operators that stand for a parameter of the submodule at `place`, one a matrix of its stack."""
    owner = module.get_submodule(place)
    if isinstance(owner, ApproximateLayer):
        return [owner.weight_operator()]
    stand_in = getattr(owner, parameter)
    assert isinstance(stand_in, StandIn)
    return stand_in._members()


class decoded:
    """A context in which the operators of a module keep their decoded weights: faster, at the original's memory.

    Those that are read on demand are decoded whenever they are used.
    """

    def __init__(self, module: nn.Module) -> None:
        self.operators = {} if is_on_demand(module) else operators_of(module)

    def __enter__(self) -> None:
        for name, operator in self.operators.items():
            operator._decoded = decoded_of(name, operator)

    def __exit__(self, *_: object) -> None:
        for operator in self.operators.values():
            operator._decoded = None


def decoded_of(name: str, operator: Operator) -> Tensor:
    """The matrix of an operator; raises TersorError, naming the operator, where its tensors are none of its form."""
    try:
        with understood(f"The weight {name}"):
            return operator.decode()
    except StreamError as error:
        raise TersorError(f"The weight {name} is damaged: {error}") from error
