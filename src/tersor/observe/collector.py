"""What is gathered on a pass over the calibration data: watch what the model does with every weight, both ways.

What a model does with a weight is seen at the call of the function that takes it (linear, embedding, convolution,
matrix products), so tied weights, fused experts and layers with a forward of their own need no case of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tersor.errors import TersorError
from tersor.models.model import Model
from tersor.models.sites import Site
from tersor.observe.summary import Summary

LARGEST_MOMENT = 8192
PAIR_SAMPLE = 128
CAPTURED_EVERY = 8
_LINEAR = {nn.functional.linear}
_PRODUCTS = {torch.matmul, torch.mm, torch.bmm, Tensor.matmul, Tensor.mm, Tensor.bmm, Tensor.__matmul__}
_CONVOLUTIONS = {nn.functional.conv1d, nn.functional.conv2d, torch.conv1d, torch.conv2d}
Key = tuple[str, int, str]  # site, index in its stack, "table" or "linear"


class Collector(TorchFunctionMode):
    """Gathers summaries of `sites` while active; `begin` says which positions are real.

    `summaries[site, index, use]` grows by every call that uses a weight; gradients enter when `backward` is called.
    While it is not `counting`, calls are those of a part that is run again: `strays` are the sites there that gradients
    reach nevertheless.
    """

    def __init__(self, model: Model, sites: Iterable[Site], *, gradients: bool) -> None:
        super().__init__()
        self.summaries: dict[Key, Summary] = {}
        self.rows_are_inputs: dict[Key, bool] = {}
        self.gradients = gradients
        self.predictions = 0
        self.counting = True
        self.strays: set[str] = set()
        self._masks: list[Tensor] = []
        self._routed: Tensor | None = None
        self._captures = False
        self._last_source: Tensor | None = None
        self._last_moment = self._last_sum = torch.empty(0)
        self._of: dict[int, Site] = {id(site.parameter(model.module)): site for site in sites}
        self._anchor = torch.zeros((), requires_grad=True)

    def begin(self, masks: list[Tensor], left: int = 0, *, counting: bool = True) -> None:
        """Start a batch whose real positions are those where a mask (batch, length) of its shape is not zero.

        So many batches are `left` after it: some, and the last, are held against the moments so far.
        """
        self.counting = counting
        self._masks = [m.bool() for m in masks]
        self._captures = left % CAPTURED_EVERY == 0
        self._last_source = self._routed = None

    def count(self) -> None:
        """Count from here on."""
        self.counting = True

    def add(self, summaries: Mapping[Key, Summary], rows_are_inputs: Mapping[Key, bool]) -> None:
        """Add summaries that another collector gathered."""
        for key, summary in summaries.items():
            self.rows_are_inputs[key] = rows_are_inputs[key]
            self.summaries[key] = self.summaries[key] + summary if key in self.summaries else summary

    def finish(self, predictions: int) -> None:
        """Give all summaries the number of predictions; raises TersorError for one that is not finite."""
        self.predictions = predictions
        for (name, *_), summary in self.summaries.items():
            summary.predictions = predictions
            if not (summary.weighted_gradients.isfinite().all() and summary.inputs.isfinite().all()):
                raise TersorError(f"The model gives NaN or infinite values at {name} on the calibration data.")

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if func in _LINEAR or func is nn.functional.embedding or func in _CONVOLUTIONS or func in _PRODUCTS:
            given = (*args, *(kwargs[k] for k in ("input", "mat2", "other", "weight") if k in kwargs))
            x, weight = given[:2]
        elif func in (torch.addmm, Tensor.addmm) and len(args) > 2:
            x, weight = args[1:3]
        else:
            if func is Tensor.__getitem__ and self._masks:
                self._follow(*args)
            return output
        found = self._find(weight)
        if found is None:
            return output
        if self.gradients and not output.requires_grad:
            output = output + self._anchor.to(output.device, output.dtype)
        if not self.counting:
            if self.gradients:
                output.register_hook(partial(self._stray, found[0].name))
            return output
        self._record(found, func, x, output, args, kwargs)
        return output

    def _stray(self, name: str, _: Tensor) -> None:
        self.strays.add(name)

    def _find(self, weight: Any) -> tuple[Site, int | None, bool] | None:
        """(site, index in the stack or None for all, turned) of a weight or of a view of one."""
        if not isinstance(weight, Tensor):
            return None
        base: Tensor | None = weight
        site = self._site_of(base)
        if site is None:
            base = weight._base
            site = self._site_of(base)
        if site is None or base is None:
            return None
        if weight is base:
            return site, None if site.stack > 1 else 0, False
        turned = weight.stride()[-2:] != base.stride()[-2:]
        if site.stack == 1:
            return (site, 0, turned) if weight.numel() == base.numel() else None
        if weight.dim() == 3 and weight.shape[0] == site.stack:
            return site, None, turned
        if weight.dim() == 2 and weight.numel() == base[0].numel():
            return site, weight.storage_offset() // base.stride(0), turned
        return None

    def _site_of(self, weight: Tensor | None) -> Site | None:
        """The site of a weight; one that was read from a file on demand stands for the one that lies there."""
        return self._of.get(id(getattr(weight, "unread", weight)))

    def _record(
        self, found: tuple[Site, int | None, bool], func: Any, x: Tensor, output: Tensor, args: Any, kwargs: Any
    ) -> None:
        site, index, turned = found
        if index is None:  # a batched product over the whole stack: (stack, n, in) -> (stack, n, out)
            watched = [self._watch((site, k, turned), func, x[k], args, kwargs) for k in range(site.stack)]
            if self.gradients:
                output.register_hook(lambda gradient: [w(g) for w, g in zip(watched, gradient, strict=True)] and None)
            return
        watch = self._watch((site, index, turned), func, x, args, kwargs)
        if self.gradients:
            output.register_hook(watch)

    def _watch(
        self, found: tuple[Site, int, bool], func: Any, x: Tensor, args: Any, kwargs: Any
    ) -> Callable[[Tensor], None]:
        """Count the inputs of one matrix, now or with the gradient of its output, for which a function is returned."""
        site, index, turned = found
        if func is nn.functional.embedding:
            key, inputs, select = (site.name, index, "table"), x.detach(), self._mask(x.shape, site)
            rows_are_inputs, outputs = True, site.shape[1]
        elif func in _CONVOLUTIONS:
            key, select = (site.name, index, "linear"), None
            inputs, rows_are_inputs, outputs = x.detach(), False, site.shape[0]
        else:
            key, inputs, select = (site.name, index, "linear"), x.detach(), self._mask(x.shape[:-1], site)
            is_linear = (func in _LINEAR) != turned  # the weight is (out, in)
            rows_are_inputs = is_linear == (site.kind == "transposed")
            outputs = site.shape[1] if rows_are_inputs else site.shape[0]
        self.rows_are_inputs[key] = rows_are_inputs
        size = site.shape[0] if rows_are_inputs else site.shape[1]
        if key not in self.summaries:
            self.summaries[key] = Summary.zeros(
                size, outputs, LARGEST_MOMENT, key[2] == "table", x.device, gradients=self.gradients
            )
        summary = self.summaries[key]
        unfold = _unfolder(func, args, kwargs, site)

        def add_inputs() -> Tensor:
            rows = _select(unfold(inputs), select)
            self._add_inputs(summary, rows, x if func in _LINEAR else None)
            return rows

        def on_gradient(gradient: Tensor) -> None:
            rows = add_inputs()
            rows = rows.float() if rows.is_floating_point() else rows
            if func in _CONVOLUTIONS:
                gradient = gradient.flatten(2).transpose(1, 2)
                groups = site.parameter_shape[0] * rows.shape[0] // gradient.numel()
                if groups > 1:
                    _add_grouped(summary, rows, gradient.float(), groups)
                    return
            gradients = _select(gradient, select)
            _add_gradients(summary, rows, gradients)
            if self._captures:
                _add_captured(summary, rows, gradients)

        if not self.gradients:
            add_inputs()
        return on_gradient

    def _add_inputs(self, summary: Summary, rows: Tensor, source: Tensor | None) -> None:
        """Add the moment of inputs; layers that share their input (query, key, value) share the product."""
        summary.positions += rows.shape[0]
        if not rows.is_floating_point():
            counts = torch.bincount(rows, minlength=summary.inputs.shape[0]).double()
            summary.inputs += counts
            summary.input_sum += counts
            return
        if source is None or source is not self._last_source or summary.inputs.dim() == 1:
            rows = rows.float()
            self._last_sum = rows.sum(0, dtype=torch.float64)
            if summary.inputs.dim() == 1:
                _add_moment(summary.inputs, rows, rows)
                summary.input_sum += self._last_sum
                return
            self._last_source, self._last_moment = source, rows.T @ rows
        summary.inputs += self._last_moment
        summary.input_sum += self._last_sum

    def _mask(self, shape: torch.Size, site: Site | None = None) -> Tensor | None:
        """Which positions of inputs with these leading dimensions are real; None where all are."""
        routed = self._routed
        if routed is not None and shape == routed.shape and (site is None or site.kind == "experts"):
            return routed
        for mask in self._masks:
            if shape == mask.shape or (len(shape) == 1 and shape[0] == mask.numel()):
                return mask.reshape(shape)
            if len(shape) == 2 and shape[0] == 1 and shape[1] == mask.shape[1]:  # one row for all, such as positions
                return mask.any(0, keepdim=True)
        return routed if routed is not None and shape == routed.shape else None

    def _follow(self, x: Any, index: Any) -> None:
        """Positions picked by number, as a router does: remember which of those picked are real."""
        if isinstance(index, tuple) and len(index) == 2 and index[0] is None:
            index = index[1]
        if isinstance(index, Tensor) and index.dtype == torch.long and index.dim() == 1 and isinstance(x, Tensor):
            mask = next((m for m in self._masks if x.dim() == 2 and len(x) == m.numel()), None)
            if mask is not None:
                self._routed = mask.flatten()[index]


def _select(values: Tensor, mask: Tensor | None) -> Tensor:
    if mask is not None:
        return values[mask]
    return values.reshape(-1, values.shape[-1]) if values.is_floating_point() else values.reshape(-1)


def _unfolder(func: Any, args: Any, kwargs: Any, site: Site) -> Callable[[Tensor], Tensor]:
    """How inputs become rows (..., in): as they are, or the patches that a convolution sees."""
    if func not in _CONVOLUTIONS:
        return lambda x: x
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    given = dict(zip(names, args, strict=False)) | kwargs
    size = site.parameter_shape[2:]
    groups, kernel = given.get("groups", 1), (1, *size)[-2:]
    stride, dilation = (_pair(given.get(name, 1), 1, len(size)) for name in ("stride", "dilation"))
    padding = given.get("padding", 0)
    total = [d * (k - 1) if padding == "same" else 0 for d, k in zip(dilation, kernel, strict=True)]
    sides = [side for t in reversed(total) for side in (t // 2, t - t // 2)]
    margin = (0, 0) if isinstance(padding, str) else _pair(padding, 0, len(size))

    def patches(x: Tensor) -> Tensor:
        x = nn.functional.pad(x if x.dim() == 4 else x[:, :, None, :], sides)
        unfolded = nn.functional.unfold(x, kernel, dilation, margin, stride).transpose(1, 2)
        return unfolded if groups == 1 else unfolded.reshape(*unfolded.shape[:2], groups, -1)

    return patches


def _pair(value: int | tuple[int, ...], missing: int, dimensions: int) -> tuple[int, int]:
    """A convolution's argument for two dimensions; `missing` for the one that a 1-D convolution lacks."""
    values = (value,) * dimensions if isinstance(value, int) else tuple(value)
    return (missing, *values)[-2:]  # type: ignore[return-value]


def _add_gradients(summary: Summary, rows: Tensor, gradients: Tensor) -> None:
    gradients = gradients.float()
    strength = gradients.square().sum(1)
    if not rows.is_floating_point():
        summary.weighted_inputs.index_add_(0, rows, strength.double())
        _add_moment(summary.weighted_gradients, gradients, gradients)
        summary.mass += float(strength.sum(dtype=torch.float64))
        return
    size = rows.square().sum(1)
    _add_moment(summary.weighted_inputs, rows * strength[:, None], rows)
    _add_moment(summary.weighted_gradients, gradients * size[:, None], gradients)
    summary.mass += float((strength * size).sum(dtype=torch.float64))


def _add_grouped(summary: Summary, rows: Tensor, gradients: Tensor, groups: int) -> None:
    """A grouped convolution: each group of a position has inputs (n groups, in) and outputs (n, groups out)."""
    gradients = gradients.reshape(len(rows) // groups, groups, -1)
    strength = gradients.square().sum(2).flatten()
    size = rows.square().sum(1)
    _add_moment(summary.weighted_inputs, rows * strength[:, None], rows)
    blocks = torch.einsum("ngo,ngp->gop", gradients * size.view(-1, groups, 1), gradients)
    if summary.weighted_gradients.dim() == 1:
        summary.weighted_gradients += blocks.diagonal(dim1=1, dim2=2).flatten()
    else:
        summary.weighted_gradients += torch.block_diag(*blocks)
    summary.mass += float((strength * size).sum(dtype=torch.float64))


def _add_captured(summary: Summary, rows: Tensor, gradients: Tensor) -> None:
    """Sums for `captured_share`: with K = A (x) G normalised, `<F, K>` and `|F|^2` over pairs of sampled positions."""
    step = max(1, len(rows) // PAIR_SAMPLE)
    rows, gradients = rows[::step], gradients[::step].float()
    if len(rows) < 2 or not rows.is_floating_point():
        return
    a, g = summary.weighted_inputs.to(rows.dtype), summary.weighted_gradients.to(rows.dtype)
    along_a = (rows * (rows * a if a.dim() == 1 else rows @ a)).sum(1)
    along_g = (gradients * (gradients * g if g.dim() == 1 else gradients @ g)).sum(1)
    share = 1 / (len(rows) * float(a.norm() * g.norm()) + 1e-300)
    products = ((rows @ rows.T) * (gradients @ gradients.T)).square().double()
    products.fill_diagonal_(0)
    count = len(rows) * (len(rows) - 1)
    summary.overlap += float((along_a.double() * along_g.double()).sum()) * share * count
    summary.pair_energy += float(products.sum())
    summary.pairs += count


def _add_moment(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add `left^T right` to a moment, or its diagonal to a diagonal one, in place."""
    if total.dim() == 1:
        total += (left * right).sum(0, dtype=torch.float64)
    else:
        total.addmm_(left.T, right)
