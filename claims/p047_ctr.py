"""P047 Unified Low-rank Compression Framework for Click-through Rate Prediction.

Claim: compressing the output features of the embedding table and of the layers, not the weights themselves, keeps the
AUC at a third to a fifth of the size. Null: plain SVD of the same weights, its ranks chosen in the same way, at no
fewer bytes. The model is made here, on the census table as clicks: one table for the values of all 14 columns, numbers
cut into quantiles, and three layers on top, trained for a few epochs; no fine-tuning follows the compression.
"""

import csv
import sys
from dataclasses import replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

from _shared import Pair, Subject, asset, trial, verdict
from tersor.data import Data
from tersor.judge.scores import auc
from tersor.methods import method_named
from tersor.models import open_model

NUMBERS = (0, 2, 4, 10, 11, 12)
QUANTILES = 64
WIDTH = 32


class ClickModel(nn.Module):
    def __init__(self, values: int, columns: int) -> None:
        super().__init__()
        self.table = nn.Embedding(values, WIDTH)
        sizes = (columns * WIDTH, 128, 64)
        self.layers = nn.Sequential(*(m for a, b in pairwise(sizes) for m in (nn.Linear(a, b), nn.ReLU())))
        self.head = nn.Linear(64, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(self.table(x).flatten(1)))


def read() -> tuple[Tensor, Tensor]:
    """Ids (rows, columns) into one table, and labels (rows,)."""
    with (asset("adult") / "adult.csv").open(encoding="utf8") as file:
        rows = list(csv.reader(file))[1:]
    columns, start = [], 0
    for k, column in enumerate(zip(*[row[:-1] for row in rows], strict=True)):
        values = np.array(column, dtype=float) if k in NUMBERS else np.array(column)
        if k in NUMBERS:
            values = np.searchsorted(np.unique(np.quantile(values, np.linspace(0, 1, QUANTILES)[1:-1])), values)
        ids = np.unique(values, return_inverse=True)[1]
        columns.append(ids + start)
        start += ids.max() + 1
    labels = np.array([row[-1].strip().startswith(">") for row in rows])
    return torch.as_tensor(np.stack(columns, 1)), torch.as_tensor(labels).float()


def train(model: nn.Module, x: Tensor, y: Tensor, epochs: int = 4) -> None:
    optimiser = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=1e-3)
    for _ in range(epochs):
        for index in torch.randperm(len(x)).split(256):
            optimiser.zero_grad()
            nn.functional.binary_cross_entropy_with_logits(model(x[index])[:, 0], y[index]).backward()
            optimiser.step()


if __name__ == "__main__":
    torch.manual_seed(0)
    x, y = read()
    order = torch.randperm(len(x))
    fit, held_out = order[:24000], order[24000:]
    model = ClickModel(int(x.max()) + 1, x.shape[1])
    train(model, x[fit], y[fit])
    state = model.state_dict()

    def opened():
        module = ClickModel(int(x.max()) + 1, x.shape[1])
        module.load_state_dict(state)
        return open_model(module, divergence="bce")

    def batches(index: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
        return [(x[part], y[part]) for part in index.split(size)]

    subject = Subject(
        "Click model on census data",
        opened,
        Data("calibration rows", batches=batches(fit[:8192], 512)),
        Data("held-out rows", batches=batches(held_out, 1024)),
        options={},
    )
    truth = y[held_out].numpy()

    def score(tried) -> float:
        with torch.no_grad():
            logits = torch.cat([tried.outputs(batch) for batch in subject.reference.batches])
        return auc(logits[:, 0].numpy(), truth)

    pairs, notes = [], [f"AUC of the original {score(subject.original):.4f}"]
    for budget in ("33%", "25%", "20%"):
        null = trial(subject, "svd, ranks chosen", replace(method_named("svd"), allocation="front"), budget)
        method = trial(subject, "low-rank-ctr", "low-rank-ctr", f"{null.nbytes}B")
        pairs.append(Pair(budget, null, method))
        notes.append(f"AUC at {budget}: {score(null.model):.4f} svd, {score(method.model):.4f} low-rank-ctr")
    sys.exit(verdict("Compressing output features does less damage than compressing weights.", subject, pairs, notes))
