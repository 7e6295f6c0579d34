"""Scores and intervals against brute force."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tersor.judge.intervals import bootstrap, mean_estimate
from tersor.judge.scores import Predicted, auc, score_all, spearman
from tersor.models import DIVERGENCES
from tersor.models.compare import mean_by_unit


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=2, max_size=25))
def test_auc_is_the_share_of_ordered_pairs(rows: list[tuple[int, bool]]) -> None:
    scores, truth = (np.array(column, dtype=float) for column in zip(*rows, strict=True))
    pairs = [(s > t) + 0.5 * (s == t) for s in scores[truth > 0.5] for t in scores[truth < 0.5]]
    found = auc(scores, truth)
    assert math.isnan(found) if not pairs else found == pytest.approx(np.mean(pairs))


def test_spearman_is_the_correlation_of_ranks_with_ties_shared() -> None:
    a, b = np.array([1.0, 5.0, 5.0, 9.0, 2.0]), np.array([3.0, 1.0, 4.0, 4.0, 4.0])
    ranks = [np.array([np.mean([sum(y < x for y in v) + 1, sum(y <= x for y in v)]) for x in v]) for v in (a, b)]
    assert spearman(a, b) == pytest.approx(np.corrcoef(*ranks)[0, 1])
    assert spearman(a, np.exp(a)) == pytest.approx(1.0)
    assert spearman(a, -a) == pytest.approx(-1.0)


def test_the_bootstrap_is_that_of_all_resamples() -> None:
    values = np.array([0.0, 1.0, 4.0, 9.0])
    every = [np.mean(values[list(index)]) for index in itertools.product(range(4), repeat=4)]
    found = bootstrap(lambda index: float(values[index].mean()), 4, resamples=20000)
    assert found.value == values.mean()
    assert found.low == pytest.approx(np.percentile(every, 2.5), abs=0.26)
    assert found.high == pytest.approx(np.percentile(every, 97.5), abs=0.26)
    assert mean_estimate(values) == mean_estimate(values)


def test_an_interval_covers_the_truth_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    covered = 0
    for seed in range(200):
        found = mean_estimate(generator.normal(3.0, 2.0, 60), seed)
        covered += found.low <= 3.0 <= found.high
    assert 0.9 < covered / 200 < 0.985


def test_means_by_unit() -> None:
    values, units = torch.tensor([1.0, 3.0, 10.0, 5.0]).double(), torch.tensor([0, 0, 2, 1])
    assert mean_by_unit(values, units).tolist() == [2.0, 5.0, 10.0]


@dataclass
class Fake:
    """A model for scores: its divergence, and labels and units as its batches carry them."""

    kind: str

    def __post_init__(self) -> None:
        self.divergence = DIVERGENCES[self.kind]

    def labels(self, batch: Any) -> Tensor | None:
        return batch[0]

    def units(self, batch: Any) -> Tensor:
        return batch[1]


def scores_of(kind: str, labels: Tensor | None, units: Tensor, before: Tensor, after: Tensor) -> dict[str, Any]:
    model: Any = Fake(kind)
    seen = [[Predicted.of(model, (labels, units), outputs)] for outputs in (before, after)]
    return {s.name: s for s in score_all(model, [(labels, units)], *seen)}


def test_perplexity_leaves_out_what_has_no_label() -> None:
    logits = torch.randn(8, 5)
    labels, units = torch.tensor([1, 4, -100, 0, -100, -100, 2, 3]), torch.tensor([0, 0, 0, 1, 2, 2, 3, 3])
    found = scores_of("kl", labels, units, logits, logits * 0.5)["perplexity"]
    for part, sharpness in ((found.original, 1.0), (found.new, 0.5)):
        nll = -(logits * sharpness).double().log_softmax(-1)
        means = [(nll[0, 1] + nll[1, 4]) / 2, nll[3, 0], (nll[6, 2] + nll[7, 3]) / 2]  # the third has no label at all
        assert part.value == pytest.approx(math.exp(float(sum(means)) / 3), rel=1e-5)
    assert found.difference.value == pytest.approx(found.new.value - found.original.value)


def test_accuracy_and_agreement_of_classes() -> None:
    before = torch.eye(4)[[0, 1, 2, 3, 0]]
    after = torch.eye(4)[[0, 1, 3, 3, 1]]
    found = scores_of("kl", torch.tensor([0, 1, 2, 2, 1]), torch.arange(5), before, after)
    assert found["agreement of top-1"].new.value == pytest.approx(3 / 5)
    assert found["accuracy"].original.value == pytest.approx(3 / 5)
    assert found["accuracy"].new.value == pytest.approx(3 / 5)
    assert "perplexity" not in found


def test_clicks_are_scored_by_auc() -> None:
    truth = torch.tensor([0.0, 1.0, 1.0, 0.0])
    found = scores_of("bce", truth, torch.arange(4), torch.tensor([0.1, 2.0, 3.0, -1.0]), torch.tensor([1.0, 0, 3, 0]))
    assert found["AUC"].original.value == 1.0
    assert found["AUC"].new.value == pytest.approx((0 + 0.5 + 1 + 1) / 4)


def test_without_labels_there_is_agreement_only() -> None:
    assert list(scores_of("kl", None, torch.arange(3), torch.eye(3), torch.eye(3))) == ["agreement of top-1"]
    assert scores_of("cosine", None, torch.arange(3), torch.eye(3), torch.eye(3)) == {}
