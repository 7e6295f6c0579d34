"""A summary: what one pass over the calibration data leaves of one matrix of a site.

Second moments of what goes into the weight and of the gradient of what comes out of it, with their counts; for a table
the first is the frequency of every row. Sums are kept, so summaries add; the data itself is never kept.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from tersor.metrics import Metric, Side

MOST_UNSEEN = 0.5  # of look-ups: where nearly all rows came up once, too little was seen to tell


@dataclass
class Summary:
    """Sums over `positions` for inputs `x` (in) and output gradients `g` (out) of the summed log-probabilities.

    `inputs` is the sum of `x x^T` (in, in), or its diagonal (in,) where `in` is large; `weighted_inputs` that of
    `|g|^2 x x^T` and `weighted_gradients` that of `|x|^2 g g^T`: one power iteration from the identity towards the
    nearest Kronecker product to the Fisher matrix (P308); `mass` is the sum of `|x|^2 |g|^2`. The last three estimate
    how much of the Fisher matrix the product captures.
    """

    inputs: Tensor
    weighted_inputs: Tensor
    weighted_gradients: Tensor
    input_sum: Tensor
    positions: float = 0.0
    predictions: float = 0.0
    mass: float = 0.0
    overlap: float = 0.0
    pair_energy: float = 0.0
    pairs: float = 0.0

    @classmethod
    def zeros(
        cls,
        inputs: int,
        outputs: int,
        largest: int,
        diagonal_inputs: bool = False,
        device: torch.device | None = None,
        *,
        gradients: bool = True,
    ) -> Summary:
        """An empty summary; a side longer than `largest` keeps its diagonal alone (in float64; whole in float32).

        Without `gradients` the moments that they weigh stay empty, so they are diagonals.
        """

        def moment(size: int, diagonal: bool) -> Tensor:
            if diagonal:
                return torch.zeros(size, dtype=torch.float64, device=device)
            return torch.zeros(size, size, device=device)

        a = diagonal_inputs or inputs > largest
        total = torch.zeros(inputs, dtype=torch.float64, device=device)
        weighted = moment(inputs, a or not gradients), moment(outputs, outputs > largest or not gradients)
        return cls(moment(inputs, a), *weighted, total)

    def __add__(self, other: Summary) -> Summary:
        return Summary(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def tensors(self) -> dict[str, Tensor]:
        """All fields as tensors to be stored; the moments in float32."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {
            k: v.float().cpu() if isinstance(v, Tensor) else torch.tensor(v, dtype=torch.float64)
            for k, v in values.items()
        }

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> Summary:
        values: dict[str, Any] = {
            f.name: tensors[f.name] if f.type == "Tensor" else float(tensors[f.name]) for f in fields(cls)
        }
        return cls(**values)

    def with_unseen_rows(self) -> Summary:
        """The summary of a table in use, where rows come up that the calibration data never looked up.

        Together as often as those that it looked up once (Good and Turing's estimate, of half of all look-ups at most),
        and each time with the gradients that these had; all others come up less by that much.
        """
        once, never = self.inputs == 1, self.inputs == 0
        if not once.any() or not never.any():
            return self
        share = min(float(once.sum()) / self.positions, MOST_UNSEEN)

        def spread(sums: Tensor) -> Tensor:
            found = (1 - share) * sums
            found[never] = share * self.positions * sums[once].mean() / never.sum()
            return found

        return replace(self, inputs=spread(self.inputs), weighted_inputs=spread(self.weighted_inputs))

    @property
    def has_gradients(self) -> bool:
        return self.mass > 0

    @property
    def captured_share(self) -> float:
        """Cosine between the Fisher matrix and its Kronecker product, from pairs of positions; NaN if unseen."""
        if self.pair_energy <= 0:
            return float("nan")
        return min(1.0, self.overlap / self.pairs / math.sqrt(self.pair_energy / self.pairs))

    def metric(self, kind: str, *, rows_are_inputs: bool = False) -> Metric:
        """The undamped metric of the matrix, in nats per prediction where gradients were observed.

        `input` and `input-diagonal` take the inputs as they are, the other kinds weighted by the gradients they met.
        """
        positions = max(self.positions, 1.0)
        scale = 0.5 * positions / max(self.predictions, 1.0)
        if self.has_gradients and kind not in ("input", "input-diagonal"):
            inputs, gradients = self.weighted_inputs / self.mass, self.weighted_gradients / positions
        elif self.has_gradients:
            inputs, gradients = self.inputs / positions, self.weighted_gradients / self._input_energy()
        else:
            inputs, gradients = self.inputs / positions, torch.ones(self.weighted_gradients.shape[0])
        sides = Side(gradients.float()), Side(inputs.float())
        rows, columns = sides[::-1] if rows_are_inputs else sides
        return Metric("kronecker", rows, columns, scale).coarsened(kind, input_is_columns=not rows_are_inputs)

    @property
    def output_metric(self) -> tuple[Side, float]:
        """`(G, scale)` so that an error `d` (out,) of every output is predicted to cost `scale * E[d^T G d]`, in nats.

        `G` is the moment of the gradients weighted by the inputs they met, over the mean square of these.
        """
        scale = 0.5 * max(self.positions, 1.0) / max(self.predictions, 1.0)
        if not self.has_gradients:
            return Side(torch.ones(self.weighted_gradients.shape[0])), scale
        return Side((self.weighted_gradients / self._input_energy()).float()), scale

    def _input_energy(self) -> float:
        """The sum of `|x|^2` over positions."""
        trace = self.inputs.diagonal().sum() if self.inputs.dim() == 2 else self.inputs.sum()
        return max(float(trace), 1e-300)


def nearest_kronecker(metrics: list[Metric]) -> Metric:
    """The Kronecker product nearest to a sum of several: the metric of a weight that is used in several ways.

    All of them lie in the span of their factors, so the best one is the leading singular pair of a small matrix.
    """
    if len(metrics) == 1:
        return metrics[0]
    rows, columns = ([getattr(m, side).moment for m in metrics] for side in ("rows", "columns"))
    rows, columns = (_alike(moments) for moments in (rows, columns))
    scales = torch.tensor([m.scale for m in metrics], dtype=torch.float64)
    gram_r, gram_c = _gram(rows), _gram(columns)
    root_r, root_c = (Side(g).damped(1e-9).cholesky for g in (gram_r, gram_c))
    u, s, v = torch.linalg.svd(root_r.T @ torch.diag(scales) @ root_c)
    weights_r = torch.linalg.solve_triangular(root_r.T, u[:, :1], upper=True).flatten()
    weights_c = torch.linalg.solve_triangular(root_c.T, v[:1].T, upper=True).flatten()
    sign = torch.sign(weights_r.sum())
    row = sum(float(w * sign) * r for w, r in zip(weights_r, rows, strict=True))
    column = sum(float(w * sign) * c for w, c in zip(weights_c, columns, strict=True))
    assert isinstance(row, Tensor) and isinstance(column, Tensor)
    return Metric("kronecker", Side(row), Side(column), float(s[0]))


def _alike(moments: list[Tensor]) -> list[Tensor]:
    if len({m.dim() for m in moments}) == 1:
        return moments
    if moments[0].shape[0] > 8192:
        return [m if m.dim() == 1 else m.diagonal() for m in moments]
    return [torch.diag(m) if m.dim() == 1 else m for m in moments]


def _gram(moments: list[Tensor]) -> Tensor:
    return torch.tensor([[float((a * b).sum(dtype=torch.float64)) for b in moments] for a in moments]).double()
