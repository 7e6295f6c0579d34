"""Rows of a table that calibration data never looked up come up in use: as often as Good and Turing's estimate says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tersor.build.fits import fits_of
from tersor.build.interaction import applied
from tersor.data import read_data
from tersor.forms import as_values
from tersor.models.compare import Reference
from tersor.observe.summary import MOST_UNSEEN, Summary
from tersor.plan import Choice
from tersor.steps import study

ROWS, WIDTH = 2000, 48


def counted(counts: list[float]) -> Summary:
    """The summary of a table with these look-ups, whose gradients weigh 1 + their row's number."""
    summary = Summary.zeros(len(counts), 4, 99, True)
    summary.inputs += torch.tensor(counts)
    summary.weighted_inputs += torch.tensor(counts) * torch.arange(1.0, len(counts) + 1)
    summary.positions = sum(counts)
    return summary


def test_unseen_rows_share_what_rows_seen_once_have() -> None:
    found = counted([10.0, 1.0, 4.0, 0.0, 1.0, 0.0]).with_unseen_rows()
    share = 2 / 16
    assert found.inputs.tolist() == pytest.approx([10 * (1 - share), 1 - share, 4 * (1 - share), 1, 1 - share, 1])
    assert float(found.inputs.sum()) == pytest.approx(16)
    assert found.weighted_inputs[3] == found.weighted_inputs[5] == pytest.approx(share * 16 * (2 + 5) / 2 / 2)
    assert found.weighted_inputs[0] == pytest.approx(10 * (1 - share))


@pytest.mark.parametrize("counts", [[5.0, 2.0, 0.0], [5.0, 1.0, 1.0]])
def test_nothing_changes_where_no_row_was_seen_once_or_all_were_seen(counts: list[float]) -> None:
    summary = counted(counts)
    assert summary.with_unseen_rows() is summary


def test_rows_that_were_seen_keep_half_at_least() -> None:
    found = counted([1.0, 1.0, 1.0, 0.0]).with_unseen_rows()
    assert found.inputs.tolist() == pytest.approx([0.5, 0.5, 0.5, 3 * MOST_UNSEEN])


class Speaker(nn.Module):
    """The mean of rows of a table, and layers behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(ROWS, WIDTH)
        self.net = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 10))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.net(self.table(x).mean(1))
        return found


def test_pruned_rows_are_predicted_to_do_what_they_do_on_data_of_use(tmp_path: Path) -> None:
    """A third of the rows did not come up while calibrating. Were these free, the ratios were 1.3 and 4.7."""
    torch.manual_seed(0)
    words, generator = 1 / torch.arange(1.0, ROWS + 1), torch.Generator().manual_seed(0)

    def batches(count: int) -> list[Tensor]:
        drawn = (
            torch.multinomial(words.expand(64, -1), 12, replacement=True, generator=generator) for _ in range(count)
        )
        return list(drawn)

    damping = {"inputs": 0.03, "gradients": 0.3, "frequencies": 0.3}
    opened = study(
        Speaker(), batches(10), tmp_path / "run", forms=("rows",), workers=1, gains=False, damping=damping
    )  # fmt: skip
    reference = Reference(opened.model, list(opened.model.batches(read_data(batches(20)), None, 0, 64)))
    site = next(site for site in opened.sites if site.kind == "table")
    drawn = [c for c in opened.run.candidates(site.name) if c.setting.label in ("rows 0.125 int4", "rows 0.5 int8")]
    assert len(drawn) == 2
    for candidate in drawn:
        choice = Choice(site.name, "rows", as_values(candidate.setting), candidate.setting.label, 0, 0, 0, 0.0)
        list(fits_of(opened.run, opened.model, [site], [choice], 1))
        with applied(opened.run, opened.model, [site], [choice]):
            assert reference.divergence() / candidate.divergence == pytest.approx(1, abs=0.25)
