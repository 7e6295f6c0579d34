"""P099 OptEmbed: Learning Optimal Embedding Table for Click-through Rate Prediction.

Claim: leaving out rows that are not needed, and giving parts of a table dimensions of their own, keeps its quality at
fewer bytes. Nulls: the rows of the largest norms, as many of them; and one dimension for all rows, at no fewer bytes,
under the same metric. What is learned in training there is fitted here, to the table of a trained click model, whose
categorical columns are crossed in pairs so that it has a long tail. The paper's own masks go by the norms of rows.
"""

import sys
import tempfile

from _shared import DAMPING, Pair, Subject, Trial, verdict
from click_model import Table, click_model, data_of, magnitude_pruned
from tersor.forms import (
    LowRankForm,
    LowRankSetting,
    MixedForm,
    MixedSetting,
    Operator,
    RowsForm,
    RowsSetting,
    cost_of,
)
from tersor.judge.scores import auc
from tersor.steps import study

if __name__ == "__main__":
    clicks = click_model(crossed=True)
    data = data_of("calibration rows", clicks.fit, 512)
    opened = study(
        clicks.open(), data, tempfile.mkdtemp(), forms=("rows",), include=["table"], damping=DAMPING, gains=False,
        settings={"rows": [{"share": 0.5}]}, workers=1,
    )  # fmt: skip
    table = Table.of(opened, clicks.held_out)
    weight, metric = table.weight, table.metric
    subject = Subject("Click model on census data, crossed", clicks.open, data, data)
    notes = [f"AUC of the original {auc(table.before[:, 0].numpy(), table.truth):.4f}"]

    def tried(label: str, operator: Operator) -> Trial:
        logits = table.logits(operator.dense())
        notes.append(f"AUC of {label}, {operator.setting.label}: {auc(logits[:, 0].numpy(), table.truth):.4f}")
        bits = 8 * operator.nbytes / weight.numel()
        return Trial(label, operator.nbytes, table.divergences(logits), opened.model, bits)

    pairs = []
    for share in (0.5, 0.25, 0.125):
        setting = RowsSetting(share)
        null = tried("rows by magnitude", magnitude_pruned(weight, setting))
        pairs.append(Pair(setting.label, null, tried("rows", RowsForm().fit(weight, metric, setting))))
    for rank in (16, 8, 4):
        uniform = LowRankForm().fit(weight, metric, LowRankSetting(rank))
        ids = cost_of(MixedForm(), uniform.shape, MixedSetting(0.5)).stored  # without ranks nothing else is stored
        share = (uniform.nbytes - ids) / 2 / weight.numel()
        mixed = MixedForm().fit(weight, metric, MixedSetting(share))
        null = tried("one dimension", uniform)
        pairs.append(Pair(f"dimension {rank}", null, tried(f"mixed {mixed.setting.ranks}", mixed)))
    claim = "Rows left out by their loss, and dimensions by frequency, do less damage than by norm and one for all."
    sys.exit(verdict(claim, subject, pairs, notes))
