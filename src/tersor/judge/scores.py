"""Task scores of two models on the same held-out data: agreement, perplexity, accuracy, AUC, Spearman on pairs.

Each score is a function of per-sample values, so it can be resampled; which scores exist follows from the outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor

from tersor.judge.intervals import Estimate, bootstrap
from tersor.models.compare import mean_by_unit
from tersor.models.model import Batch, Model

IGNORED = -100


@dataclass(frozen=True)
class Score:
    """A score of the original and of the new model, and new minus original, each with its interval."""

    name: str
    original: Estimate | None
    new: Estimate
    difference: Estimate | None


@dataclass(frozen=True)
class Predicted:
    """What the scores need of the outputs of a model for one batch: a value (predictions,) of each.

    The most likely class, the raw score, and, where labels are known, the negative log-likelihood of the label.
    """

    top: Tensor
    value: Tensor
    nll: Tensor | None

    @classmethod
    def of(cls, model: Model, batch: Batch, output: Tensor) -> Predicted:
        top = output.argmax(-1) if output.dim() > 1 else output
        value = output.reshape(len(output), -1)[:, -1].clone()  # not a view that keeps the rest
        labels = model.labels(batch) if model.divergence.name == "kl" else None
        if labels is None:
            return cls(top, value, None)
        labels = labels.cpu()
        logs = output.float().log_softmax(-1)
        picked = logs.gather(-1, labels.clamp_min(0)[..., None].long())[..., 0]
        return cls(top, value, torch.where(labels != IGNORED, -picked, torch.nan))


def score_all(
    model: Model, batches: Sequence[Batch], before: Sequence[Predicted], after: Sequence[Predicted]
) -> list[Score]:
    """All scores that the model's divergence and the labels allow."""
    kind = model.divergence.name
    if kind not in ("kl", "bce"):
        return []
    units = [model.units(batch) for batch in batches]
    scores = []
    if kind == "kl":
        agreement = _units([(a.top == b.top).double() for a, b in zip(before, after, strict=True)], units)
        scores.append(Score("agreement of top-1", None, _mean(agreement), None))
    labels = [model.labels(batch) for batch in batches]
    if any(label is None for label in labels):
        return scores
    if kind == "bce":
        truth = torch.cat([label.cpu().reshape(-1) for label in labels if label is not None]).numpy()
        a, b = (torch.cat([p.value for p in found]).numpy() for found in (before, after))
        return [*scores, paired("AUC", len(truth), lambda i: auc(a[i], truth[i]), lambda i: auc(b[i], truth[i]))]
    is_tokens = any(len(unit) > int(unit.max()) + 1 for unit in units)
    if is_tokens:
        a, b = (_units([p.nll for p in found if p.nll is not None], units) for found in (before, after))
        scores.append(paired("perplexity", len(a), lambda i: _perplexity(a[i]), lambda i: _perplexity(b[i])))
        return scores
    a, b = (
        _units([(p.top == y.cpu()).double() for p, y in zip(found, labels, strict=True) if y is not None], units)
        for found in (before, after)
    )
    scores.append(paired("accuracy", len(a), lambda i: float(a[i].mean()), lambda i: float(b[i].mean())))
    return scores


def paired(name: str, count: int, original: Any, new: Any) -> Score:
    """A score from two functions of the indices of samples, resampled together."""
    return Score(
        name, bootstrap(original, count), bootstrap(new, count), bootstrap(lambda i: new(i) - original(i), count)
    )


def pair_score(embed: Any, pairs: tuple[list[str], list[str], np.ndarray]) -> np.ndarray:
    """Cosines of embedded pairs of texts."""
    first, second, _ = pairs
    a, b = (torch.nn.functional.normalize(embed(texts).double(), dim=-1) for texts in (first, second))
    return (a * b).sum(-1).numpy()


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation."""
    return float(np.corrcoef(rankdata(a), rankdata(b))[0, 1])


def auc(scores: np.ndarray, truth: np.ndarray) -> float:
    """Area under the receiver operating curve; NaN where only one class is present."""
    positive = truth > 0.5
    n, m = int(positive.sum()), int((~positive).sum())
    if n == 0 or m == 0:
        return float("nan")
    return float((rankdata(scores)[positive].sum() - n * (n + 1) / 2) / (n * m))


def _units(values: Sequence[Tensor], units: Sequence[Tensor]) -> np.ndarray:
    """Means of the known values of every independent sample; a sample without any is left out."""
    parts = []
    for value, unit in zip(values, units, strict=True):
        known = ~value.isnan()
        _, of_known = np.unique(unit[known].numpy(), return_inverse=True)
        if len(of_known):
            parts.append(mean_by_unit(value[known].double(), torch.as_tensor(of_known)))
    return np.concatenate(parts)


def _mean(values: np.ndarray) -> Estimate:
    return bootstrap(lambda i: float(values[i].mean()), len(values))


def _perplexity(nll: np.ndarray) -> float:
    return float(np.exp(nll.mean()))
