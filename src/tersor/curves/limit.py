"""The limit: the least predicted divergence that any code of so many bytes could have, by reverse water-filling.

In the eigenbases of the two moments of its metric, a weight of independent Gaussians falls into independent components,
whose energies `e_ab = gain scale r_a c_b s^2` are products of two eigenvalues and the mean square of the weight. Of all
of them, all sites together, none needs to be known better than to one common level. The spectra are kept in the run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tersor.metrics import Metric, Side
from tersor.models.model import Model
from tersor.models.sites import Site
from tersor.observe import load_metrics
from tersor.plan import Choice, Interaction, fixed_bytes
from tersor.run import Run

NEGLIGIBLE = 1e-12  # of the largest eigenvalue; smaller ones are rounding
BINS_PER_OCTAVE, OCTAVES = 16, 2048  # energies from 2^-1024 to 2^1024
CHUNK = 1 << 20
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Limit:
    """The rate-distortion function of all sites of a model: `counts` components of each of `energies`, largest first.

    At the level `t` (in the unit of the divergence, as the energies), `D = sum min(e, t)` and
    `R = sum max(0, 1/2 log2(e / t))` bits. `D` is corrected by the interaction, as the sum of a plan is; a file has
    `fixed_bytes + R / 8` bytes: neither header entries of sites nor scales are counted.
    Source: reverse water-filling (Kolmogorov 1956; Cover and Thomas, Elements of Information Theory, section 10.3.3).
    """

    counts: Floats
    energies: Floats
    fixed_bytes: int
    interaction: Interaction

    @classmethod
    def of(cls, run: Run, sites: Sequence[Site], size_of: Callable[[Sequence[Choice]], int]) -> Limit | None:
        """The limit of the sites of a run, each with its gain for `int`; None where the run has no spectra.

        `size_of(choices)` is as for the planner. A site that could not be watched stays as it is in every plan, so its
        bytes are fixed; one that was not used takes none.
        """
        if not run.get("spectra"):
            return None
        unseen = run.get("unseen_sites", ())
        fixed = fixed_bytes(sites, size_of) + sum(site.nbytes for site in sites if site.name in unseen)
        found: list[tuple[Floats, Floats]] = [(np.zeros(0), np.zeros(0))]
        for site in sites:
            if run.has_tensors(_file_of(site)):
                counts, energies = _stored(run, site)
                found.append((counts, energies * run.gain(site.name, "int")))
        counts, energies = (np.concatenate(parts) for parts in zip(*found, strict=True))
        order = np.argsort(-energies, kind="stable")
        return cls(counts[order], energies[order], fixed, Interaction.of(run))

    @cached_property
    def _above(self) -> tuple[Floats, Floats]:
        """Of the first k + 1 energies: how many components, the sum of their binary logarithms."""
        return np.cumsum(self.counts), np.cumsum(self.counts * np.log2(self.energies))

    @cached_property
    def _below(self) -> Floats:
        """The energy (k,) of the components after the first k + 1 energies."""
        sums = np.cumsum((self.counts * self.energies)[::-1])[::-1]
        return np.append(sums[1:], 0.0)

    def divergence(self, stored_bytes: float) -> float:
        """The least predicted divergence of a file of so many bytes; that of no information where they are too few."""
        if not len(self.energies):
            return 0.0
        bits = max(0.0, 8 * (stored_bytes - self.fixed_bytes))
        many, logs = self._above
        bits_at = (logs - many * np.log2(self.energies)) / 2  # with the level at each of the energies
        k = max(int(np.searchsorted(bits_at, bits, side="right")) - 1, 0)
        level = math.exp2((logs[k] - 2 * bits) / many[k])
        return self.interaction.whole(float(many[k] * level + self._below[k]))

    def bytes(self, divergence: float) -> float:
        """The least bytes of a file of this predicted divergence: the inverse of `divergence`."""
        if not len(self.energies):
            return float(self.fixed_bytes)
        if divergence <= 0:
            return math.inf
        total = self.interaction.total(divergence)
        many, logs = self._above
        total_at = many * self.energies + self._below
        if total >= total_at[0]:
            return float(self.fixed_bytes)
        k = int(np.searchsorted(-total_at, -total, side="right")) - 1
        level = (total - self._below[k]) / many[k]
        return self.fixed_bytes + float(logs[k] - many[k] * math.log2(level)) / 16

    def front(self, count: int, smallest: float, largest: float) -> list[tuple[float, float]]:
        """(bytes, divergence) at `count` sizes at even ratios from `smallest` to `largest`."""
        return [(float(size), self.divergence(size)) for size in np.geomspace(smallest, largest, count)]


def times_limit(divergence: float, limit: float | None) -> float | None:
    """The distance to the limit: how many times it a divergence is; None without a limit, and where nothing is lost."""
    return divergence / limit if limit and divergence > 0 else None


def store_spectra(run: Run, model: Model, sites: Sequence[Site]) -> Iterator[str]:
    """Put the spectra of all sites that were used into the run, once; yields the name of every site when it is done."""
    if run.get("spectra"):
        return
    unused, eigenvalues = run.get("unused_sites", ()), Eigenvalues()
    for site in sites:
        if site.name not in unused and not run.has_tensors(_file_of(site)):
            metrics = load_metrics(run, site, run.get("metric"))
            counts, energies = spectrum(site.matrices(model.module).cpu(), metrics, eigenvalues)
            run.put_tensors(_file_of(site), {"counts": counts, "energies": energies})
        yield site.name
    run.put("spectra", True)


class Eigenvalues:
    """The eigenvalues of moments; the last are kept, for layers in a row often share their input."""

    def __init__(self) -> None:
        self._last: tuple[Tensor, Tensor] | None = None

    def __call__(self, side: Side) -> Tensor:
        """Those of a moment that are not negligible (n,), in float64; those of a diagonal are its entries."""
        if side.is_diagonal:
            return _not_negligible(side.moment.double())
        if self._last is None or not torch.equal(self._last[0], side.moment):
            self._last = side.moment, _not_negligible(torch.linalg.eigvalsh(side.moment.double()))
        return self._last[1]


def _not_negligible(values: Tensor) -> Tensor:
    return values[values > max(NEGLIGIBLE * float(values.max()), 0.0)]


def spectrum(
    weights: Tensor, metrics: Sequence[Metric], eigenvalues: Eigenvalues | None = None
) -> tuple[Tensor, Tensor]:
    """The energies of a stack of weights (stack, rows, columns) under their metrics, without the gain of the site.

    Returns counts (bins,) and the mean energy (bins,) of every bin of 1/16 octave that is not empty, so that the sum of
    all energies is exact. The products are made a chunk of rows at a time, those of equal rows once.
    """
    size, eigenvalues = BINS_PER_OCTAVE * OCTAVES, eigenvalues or Eigenvalues()
    counts, sums = torch.zeros(size, dtype=torch.int64), torch.zeros(size, dtype=torch.float64)
    for weight, metric in zip(weights, metrics, strict=True):
        scale = metric.scale * float(torch.linalg.vector_norm(weight, dtype=torch.float64)) ** 2 / weight.numel()
        if scale <= 0:
            continue
        columns = eigenvalues(metric.columns)
        rows, times = (scale * eigenvalues(metric.rows)).unique_consecutive(return_counts=True)
        many = max(1, CHUNK // max(1, len(columns)))
        for some, equal in zip(rows.split(many), times.double().split(many), strict=True):
            octaves = (some.log2()[:, None] + columns.log2()).flatten()
            bins = (BINS_PER_OCTAVE * (octaves + OCTAVES // 2)).long().clamp(0, size - 1)
            counts += torch.bincount(bins, equal.repeat_interleave(len(columns)), minlength=size).long()
            sums += torch.bincount(bins, ((some * equal)[:, None] * columns).flatten(), minlength=size)
    found = sums > 0
    return counts[found], sums[found] / counts[found]


def _stored(run: Run, site: Site) -> tuple[Floats, Floats]:
    stored = run.tensors(_file_of(site))
    with run.reading(_file_of(site)):
        counts, energies = (stored[name].double().numpy() for name in ("counts", "energies"))
        if counts.shape != energies.shape or counts.ndim != 1 or not (np.append(counts, energies) > 0).all():
            raise ValueError("its counts and energies do not go together")
    return counts, energies


def _file_of(site: Site) -> str:
    return f"spectra/{site.name}"
