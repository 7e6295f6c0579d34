"""P021 Unified Embedding: Battle-Tested Feature Representations for Web-Scale ML Systems.

Claim: one shared table that the values of all features hash to does better than a hashed table a feature, at the same
number of parameters. Null: the rows of every column hashed among themselves, each column with its share of the rows,
fitted under the same metric by the same least squares; and, beside the claim, each column with the share that is best
for it by what the fits are predicted to do. The paper trains its tables; here both are fitted to the table of a trained
click model, whose categorical columns are crossed in pairs so that it has a long tail.
"""

import sys
import tempfile
from dataclasses import replace

import torch

from _shared import DAMPING, Pair, Subject, Trial, verdict
from click_model import Table, click_model, data_of
from tersor.forms import HashedForm, HashedSetting
from tersor.judge.scores import auc
from tersor.metrics import Metric, Side
from tersor.steps import study

FORM = HashedForm()


def separate(table: Table, starts: list[int], settings: list[HashedSetting]) -> tuple[torch.Tensor, int, list[float]]:
    """The table whose columns are hashed each on its own, its bytes, and what every column is predicted to do."""
    parts, nbytes, damage = [], 0, []
    for start, stop, setting in zip(starts, [*starts[1:], len(table.weight)], settings, strict=True):
        metric = Metric(table.metric.kind, Side(table.metric.rows.moment[start:stop]), table.metric.columns)
        operator = FORM.fit(table.weight[start:stop], metric, setting)
        parts.append(operator.dense())
        nbytes += operator.nbytes
        damage.append(metric.distance(table.weight[start:stop] - parts[-1]))
    return torch.cat(parts), nbytes, damage


def best_shares(table: Table, starts: list[int], setting: HashedSetting, most: int) -> list[HashedSetting]:
    """A share for each column, of the least predicted damage in sum that some price of a row allows."""
    ladder = [replace(setting, share=share) for share in (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 1)]
    damage = torch.tensor([separate(table, starts, [one] * len(starts))[2] for one in ladder])
    counts = [stop - start for start, stop in zip(starts, [*starts[1:], len(table.weight)], strict=True)]
    sizes = torch.tensor([[one.size((count, 1)) for count in counts] for one in ladder])
    for price in torch.logspace(-12, 2, 400, dtype=torch.float64):
        chosen = (damage + price * sizes).argmin(0)
        if sizes.gather(0, chosen[None]).sum() <= most:
            break
    return [ladder[k] for k in chosen.tolist()]


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
            columns = [setting] * len(clicks.starts)
            null, null_auc = tried("a table a column", *separate(table, clicks.starts, columns)[:2])
            columns = best_shares(table, clicks.starts, setting, setting.size((len(table.weight), 1)))
            sized, sized_auc = tried("best sizes", *separate(table, clicks.starts, columns)[:2])
            operator = FORM.fit(table.weight, table.metric, setting)
            method, method_auc = tried("one table", operator.dense(), operator.nbytes)
            pairs += [Pair(setting.label, null, method), Pair(setting.label, sized, method, shown=True)]
            notes.append(
                f"AUC of {setting.label}: {null_auc:.4f} a table a column, {sized_auc:.4f} of the best sizes, "
                f"{method_auc:.4f} one table"
            )
    sys.exit(verdict("One hashed table for all columns does less damage than one a column.", subject, pairs, notes))
