"""P021 Unified Embedding: Battle-Tested Feature Representations for Web-Scale ML Systems.

Claim: one shared table that the values of all features hash to does better than a hashed table a feature, at the same
number of parameters. Null: the rows of every column hashed among themselves, each column with its share of the rows,
fitted under the same metric by the same least squares. The paper trains its tables; here both are fitted to the table
of a trained click model, whose categorical columns are crossed in pairs so that it has a long tail.
"""

import sys
import tempfile

import torch

from _shared import DAMPING, Pair, Subject, Trial, verdict
from click_model import Table, click_model, data_of
from tersor.forms import HashedForm, HashedSetting
from tersor.judge.scores import auc
from tersor.metrics import Metric, Side
from tersor.steps import study

FORM = HashedForm()


def separate(table: Table, starts: list[int], setting: HashedSetting) -> tuple[torch.Tensor, int]:
    """The table whose columns are hashed each on its own, and the bytes that this takes."""
    parts, nbytes = [], 0
    for start, stop in zip(starts, [*starts[1:], len(table.weight)], strict=True):
        metric = Metric(table.metric.kind, Side(table.metric.rows.moment[start:stop]), table.metric.columns)
        operator = FORM.fit(table.weight[start:stop], metric, setting)
        parts.append(operator.dense())
        nbytes += operator.nbytes
    return torch.cat(parts), nbytes


if __name__ == "__main__":
    clicks = click_model(crossed=True)
    data = data_of("calibration rows", clicks.fit, 512)
    opened = study(
        clicks.open(), data, tempfile.mkdtemp(), forms=("hashed",), include=["table"], damping=DAMPING, gains=False,
        settings={"hashed": [{"share": 0.5}]}, workers=1,
    )  # fmt: skip
    table = Table.of(opened, clicks.held_out)
    subject = Subject("Click model on census data, crossed", clicks.open, data, data)

    def tried(label: str, matrix: torch.Tensor, nbytes: int) -> tuple[Trial, float]:
        logits = table.logits(matrix)
        bits = 8 * nbytes / table.weight.numel()
        trial = Trial(label, nbytes, table.divergences(logits), opened.model, bits)
        return trial, auc(logits[:, 0].numpy(), table.truth)

    pairs, notes = [], [f"AUC of the original {auc(table.before[:, 0].numpy(), table.truth):.4f}"]
    for hashes in (1, 2):
        for share in (0.5, 0.25, 0.125):
            setting = HashedSetting(share, hashes)
            null, null_auc = tried("a table a column", *separate(table, clicks.starts, setting))
            operator = FORM.fit(table.weight, table.metric, setting)
            method, method_auc = tried("one table", operator.dense(), operator.nbytes)
            pairs.append(Pair(setting.label, null, method))
            notes.append(f"AUC of {setting.label}: {null_auc:.4f} a table a column, {method_auc:.4f} one table")
    sys.exit(verdict("One hashed table for all columns does less damage than one a column.", subject, pairs, notes))
