"""A metric is a norm on the error of one weight, in nats of the model's divergence.

The Hessian of the divergence at zero error is approximated by a Kronecker product of a moment of the rows of the
weight and a moment of its columns, `d(E) = scale * tr(R E C E^T)`. The kinds keep more or less of the two moments:
`identity` their mean, `diagonal` their diagonals, `input` / `output` one of them whole, `kronecker` both. Of the inputs
alone, `input-diagonal` keeps the diagonal of what `input` keeps, `fisher-input` the half of `diagonal` that is theirs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from scipy.linalg import lapack
from torch import Tensor

from tersor.errors import TersorError

BLOCK = 192  # rows of a moment that are taken at a time where half of its entries will do
STRIP = 1 << 24  # entries of an error that are weighed at a time
MOST_ENLARGED = 1.25  # times, to undo that a fitted matrix is shrunk; of that, its rows by themselves at most the root
SAMPLED_ROWS = 8192  # rows that stand for all of a table where curves are drawn
EQUAL_ROWS = 2048  # and for all of a weight whose rows all matter as much, where a fit takes each by itself
KINDS = ("identity", "diagonal", "input", "output", "kronecker", "input-diagonal", "fisher-input")


@dataclass(frozen=True)
class Side:
    """One factor of a metric: a positive definite moment (n, n), or its diagonal (n,)."""

    moment: Tensor

    @property
    def size(self) -> int:
        return int(self.moment.shape[0])

    @property
    def is_diagonal(self) -> bool:
        return self.moment.dim() == 1

    @cached_property
    def diagonal(self) -> Tensor:
        """The diagonal of the moment (n,)."""
        return self.moment if self.is_diagonal else self.moment.diagonal()

    def mean(self) -> Side:
        """The same side with every entry of the diagonal at its mean, nothing beside it."""
        return Side(self.diagonal.mean().expand(self.size).clone())

    def damped(self, amount: float) -> Side:
        """The same side with `amount` times the mean of its diagonal added to the diagonal."""
        extra = amount * self.diagonal.mean().clamp_min(1e-30)
        if self.is_diagonal:
            return Side(self.moment + extra)
        return Side(jittered(self.moment, extra))

    @cached_property
    def cholesky(self) -> Tensor:
        """Lower `L` (n, n) with `L L^T` the moment, in float64, or its diagonal (n,)."""
        if self.is_diagonal:
            return self.moment.double().clamp_min(1e-300).sqrt()
        moment = self.moment.double()
        least = float(1e-12 * moment.diagonal().mean().clamp_min(1e-30))
        jitter = 0.0
        for _ in range(12):
            factor: Tensor
            factor, failed = torch.linalg.cholesky_ex(moment if not jitter else jittered(moment, jitter))
            if not failed:
                return factor
            jitter = max(10 * jitter, least)
        raise TersorError("A second moment is not positive semi-definite; its summary is damaged: study again.")

    @cached_property
    def unit_lower(self) -> tuple[Tensor | None, Tensor]:
        """`(L, d)` with the moment `L diag(d) L^T`, `L` unit lower triangular, None where it is the identity."""
        if self.is_diagonal:
            return None, self.moment.double()
        pivot = self.cholesky.diagonal()
        return self.cholesky / pivot, pivot.square()

    @cached_property
    def pivoted_order(self) -> Tensor:
        """The order (n,) of a pivoted factorisation: each index has the largest variance given those before it."""
        if self.is_diagonal:
            return torch.arange(self.size)
        _, pivots, _, _ = lapack.dpstrf(self.moment.double().cpu().numpy(), lower=1)
        return torch.from_numpy(pivots.astype("int64") - 1)

    def permuted(self, order: Tensor) -> Side:
        """The side of a matrix whose indices stand in this order."""
        order = order.to(self.moment.device)
        return Side(self.moment[order] if self.is_diagonal else self.moment[order][:, order])

    def apply(self, matrix: Tensor) -> Tensor:
        """The moment times `matrix` (n, m)."""
        moment = self.moment.to(matrix.dtype)
        return moment[:, None] * matrix if self.is_diagonal else moment @ matrix

    def felt(self, matrix: Tensor) -> Tensor:
        """`matrix` (m, n) times the moment."""
        moment = self.moment.to(matrix.dtype)
        return matrix * moment if self.is_diagonal else matrix @ moment

    def halved(self, matrix: Tensor) -> Tensor:
        """`T matrix` for `matrix` (n, m) and a `T` with `x^T T x` as with the moment: for little more than half of it.

        `T` has the blocks on the diagonal of the moment, those right of it twice, and none left of it.
        """
        if self.is_diagonal:
            return self.apply(matrix)
        moment, out = self.moment.to(matrix.dtype), torch.empty_like(matrix)
        for start in range(0, self.size, BLOCK):
            block, later = slice(start, start + BLOCK), slice(start + BLOCK, None)
            torch.mm(moment[block, block], matrix[block], out=out[block])
            out[block].addmm_(moment[block, later], matrix[later], alpha=2)
        return out

    def whiten(self, matrix: Tensor) -> Tensor:
        """`L^T matrix` for `matrix` (n, m), in float64."""
        matrix = matrix.double()
        return self.cholesky[:, None] * matrix if self.is_diagonal else self.cholesky.T @ matrix

    def unwhiten(self, matrix: Tensor) -> Tensor:
        """`L^-T matrix` for `matrix` (n, m), in float64."""
        matrix = matrix.double()
        if self.is_diagonal:
            return matrix / self.cholesky[:, None]
        solved: Tensor = torch.linalg.solve_triangular(self.cholesky.T, matrix, upper=True)
        return solved

    def compress(self, basis: Tensor) -> Side:
        """The side that errors in the coefficients of `basis` (n, k) see: `basis^T moment basis` (k, k)."""
        basis = basis.double()
        return Side(basis.T @ Side(self.moment.double()).apply(basis))


def jittered(moment: Tensor, amount: float | Tensor) -> Tensor:
    """A moment (n, n) with the same amount added to every entry of its diagonal."""
    out = moment.clone()
    out.diagonal().add_(amount)
    return out


@dataclass(frozen=True)
class Kept:
    """How much of a weight `W` is left in a fitted matrix `F`: `<W, F> / <W, W>` in the inner product of a metric.

    `of_rows` (rows,) says it of every row under the moment of the columns alone; `parts` (rows,) are what the rows
    bring to that of the whole. Rounding shrinks: the nearest code leans towards zero. What all weights of a network
    lose in their own direction adds up along it, faster than what they lose at random; so a fitted matrix is enlarged
    until its error is orthogonal to the weight, though that error is no longer the least.
    """

    of_rows: Tensor
    parts: Tensor

    @property
    def row_factors(self) -> Tensor:
        """What every row should be multiplied by (rows,)."""
        return _undone(self.of_rows, math.sqrt(MOST_ENLARGED))

    def factor(self, rows: Tensor | float = 1.0) -> float:
        """What the whole should be multiplied by, where rows have been multiplied by `rows`."""
        return float(_undone((self.parts * rows).sum(), MOST_ENLARGED))


def _undone(kept: Tensor, most: float) -> Tensor:
    return (1 / kept.clamp_min(1e-300)).clamp(1 / most, most)


@dataclass(frozen=True)
class Metric:
    """`d(E) = scale * tr(R E C E^T)` for an error `E` (rows, columns), in nats where both moments were observed.

    `scale` is half the positions per prediction: the second-order term of the divergence of one prediction. A damped
    metric steers a fit; `judged_by` keeps the one it was made from, under which distances are reported.
    """

    kind: str
    rows: Side
    columns: Side
    scale: float = 1.0
    judged_by: Metric | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows.size, self.columns.size

    @property
    def strip(self) -> int:
        """Rows that are weighed at a time: all of them where they feel one another."""
        return max(1, STRIP // max(1, self.columns.size)) if self.rows.is_diagonal else max(1, self.rows.size)

    def distance(self, error: Tensor) -> float:
        """The predicted divergence of a weight error (rows, columns), in nats."""
        if self.judged_by is not None:
            return self.judged_by.distance(error)
        error = error.float()
        if self.rows.is_diagonal:
            parts = [(self.columns.halved(e.T) * e.T).sum(0, dtype=torch.float64) for e in error.split(self.strip)]
            return self.scale * float(self.rows.moment.double() @ torch.cat(parts))
        if self.rows.size < self.columns.size:  # the larger moment is halved: only one of them may be
            both = self.rows.apply(error).T * self.columns.halved(error.T)
        else:
            both = self.rows.halved(error) * self.columns.felt(error)
        return self.scale * float(both.sum(dtype=torch.float64))

    def felt_by(self, weight: Tensor) -> Felt:
        """What the metric, or that which judges for it, feels of a weight (rows, columns), float32."""
        return Felt(self.judged_by or self, weight)

    def kept(self, weight: Tensor, fitted: Tensor) -> Kept:
        """How much of a weight (rows, columns) is left in a matrix that was fitted to it, both float32."""
        return self.felt_by(weight).kept(fitted)

    def whiten(self, weight: Tensor) -> Tensor:
        """`L_r^T W L_c`, whose squared Frobenius norm times `scale` is `distance(W)`; float64."""
        return self.columns.whiten(self.rows.whiten(weight).T).T

    def unwhiten(self, whitened: Tensor) -> Tensor:
        """The inverse of `whiten`; float64."""
        return self.columns.unwhiten(self.rows.unwhiten(whitened).T).T

    def of_rows(self, index: Tensor, counts: Tensor) -> Metric:
        """The metric of some rows of the weight, where rows do not feel one another.

        A distance takes each for as many rows as its count says; fits do not see the counts.
        """
        index = index.to(self.rows.moment.device)
        judge = self.judged_by or self
        judged = judge.rows.moment[index] * counts.to(judge.rows.moment)
        return replace(self, rows=Side(self.rows.moment[index]), judged_by=replace(judge, rows=Side(judged)))

    def sampled_rows(self, *, evenly: bool = False, apart: bool = False) -> tuple[Tensor, Tensor] | None:
        """Rows (k,) that stand for all of a tall weight whose rows do not feel one another, and for how many each (k,).

        Those with the largest moments stand for themselves, a random part of the others for all of these; `evenly`, a
        random part of all, as where all have the same. Fewer of these will do for a fit that takes every row `apart`.
        None where rows feel one another or are few. For `of_rows`.
        """
        size, many = self.rows.size, SAMPLED_ROWS
        if not self.rows.is_diagonal:
            return None
        if bool((self.rows.moment == self.rows.moment[0]).all()):
            evenly, many = True, min(many, EQUAL_ROWS) if apart else many
        if size < 2 * many:
            return None
        order = self.rows.moment.argsort(descending=True, stable=True).cpu()
        certain, others = order.tensor_split([0 if evenly else many // 4])
        random = torch.randperm(len(others), generator=torch.Generator().manual_seed(0))
        drawn = others[random[: many - len(certain)]]
        counts = torch.ones(size)
        counts[drawn] = len(others) / len(drawn)
        index = torch.cat([certain, drawn]).sort().values
        return index, counts[index]

    def damped(self, rows: float, columns: float) -> Metric:
        """The metric with its two moments damped by these shares of their mean diagonals."""
        judge = self if self.judged_by is None else self.judged_by
        return Metric(self.kind, self.rows.damped(rows), self.columns.damped(columns), self.scale, judge)

    def coarsened(self, kind: str, *, input_is_columns: bool = True) -> Metric:
        """The metric of another `kind` made from the same moments; the input is the columns but for a table."""
        if kind == "kronecker":
            return Metric(kind, self.rows, self.columns, self.scale)
        if kind == "identity":
            return Metric(kind, self.rows.mean(), self.columns.mean(), self.scale)
        if kind == "diagonal":
            return Metric(kind, Side(self.rows.diagonal), Side(self.columns.diagonal), self.scale)
        keep_columns = (kind != "output") == input_is_columns
        rows = self.rows.mean() if keep_columns else self.rows
        columns = self.columns if keep_columns else self.columns.mean()
        if kind in ("input-diagonal", "fisher-input"):
            rows, columns = Side(rows.diagonal), Side(columns.diagonal)
        return Metric(kind, rows, columns, self.scale)


@dataclass(frozen=True)
class Felt:
    """A weight under a metric, for many fits to it: products with whole moments are taken once."""

    metric: Metric
    weight: Tensor

    def kept(self, fitted: Tensor) -> Kept:
        """How much of the weight is left in a matrix (rows, columns) that was fitted to it, float32."""
        metric, weight = self.metric, self.weight
        if metric.rows.is_diagonal:
            parts = zip(weight.split(metric.strip), fitted.split(metric.strip), strict=True)
            rows = torch.cat([_row_sums(metric.columns.felt(w), w, f) for w, f in parts], 1)
            whole = rows * metric.rows.moment.double().cpu()
        else:
            rows, whole = (_row_sums(felt, weight, fitted) for felt in self._products)
        if not whole[0].sum() > 0:
            return Kept(torch.ones(len(weight)).double(), torch.full((len(weight),), 1 / len(weight)).double())
        return Kept(torch.where(rows[0] > 0, rows[1] / rows[0], 1.0), whole[1] / whole[0].sum())

    @cached_property
    def _products(self) -> tuple[Tensor, Tensor]:
        """The weight times the moment of the columns, and the moment of the rows times that."""
        felt = self.metric.columns.felt(self.weight)
        return felt, self.metric.rows.apply(felt)


def _row_sums(felt: Tensor, *matrices: Tensor) -> Tensor:
    """The inner products of rows (count, rows) of some matrices with those of `felt`, float64."""
    return torch.stack([(felt * m).sum(1, dtype=torch.float64) for m in matrices]).cpu()
