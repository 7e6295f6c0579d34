"""What counts as damage at the output of a model, and the random probes whose gradients have its Hessian as covariance.

A divergence compares original and new outputs, prediction by prediction. With `g` the gradient of its probe at the
original output, `E[g g^T]` is the Hessian of the divergence at zero error, so half a squared norm of errors under the
moments of `g` predicts it.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from tersor.errors import TersorError

CACHED = 1 << 19  # logits that are compared at a time


@dataclass(frozen=True)
class Divergence:
    """`compare(original, new)` maps outputs (predictions, ...) to (predictions,); `probe` makes a scalar of outputs."""

    name: str
    unit: str
    compare: Callable[[Tensor, Tensor], Tensor]
    probe: Callable[[Tensor, torch.Generator], Tensor]


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator, device=like.device, dtype=torch.float32)


def _of_each(terms: Tensor) -> Tensor:
    """Sums of terms (predictions, ...) over all but the predictions."""
    return terms.reshape(len(terms), -1).sum(1)


def _kl(original: Tensor, new: Tensor) -> Tensor:
    """A few rows at a time, which stay in the cache and take no memory beside the outputs."""
    classes = original.shape[-1]
    rows = [t.reshape(-1, classes).split(max(1, CACHED // max(1, classes))) for t in (original, new)]
    parts = []
    for a, b in zip(*rows, strict=True):
        p, q = a.float().log_softmax(-1), b.float().log_softmax(-1)
        parts.append((p.exp() * (p - q)).sum(-1))
    return _of_each(torch.cat(parts).reshape(original.shape[:-1]))


def _kl_probe(output: Tensor, generator: torch.Generator, temperature: float = 1.0) -> Tensor:
    """Its gradient is that of a sampled label's logit less that of the mean logit."""
    logs = (output.float() / temperature).log_softmax(-1)
    flat = logs.reshape(-1, logs.shape[-1])
    label = torch.multinomial(flat.detach().exp(), 1, generator=generator)
    return flat.gather(-1, label).sum() * temperature


def _cosine(original: Tensor, new: Tensor) -> Tensor:
    a, b = (torch.nn.functional.normalize(t.double(), dim=-1) for t in (original, new))
    return _of_each(0.5 * (a - b).square().sum(-1))


def _cosine_probe(output: Tensor, generator: torch.Generator) -> Tensor:
    unit = torch.nn.functional.normalize(output.float(), dim=-1)
    return (unit * _normal(unit, generator)).sum()


def _mse(original: Tensor, new: Tensor) -> Tensor:
    return _of_each((original.float() - new.float()).square()) / original[0].numel()


def _mse_probe(output: Tensor, generator: torch.Generator) -> Tensor:
    output = output.float()
    scale: float = (2 / output[0].numel()) ** 0.5
    return (output * _normal(output, generator)).sum() * scale


def _bce(original: Tensor, new: Tensor) -> Tensor:
    logsigmoid = torch.nn.functional.logsigmoid
    a, b = original.double(), new.double()
    on, off = a.sigmoid(), (-a).sigmoid()
    terms = on * (logsigmoid(a) - logsigmoid(b)) + off * (logsigmoid(-a) - logsigmoid(-b))
    return _of_each(terms)


def _bce_probe(output: Tensor, generator: torch.Generator) -> Tensor:
    output = output.float()
    label = torch.rand(output.shape, generator=generator, device=output.device) < output.detach().sigmoid()
    return torch.nn.functional.logsigmoid(torch.where(label, output, -output)).sum()


DIVERGENCES = {
    d.name: d
    for d in (
        Divergence("kl", "nats", _kl, _kl_probe),
        Divergence("cosine", "1 - cos", _cosine, _cosine_probe),
        Divergence("mse", "squared error", _mse, _mse_probe),
        Divergence("bce", "nats", _bce, _bce_probe),
    )
}
LARGEST_HESSIAN = 512


def softened(divergence: Divergence, temperature: float) -> Divergence:
    """`kl` with labels sampled at a temperature: the Hessian of a model as much less sure of its predictions."""
    if temperature == 1:
        return divergence
    return replace(divergence, probe=partial(_kl_probe, temperature=temperature))


def custom_divergence(function: Callable[[Tensor, Tensor], Tensor], name: str = "custom") -> Divergence:
    """A divergence from any Python function of (original, new) outputs that returns one value a prediction.

    Its Hessian in the new output is taken by automatic differentiation for up to 512 outputs a prediction, exactly; it
    must be twice differentiable and least, zero, where both outputs are equal.
    """
    return Divergence(name, "units of your own", function, partial(_custom_probe, function))


def _custom_probe(function: Callable[[Tensor, Tensor], Tensor], output: Tensor, generator: torch.Generator) -> Tensor:
    flat = output.float().reshape(len(output), -1)
    if flat.shape[1] > LARGEST_HESSIAN:
        raise TersorError(
            f"A divergence of your own takes at most {LARGEST_HESSIAN} outputs a prediction, not {flat.shape[1]}."
        )

    def of_one(new: Tensor, original: Tensor) -> Tensor:
        shape = (1, *output.shape[1:])
        return function(original.reshape(shape), new.reshape(shape)).sum()

    fixed = flat.detach()
    hessian = torch.func.vmap(torch.func.hessian(of_one))(fixed, fixed)
    values, vectors = torch.linalg.eigh(hessian)
    root = vectors * values.clamp_min(0).sqrt()[:, None, :]
    direction: Tensor = (root @ _normal(fixed, generator)[..., None])[..., 0]
    return (flat * direction).sum()


def divergence_named(name: str) -> Divergence:
    """One of `DIVERGENCES`; an unknown name is an error that offers the nearest."""
    if name not in DIVERGENCES:
        near = difflib.get_close_matches(name, DIVERGENCES, 1, 0.0)[0]
        raise TersorError(
            f"There is no divergence {name!r}; did you mean {near!r}? The divergences are {', '.join(DIVERGENCES)}."
        )
    return DIVERGENCES[name]
