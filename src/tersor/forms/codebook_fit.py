"""Fitting codebooks: entries by k-means under the metric, codes with two-sided feedback, then each given the other.

All of it works on a weight divided by its scales, in vectors of a few columns. With the unit lower factors of both
moments the distance is a sum over vectors, each of which sees its own error through one small triangular matrix and the
errors of the vectors after it as a shift of its target (P147, vector by vector).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from tersor.forms import e8
from tersor.forms.conjugate import conjugate_gradients
from tersor.forms.rounding import FREE_ROWS, TILE, spans
from tersor.metrics import Metric

SAMPLE, LLOYD = 1 << 15, 12  # vectors and rounds of k-means
STEPS = 4  # of conjugate gradients
PAIRED = 1024  # entries whose inner products are held at once, for every vector of a tile
# The best step of E8 for a unit Gaussian, by the bits of a stage, and what such a stage leaves (root mean square).
UNIT_STEPS = {8: 1.65, 12: 1.35, 14: 1.2, 16: 1.0}
LEAVES = {8: 0.564, 12: 0.435, 14: 0.374, 16: 0.303}
STRETCH = (1.0, 0.9, 1.12)  # of steps that are tried


@dataclass(frozen=True)
class Book:
    """Entries (all, dims) of all stages with their `projection` (dims, length), or the `steps` of stages of E8."""

    entries: Tensor
    projection: Tensor | None = None
    steps: Tensor | None = None

    @property
    def whole(self) -> Tensor:
        """Entries (all, length)."""
        return self.entries if self.projection is None else self.entries @ self.projection


@dataclass(frozen=True)
class Scaled:
    """A weight (rows, columns) filled up to whole vectors, its scales, and the factors of its metric."""

    weight: Tensor
    rows: Tensor
    columns: Tensor
    metric: Metric
    lower_rows: Tensor | None
    lower_columns: Tensor
    row_pivots: Tensor
    column_pivots: Tensor
    length: int

    @classmethod
    def of(cls, weight: Tensor, metric: Metric, rows: Tensor, columns: Tensor, length: int) -> Scaled:
        (lower_rows, row_pivots), (lower_columns, column_pivots) = metric.rows.unit_lower, metric.columns.unit_lower
        more = -weight.shape[1] % length
        size = weight.shape[1] + more
        lower = torch.eye(size)
        if lower_columns is not None:
            lower[: weight.shape[1], : weight.shape[1]] = lower_columns.float().cpu()
        return cls(
            functional.pad(weight, (0, more)),
            rows,
            functional.pad(columns, (0, more), value=float(columns.mean())),
            metric,
            None if lower_rows is None else lower_rows.float().cpu(),
            lower,
            (row_pivots / row_pivots.mean().clamp_min(1e-300)).float().cpu(),
            functional.pad(
                (column_pivots / column_pivots.mean().clamp_min(1e-300)).float().cpu(), (0, more), value=1e-12
            ),
            length,
        )

    @property
    def vectors(self) -> int:
        return self.weight.shape[1] // self.length

    @cached_property
    def eigen(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of `seen_as T`: the eigenvalues (vectors, length) of `T T^T`, `T^T V` and its eigenvectors `V`."""
        values, basis = torch.linalg.eigh((self.seen_as @ self.seen_as.mT).double())
        onto = self.seen_as.mT.double() @ basis
        return values.clamp_min(1e-30).float(), onto.float(), basis.float()

    @cached_property
    def seen_as(self) -> Tensor:
        """(vectors, length, length): how the metric sees a vector of a row, in units of its scales."""
        blocks = self.lower_columns.view(self.vectors, self.length, self.vectors, self.length)
        inner = torch.diagonal(blocks, dim1=0, dim2=2).permute(2, 0, 1)
        roots = self.column_pivots.clamp_min(0).sqrt().view(self.vectors, 1, self.length)
        return (self.columns.view(self.vectors, self.length, 1) * inner * roots).contiguous()

    @cached_property
    def importance(self) -> Tensor:
        """How much each entry of the weight over its scales matters (rows, columns)."""
        felt = torch.outer(self.row_pivots * self.rows.square(), self.column_pivots * self.columns.square())
        return felt / felt.mean().clamp_min(1e-30)

    def values(self, codes: Tensor, whole: Tensor, offsets: Tensor) -> Tensor:
        """The weight that `codes` (rows, vectors, stages) of `whole` (all, length) entries mean."""
        found = sum(functional.embedding(codes[..., s] + offsets[s], whole) for s in range(codes.shape[-1]))
        assert isinstance(found, Tensor)
        return found.flatten(1) * self.columns * self.rows[:, None]

    def felt(self, error: Tensor) -> Tensor:
        """`R E C` for an error of the filled-up shape."""
        real = error[:, : self.metric.columns.size]
        felt = self.metric.rows.apply(self.metric.columns.felt(real))
        return functional.pad(felt, (0, error.shape[1] - real.shape[1]))


def learned_codes(
    scaled: Scaled, bits: tuple[int, ...], dims: int | None, rounds: int
) -> Iterator[tuple[Tensor, Book]]:
    """Codes (rows, vectors, stages) with their entries, iterate after iterate, the better the later as a rule.

    Codes that are chosen anew for refitted entries do worse than those did until entries are refitted to them as well.
    """
    book = _learn(scaled, bits, dims)
    offsets = torch.tensor([0, *np.cumsum([2**b for b in bits])])
    codes = choose(scaled, book, offsets)
    yield codes, book
    for again in range(rounds and rounds + 1):
        codes = choose(scaled, book, offsets) if again else codes
        book = refitted(scaled, codes, book, offsets)
        yield codes, book


def lattice_codes(scaled: Scaled, bits: tuple[int, ...]) -> Iterator[tuple[Tensor, Book]]:
    """Codes (rows, vectors, stages) of points of E8, with one set of steps after the other."""
    steps, left = [], 1.0
    for b in bits:
        steps.append(left * UNIT_STEPS[b])
        left *= LEAVES[b]
    near = torch.from_numpy(e8.roots())
    radii = torch.tensor([e8.RADII[b] for b in bits])
    for stretch in STRETCH:
        book = Book(near, steps=stretch * torch.tensor(steps))
        doubled = choose(scaled, book, radii).view(*scaled.rows.shape, scaled.vectors, len(bits), e8.DIMENSIONS)
        numbers = []
        for stage, b in enumerate(bits):
            keys, order = e8.keys(b)
            numbers.append(order[np.searchsorted(keys, e8.key_of(doubled[..., stage, :].numpy()))])
        yield torch.from_numpy(np.stack(numbers, -1)), book


def choose(scaled: Scaled, book: Book, offsets: Tensor) -> Tensor:
    """Codes (rows, vectors, stages), or the doubled points themselves, chosen with feedback tile by tile.

    Tiles go up the rows, then to the columns before, so that what depends on columns alone is made once.
    """
    from tersor.forms.codebook_kernels import settle

    m, weight, lower_o, lower_i = scaled.length, scaled.weight, scaled.lower_rows, scaled.lower_columns
    is_lattice = book.steps is not None
    entries = book.entries.float() if is_lattice else book.whole.float()
    stages = len(offsets) * m if is_lattice else len(offsets) - 1
    is_paired = not is_lattice and stages > 1 and len(entries) <= PAIRED
    codes = torch.zeros(len(weight), scaled.vectors, stages, dtype=torch.int64)
    steps = book.steps.float() if book.steps is not None else torch.zeros(0)
    roots, alone = scaled.column_pivots.clamp_min(0).sqrt(), torch.zeros(0, 0)
    error, spread = torch.zeros_like(weight), torch.zeros_like(weight)
    for i in spans(weight.shape[1], max(1, TILE // m) * m):
        inner_i, of = lower_i[i, i].contiguous(), slice(i.start // m, i.stop // m)
        later = error[:, i.stop :] @ lower_i[i.stop :, i]
        metric = (scaled.seen_as[of], *(t[of] for t in scaled.eigen))
        seen = ((0.5 if is_lattice else 1.0) * entries @ scaled.seen_as[of]).transpose(1, 2)  # (vectors, m, all)
        products = seen.mT @ seen if is_paired else torch.zeros(0, 0, 0)
        looked_up = (entries.T, seen, seen.square().sum(1) / 2, products, offsets, steps)
        for o in spans(len(weight), FREE_ROWS if lower_o is None else TILE):
            external, inner_o = later[o], alone
            if lower_o is not None:
                inner_o = lower_o[o, o]
                external = inner_o.T @ external + lower_o[o.stop :, o].T @ spread[o.stop :, i]
            parts = (external, weight[o, i], scaled.rows[o], scaled.columns[i], *metric, inner_o, inner_i, roots[i])
            made = codes[o, of].contiguous(), error[o, i].contiguous()
            settle(*(t.contiguous().numpy() for t in (*parts, *looked_up, *made)))
            codes[o, of], error[o, i] = made
            if lower_o is not None:
                spread[o, i] = later[o] + error[o, i] @ inner_i
    return codes


def refitted(scaled: Scaled, codes: Tensor, book: Book, offsets: Tensor) -> Book:
    """The entries that are best for these codes: least squares under the metric, by conjugate gradients."""
    places = [(codes[..., stage] + offsets[stage]).flatten() for stage in range(codes.shape[-1])]

    def expand(entries: Tensor) -> Tensor:
        return scaled.values(codes, replace(book, entries=entries).whole, offsets)

    def gather(felt: Tensor, projection: Tensor | None) -> Tensor:
        """The sums (all, dims) of what is felt over the vectors that are one entry: the transpose of `expand`."""
        vectors = felt.view(-1, scaled.length)
        if projection is not None:
            vectors = vectors @ projection.T
        found = torch.zeros_like(book.entries)
        for at in places:
            found.index_add_(0, at, vectors)
        return found

    def back(felt: Tensor) -> Tensor:
        return gather(felt * scaled.columns * scaled.rows[:, None], book.projection)

    diagonal = gather(scaled.importance, None if book.projection is None else book.projection.square())
    curvature = diagonal.clamp_min(1e-6 * float(diagonal.mean()))
    residual = back(scaled.felt(scaled.weight - expand(book.entries)))
    entries = conjugate_gradients(book.entries, residual, lambda e: back(scaled.felt(expand(e))), STEPS, curvature)
    return replace(book, entries=entries)


def _learn(scaled: Scaled, bits: tuple[int, ...], dims: int | None) -> Book:
    """Entries by weighted k-means, each stage on what those before leave, in the space of a projection if asked."""
    vectors, importance = _sampled(scaled)
    projection = None
    if dims is not None:
        projection = _principal(vectors, importance, dims)
        vectors = vectors @ projection.T
        importance = importance.mean(1, keepdim=True).expand(-1, dims)
    found = []
    for stage, b in enumerate(bits):
        centres = _k_means(vectors, importance, 2**b, seed=stage)
        found.append(centres)
        vectors = vectors - centres[_nearest(vectors, importance, centres)]
    return Book(torch.cat(found), projection)


def _sampled(scaled: Scaled) -> tuple[Tensor, Tensor]:
    """Some vectors (n, length) of the weight over its scales, and how much each of their entries matters."""
    even = scaled.weight / scaled.columns / scaled.rows[:, None]
    vectors, importance = (t.view(-1, scaled.length) for t in (even, scaled.importance))
    if len(vectors) > SAMPLE:
        chosen = torch.randperm(len(vectors), generator=torch.Generator().manual_seed(0))[:SAMPLE]
        vectors, importance = vectors[chosen], importance[chosen]
    return vectors, importance.clamp_min(1e-6)


def _principal(vectors: Tensor, importance: Tensor, dims: int) -> Tensor:
    """The first `dims` principal directions (dims, length) of weighted vectors."""
    weights = importance.mean(1, keepdim=True).double()
    moment = (vectors.double() * weights).T @ vectors.double()
    found: Tensor = torch.linalg.eigh(moment).eigenvectors[:, -dims:].T.float()
    return found


def _k_means(vectors: Tensor, importance: Tensor, count: int, seed: int) -> Tensor:
    """Centres (count, m) of least weighted squared distance, by Lloyd's iteration; empty ones move to far vectors."""
    chosen = torch.randperm(len(vectors), generator=torch.Generator().manual_seed(seed))[:count]
    centres = functional.pad(vectors[chosen], (0, 0, 0, count - len(chosen)))
    for _ in range(LLOYD):
        nearest = _nearest(vectors, importance, centres)
        mass = torch.zeros_like(centres).index_add_(0, nearest, importance)
        total = torch.zeros_like(centres).index_add_(0, nearest, importance * vectors)
        centres = torch.where(mass > 0, total / mass.clamp_min(1e-30), centres)
        empty = (mass.sum(1) == 0).nonzero().flatten()
        if len(empty):
            far = (importance * (vectors - centres[nearest]).square()).sum(1).argsort(descending=True, stable=True)
            empty = empty[: len(far)]
            centres[empty] = vectors[far[: len(empty)]]
    return centres


def _nearest(vectors: Tensor, importance: Tensor, centres: Tensor) -> Tensor:
    """The number (n,) of the centre nearest to every vector, its entries weighted."""
    from tersor.forms.codebook_kernels import nearest

    parts = (t.float().contiguous().numpy() for t in (vectors, importance, centres.T))
    return torch.from_numpy(nearest(*parts))
