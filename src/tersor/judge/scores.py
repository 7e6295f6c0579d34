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


@dataclass
class Outputs:
    """What the scores need of one model on the held-out batches, per prediction."""

    top: list[Tensor]
    nll: list[Tensor]
    value: list[Tensor]


def gather(model: Model, batches: Sequence[Batch], outputs: Sequence[Tensor]) -> Outputs:
    """The most likely class, the negative log-likelihood of the label and the raw score of every prediction."""
    found = Outputs([], [], [])
    for batch, output in zip(batches, outputs, strict=True):
        labels = model.labels(batch)
        found.top.append(output.argmax(-1) if output.dim() > 1 else output)
        found.value.append(output.reshape(len(output), -1)[:, -1])
        if labels is not None and model.divergence.name == "kl":
            labels = labels.cpu()
            known = labels != IGNORED
            logs = output.float().log_softmax(-1)
            picked = logs.gather(-1, labels.clamp_min(0)[..., None].long())[..., 0]
            found.nll.append(torch.where(known, -picked, torch.nan))
    return found


def score_all(model: Model, batches: Sequence[Batch], original: Sequence[Tensor], new: Sequence[Tensor]) -> list[Score]:
    """All scores that the model's divergence and the labels allow."""
    kind = model.divergence.name
    if kind not in ("kl", "bce"):
        return []
    units = [model.units(batch) for batch in batches]
    before, after = gather(model, batches, original), gather(model, batches, new)
    scores = []
    if kind == "kl":
        agreement = _units([(a == b).double() for a, b in zip(before.top, after.top, strict=True)], units)
        scores.append(Score("agreement of top-1", None, _mean(agreement), None))
    labels = [model.labels(batch) for batch in batches]
    if any(label is None for label in labels):
        return scores
    if kind == "bce":
        truth = torch.cat([label.cpu().reshape(-1) for label in labels if label is not None]).numpy()
        a, b = torch.cat(before.value).numpy(), torch.cat(after.value).numpy()
        return [*scores, paired("AUC", len(truth), lambda i: auc(a[i], truth[i]), lambda i: auc(b[i], truth[i]))]
    is_tokens = any(len(unit) > int(unit.max()) + 1 for unit in units)
    nll = [_units(o.nll, units) for o in (before, after)]
    if is_tokens:
        a, b = nll
        scores.append(paired("perplexity", len(a), lambda i: _perplexity(a[i]), lambda i: _perplexity(b[i])))
        return scores
    right = [
        _units([(t == y.cpu()).double() for t, y in zip(o.top, labels, strict=True) if y is not None], units)
        for o in (before, after)
    ]
    a, b = right
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
