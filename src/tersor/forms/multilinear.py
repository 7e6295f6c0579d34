"""How a form whose matrices are contractions of small factors is fitted under a metric.

A form gives its network and a decomposition that is good where errors are plain squares. Here modes are whitened one by
one, as far as the moments are Kronecker products of moments of the modes, the decomposition is done on what this makes
of the weight, and alternating least squares sees what is left of the metric.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from tersor.forms.base import Candidate, Shape, cost_of
from tersor.forms.network import FactoredOperator, Network, along, stored_part
from tersor.metrics import Metric, Side

SWEEPS, STEPS = 4, 2  # of alternating least squares, and of conjugate gradients for one factor
WORK = 2e10  # FLOPs of a fit, where the moments are applied to errors; large weights get fewer sweeps


@dataclass(frozen=True)
class Frame:
    """The modes whitened one by one: errors are plain squares here as far as the moments are products over the modes.

    `bases` has `L^T` and `L^-T` of the moment of every mode, or their diagonals. What the frame does not whiten is
    left in `metric`, the one that errors see in it.
    """

    network: Network
    bases: Mapping[str, tuple[Tensor, Tensor]]
    metric: Metric

    @classmethod
    def plain(cls, network: Network, metric: Metric) -> Frame:
        """The frame that whitens nothing."""
        return cls(network, {}, metric)

    @classmethod
    def of(cls, network: Network, metric: Metric) -> Frame:
        """The frame of the partial traces of the moments, which are their factors where they have such."""
        bases, sides = {}, []
        for side, letters in ((metric.rows, network.rows), (metric.columns, network.columns)):
            dims = [network.sizes[c] for c in letters]
            of_modes = {c: basis_of(m) for c, m in zip(letters, marginals(side, dims), strict=True)}
            bases.update(of_modes)
            sides.append(_left_over(side, dims, [inverse for _, inverse in of_modes.values()]))
        return cls(network, bases, replace(metric, rows=sides[0], columns=sides[1]))

    def whiten(self, tensor: Tensor, letters: str) -> Tensor:
        """A factor, or the tensor of all modes, as it is in the frame; float64."""
        return self._turn(tensor, letters, 0)

    def unwhiten(self, tensor: Tensor, letters: str) -> Tensor:
        """The inverse of `whiten`; float64."""
        return self._turn(tensor, letters, 1)

    def _turn(self, tensor: Tensor, letters: str, which: int) -> Tensor:
        tensor = tensor.double()
        for axis, c in enumerate(letters):
            if c in self.bases:
                tensor = along(self.bases[c][which], tensor, axis)
        return tensor


def marginals(side: Side, dims: Sequence[int]) -> list[Side]:
    """A moment of every mode: partial traces, scaled so that their Kronecker product has the trace of the moment.

    Where the moment is a Kronecker product over the modes, these are its factors.
    """
    d = len(dims)
    if side.is_diagonal:
        whole = side.moment.double().reshape(*dims)
        total = whole.sum().clamp_min(1e-300)
        parts = [whole.sum([j for j in range(d) if j != i]) if d > 1 else whole for i in range(d)]
    else:
        whole = side.moment.double().reshape(*dims, *dims)
        total = side.moment.double().trace().clamp_min(1e-300)
        left, right = "abcd"[:d], "efgh"[:d]
        parts = []
        for i in range(d):
            second = left[:i] + right[i] + left[i + 1 :]
            parts.append(torch.einsum(f"{left}{second}->{left[i]}{right[i]}", whole))
    return [Side(part / total ** ((d - 1) / d)) for part in parts]


def basis_of(side: Side) -> tuple[Tensor, Tensor]:
    """`L^T` and `L^-T` of a moment, or their diagonals."""
    if side.is_diagonal:
        return side.cholesky, 1 / side.cholesky
    return side.cholesky.T, side.unwhiten(torch.eye(side.size, dtype=torch.float64, device=side.moment.device))


def solve(
    network: Network, residual: Tensor, metric: Metric, factors: list[Tensor], i: int, steps: int = STEPS
) -> Tensor:
    """Move factor `i` towards its least squares solution by preconditioned conjugate gradients, in place.

    `residual` is the error of the matrix times both moments, and the new one is returned. The preconditioner is exact
    where both moments are the identity: there one step is the solution.
    """
    inverses = {c: _inverse(gram) for c, gram in network.grams(factors, i).items()}

    def preconditioned(gradient: Tensor) -> Tensor:
        for axis, c in enumerate(network.operands[i]):
            if c in inverses:
                gradient = along(inverses[c], gradient, axis)
        return gradient

    gradient = network.adjoint(network.tensor(residual), factors, i)
    direction = steepest = preconditioned(gradient)
    first = slope = float((gradient * steepest).sum())
    for _ in range(steps):
        change = network.matrix([*factors[:i], direction, *factors[i + 1 :]])
        felt = metric.columns.felt(metric.rows.apply(change))
        curvature = float((change * felt).sum())
        if not (slope > max(1e-18 * first, 1e-30) and curvature > 0):
            break
        factors[i] = factors[i] + slope / curvature * direction
        residual = residual - slope / curvature * felt
        gradient = network.adjoint(network.tensor(residual), factors, i)
        steepest = preconditioned(gradient)
        new = float((gradient * steepest).sum())
        direction, slope = steepest + new / slope * direction, new
    return residual


def improve(frame: Frame, matrix: Tensor, factors: Sequence[Tensor]) -> list[Tensor]:
    """Alternating least squares under the metric of the frame, for `matrix` and factors as they are in it.

    In float32, unless the weight is small. No step raises the error.
    """
    size = matrix.norm()
    if size == 0:
        return list(factors)
    shares = size ** (1 / len(factors))
    rows, columns = frame.metric.rows, frame.metric.columns
    work = 2.0 * matrix.numel() * sum(1 if s.is_diagonal else s.size for s in (rows, columns))
    sweeps = int(min(SWEEPS, WORK / (work * STEPS * len(factors))))
    dtype = torch.float64 if matrix.numel() <= 1 << 14 else torch.float32
    metric = replace(frame.metric, rows=Side(rows.moment.to(dtype)), columns=Side(columns.moment.to(dtype)))
    found = [(f / shares).to(dtype) for f in factors]
    error = (matrix / size).to(dtype) - frame.network.matrix(found)
    residual = metric.columns.felt(metric.rows.apply(error))
    for _ in range(sweeps):
        for i in range(len(found)):
            residual = solve(frame.network, residual, metric, found, i)
    return [f.double() * shares for f in found]


def balanced(network: Network, factors: Sequence[Tensor]) -> list[Tensor]:
    """The same contraction with factors whose slices along a bond are equally large, so that 16 bits hold them all."""
    factors = list(factors)
    bonds = sorted({c for letters in network.operands for c in letters if c not in network.modes})
    for c in bonds * 2:
        sharing = [j for j, letters in enumerate(network.operands) if c in letters]
        axes = [network.operands[j].index(c) for j in sharing]
        largest = [
            factors[j].abs().movedim(a, 0).flatten(1).amax(1).clamp(1e-30, 1e30)
            for j, a in zip(sharing, axes, strict=True)
        ]
        common = torch.stack(largest).log().mean(0).exp()
        for j, a, most in zip(sharing, axes, largest, strict=True):
            factors[j] = along(common / most, factors[j], a)
    return factors


@dataclass(frozen=True)
class Start:
    """A weight in a frame, and what the settings of the same modes share of its decomposition."""

    frame: Frame
    matrix: Tensor
    prepared: Any


class MultilinearForm:
    """What the forms of factors share. One of them gives its `network` and `decompose`."""

    name: str
    stores: str
    wins: str

    def settings(self, shape: Shape) -> Iterable[Any]:
        raise TypeError(f"{type(self).__name__} does not say what is worth trying")

    def network(self, shape: Shape, setting: Any) -> Network:
        """The factors of a complete setting."""
        raise TypeError(f"{type(self).__name__} does not say what its factors are")

    def prepare(self, tensor: Tensor) -> Any:
        """What the settings of the same modes share of a tensor (modes) in float64."""
        return tensor

    def completed(self, prepared: Any, shape: Shape, setting: Any) -> Any:
        """The setting with what only the weight can tell."""
        return setting

    def decompose(self, prepared: Any, network: Network) -> list[Tensor]:
        """Factors in float64 of what was prepared, good where errors are plain squares."""
        raise TypeError(f"{type(self).__name__} does not say how it decomposes")

    def probe(self, shape: Shape, curve: Sequence[Candidate]) -> Any | None:
        """A setting of a middling size: what is left out is not like the noise of integers."""
        ladder = sorted(self.settings(shape), key=lambda s: cost_of(self, shape, s).stored)
        return ladder[len(ladder) // 2] if ladder else None

    def setting(self, values: Mapping[str, Any]) -> Any:
        raise TypeError(f"{type(self).__name__} does not say what its settings are")

    def empty(self, shape: Shape, setting: Any) -> FactoredOperator:
        return FactoredOperator(shape, setting, self.network(shape, setting))

    def curve(self, weight: Tensor, metric: Metric, settings: Iterable[Any] | None = None) -> list[Candidate]:
        shape: Shape = (weight.shape[0], weight.shape[1])
        starts: dict[Any, list[Start]] = {}
        candidates = []
        for setting in self.settings(shape) if settings is None else settings:
            operator = self._fit(weight, metric, setting, starts)
            divergence = metric.distance(weight.float() - operator.dense())
            cost = cost_of(self, shape, operator.setting)
            candidates.append(Candidate(self.name, operator.setting, cost, divergence))
        return candidates

    def fit(self, weight: Tensor, metric: Metric, setting: Any) -> FactoredOperator:
        return self._fit(weight, metric, setting, {})

    def _fit(self, weight: Tensor, metric: Metric, setting: Any, starts: dict[Any, list[Start]]) -> FactoredOperator:
        """The best of the plain decomposition, the one of the whitened modes, and what alternation makes of it."""
        weight = weight.detach().float()
        shape: Shape = (weight.shape[0], weight.shape[1])
        network = self.network(shape, setting)
        modes = tuple((c, network.sizes[c]) for c in network.modes)
        if modes not in starts:
            starts[modes] = [self._start(weight, f) for f in (Frame.of(network, metric), Frame.plain(network, metric))]
        tried: list[tuple[float, FactoredOperator, Start, list[Tensor]]] = []
        for start in starts[modes]:
            complete = self.completed(start.prepared, shape, setting)
            frame = replace(start.frame, network=self.network(shape, complete))
            factors = self.decompose(start.prepared, frame.network)
            operator = self._stored(frame, factors, shape, complete)
            tried.append((metric.distance(weight - operator.dense()), operator, replace(start, frame=frame), factors))
        least, operator, start, factors = min(tried, key=lambda t: t[0])
        better = self._stored(start.frame, improve(start.frame, start.matrix, factors), shape, operator.setting)
        return better if metric.distance(weight - better.dense()) < least else operator

    def _start(self, weight: Tensor, frame: Frame) -> Start:
        network = frame.network
        tensor = frame.whiten(network.tensor(weight), network.modes)
        return Start(frame, tensor.reshape(weight.shape), self.prepare(tensor))

    def _stored(self, frame: Frame, factors: Sequence[Tensor], shape: Shape, setting: Any) -> FactoredOperator:
        operators = zip(factors, frame.network.operands, strict=True)
        plain = [frame.unwhiten(factor, letters) for factor, letters in operators]
        operator = self.empty(shape, setting)
        operator.parts = nn.ModuleList(stored_part(f, setting.bits) for f in balanced(frame.network, plain))
        return operator


def _left_over(side: Side, dims: Sequence[int], inverses: Sequence[Tensor]) -> Side:
    """What errors see of a moment in the frame: `T^T M T` with `T` the Kronecker product of the `L^-T` of the modes."""
    if len(dims) == 1:
        return Side(torch.ones(side.size, dtype=torch.float64, device=side.moment.device))
    moment = side.moment.double()
    if side.is_diagonal:
        scales = moment.reshape(*dims)
        for axis, inverse in enumerate(inverses):
            scales = along(inverse.square(), scales, axis)
        return Side(scales.reshape(-1))
    for _ in range(2):
        moment = moment.reshape(*dims, side.size)
        for axis, inverse in enumerate(inverses):
            moment = along(inverse.T, moment, axis)
        moment = moment.reshape(side.size, side.size).T
    return Side(moment)


def _inverse(gram: Tensor) -> Tensor:
    """The inverse of a Gram matrix, damped where it is singular, in its own precision."""
    gram = gram.double()
    eye = torch.eye(len(gram), dtype=torch.float64, device=gram.device)
    inverse: Tensor = torch.linalg.inv(gram + 1e-9 * gram.diagonal().mean().clamp_min(1e-30) * eye)
    return inverse
