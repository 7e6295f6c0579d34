"""The click model of the benchmarks and the claims: the census table as clicks, every column embedded in one table.

Made here in some seconds: numbers are cut into quantiles, and, if asked, every pair of categorical columns is a column
too, as click models cross their features, which gives the table the long tail of rows seldom looked up that real ones
have. Read from the shared assets.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations, pairwise

import numpy as np
import torch
from torch import Tensor, nn

from models import ASSETS
from tersor.curves.draw import site_metrics
from tersor.data import Data
from tersor.forms import Operator, RowsSetting
from tersor.forms.rows import pruned
from tersor.metrics import Metric, Side
from tersor.models import Batch, Model, Site, open_model
from tersor.models.compare import substituted
from tersor.steps import Study

NUMBERS = (0, 2, 4, 10, 11, 12)
QUANTILES = 64
TRAINED = 24000  # rows; all others are held out


class ClickModel(nn.Module):
    """The embeddings of all columns side by side, and three layers."""

    def __init__(self, values: int, columns: int, width: int) -> None:
        super().__init__()
        self.table = nn.Embedding(values, width)
        sizes = (columns * width, 128, 64)
        self.layers = nn.Sequential(*(m for a, b in pairwise(sizes) for m in (nn.Linear(a, b), nn.ReLU())))
        self.head = nn.Linear(64, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(self.table(x).flatten(1)))


@dataclass(frozen=True)
class Clicks:
    """A trained model with its rows: ids (rows, columns) into one table, and labels (rows,).

    `starts` (columns,) is where the ids of every column begin.
    """

    model: ClickModel
    starts: Sequence[int]
    fit: tuple[Tensor, Tensor]
    held_out: tuple[Tensor, Tensor]

    def open(self) -> Model:
        """A copy of the model with binary KL as its divergence."""
        rows, width = self.model.table.weight.shape
        module = ClickModel(rows, len(self.starts), width)
        module.load_state_dict(self.model.state_dict())
        return open_model(module, divergence="bce")


def data_of(name: str, rows: tuple[Tensor, Tensor], size: int) -> Data:
    """Rows in batches."""
    return Data(name, batches=list(zip(*(part.split(size) for part in rows), strict=True)))


def click_model(width: int = 32, *, crossed: bool = False) -> Clicks:
    """Read, train for four epochs, and keep the rest; the seed of torch is set."""
    torch.manual_seed(0)
    x, y, starts = read(crossed)
    order = torch.randperm(len(x))
    fit, held_out = order[:TRAINED], order[TRAINED:]
    model = ClickModel(int(x.max()) + 1, x.shape[1], width)
    train(model, x[fit], y[fit])
    return Clicks(model, starts, (x[fit], y[fit]), (x[held_out], y[held_out]))


def read(crossed: bool) -> tuple[Tensor, Tensor, list[int]]:
    """Ids (rows, columns) into one table, labels (rows,), and where the ids of every column begin."""
    with (ASSETS / "adult" / "adult.csv").open(encoding="utf8") as file:
        rows = list(csv.reader(file))[1:]
    named = [_binned(np.array(c, float)) if k in NUMBERS else np.array(c)
             for k, c in enumerate(zip(*[row[:-1] for row in rows], strict=True))]  # fmt: skip
    columns = [np.unique(values, return_inverse=True)[1] for values in named]
    if crossed:
        categories = [values for k, values in enumerate(columns) if k not in NUMBERS]
        pairs = [a * (b.max() + 1) + b for a, b in combinations(categories, 2)]
        columns += [np.unique(values, return_inverse=True)[1] for values in pairs]
    starts = np.cumsum([0, *(ids.max() + 1 for ids in columns[:-1])]).tolist()
    labels = np.array([row[-1].strip().startswith(">") for row in rows])
    ids = np.stack([ids + start for ids, start in zip(columns, starts, strict=True)], 1)
    return torch.as_tensor(ids), torch.as_tensor(labels).float(), starts


def _binned(values: np.ndarray) -> np.ndarray:
    """Numbers as the number of their quantile."""
    return np.searchsorted(np.unique(np.quantile(values, np.linspace(0, 1, QUANTILES)[1:-1])), values)


def train(model: nn.Module, x: Tensor, y: Tensor, epochs: int = 4) -> None:
    optimiser = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=1e-3)
    for _ in range(epochs):
        for index in torch.randperm(len(x)).split(256):
            optimiser.zero_grad()
            nn.functional.binary_cross_entropy_with_logits(model(x[index])[:, 0], y[index]).backward()
            optimiser.step()


@dataclass
class Table:
    """The table of a click model under the metric of a study, and what another table in its place does."""

    opened: Study
    truth: np.ndarray
    batches: Sequence[Batch]

    @classmethod
    def of(cls, opened: Study, held_out: tuple[Tensor, Tensor]) -> Table:
        """To be measured on held-out rows (ids, labels)."""
        batches = opened.model.batches(data_of("held-out rows", held_out, 1024), None, 0, 0)
        return cls(opened, held_out[1].numpy(), batches)

    @property
    def site(self) -> Site:
        return next(site for site in self.opened.sites if site.kind == "table")

    @cached_property
    def weight(self) -> Tensor:
        return self.site.matrices(self.opened.model.module)[0].detach().float().clone()

    @cached_property
    def metric(self) -> Metric:
        """Damped, as the study chose."""
        return site_metrics(self.opened.run, self.site)[0]

    @cached_property
    def before(self) -> Tensor:
        """The logits (rows, 1) of the model as it was."""
        return self.logits(self.weight)

    def logits(self, table: Tensor) -> Tensor:
        """The logits (rows, 1) with another table."""
        model = self.opened.model
        with torch.no_grad(), substituted(model, self.site, table[None]):
            return torch.cat([model.outputs(batch) for batch in self.batches])

    def divergences(self, logits: Tensor) -> np.ndarray:
        """Binary KL in nats of every held-out row from the model as it was."""
        return self.opened.model.divergence.compare(self.before, logits).double().numpy()


def magnitude_pruned(weight: Tensor, setting: RowsSetting) -> Operator:
    """The rows of the largest norms, zeros in place of all others: the null of choosing rows."""
    mask = torch.zeros(len(weight), dtype=torch.bool)
    mask[weight.norm(dim=1).topk(setting.kept((weight.shape[0], weight.shape[1]))).indices] = True
    plain = Metric("identity", Side(torch.ones(len(weight))), Side(torch.ones(weight.shape[1])))
    return pruned(weight, plain, setting, mask, torch.zeros(weight.shape[1]))
