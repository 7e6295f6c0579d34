"""Embedding tables: the table of a click model in every form at equal bytes, as AUC and divergence.

    python bench/tables.py [--run DIR]

Only the table is approximated; its bytes are counted, the layers stay as they are. A form's setting is the one of its
ladder that is predicted to do least within the budget; `all together` is the best of all forms, by prediction times
gain. Nulls: the same forms under the identity, which know no frequencies (`blind`), rows kept by their norms beside
zeros, and rounding to the nearest between the extremes. Everything is fitted and measured in this one run.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from click_model import Table, click_model, data_of, magnitude_pruned
from tersor.forms import Candidate, IntForm, IntSetting, Operator, RowsForm, RowsSetting, cost_of, form_named
from tersor.judge.intervals import mean_estimate
from tersor.judge.scores import auc
from tersor.metrics import Metric
from tersor.run import Gains
from tersor.steps import study

RESULTS = Path(__file__).parent / "results"
BITS = (6.0, 4.0, 3.0, 2.0, 1.0)  # an entry of the table
FORMS = (
    "rows", "mixed", "hashed", "int", "coded", "trellis", "codebook", "float",
    "lowrank", "int+lowrank", "sparse", "dictionary", "shared",
)  # fmt: skip
BLIND = ("rows", "mixed", "hashed", "int", "coded", "lowrank")
RESAMPLES = 400
CHECKED = 2048  # held-out rows on which gains are measured; the others are for the figures
NO_GAINS = Gains({})


def best(candidates: list[Candidate], most: float, gains: Gains = NO_GAINS) -> Candidate | None:
    """Of the candidates that take no more bytes, the one that is predicted to do least."""
    within = [c for c in candidates if c.cost.stored <= most]
    return min(within, key=lambda c: c.divergence * gains.of(c.form, c.divergence), default=None)


def plain_rounding(table: Table, most: float) -> Operator | None:
    """Integers between the extremes, rounded to the nearest: the largest that fit, a row or less a scale."""
    rows, columns = table.metric.shape
    ladder = [
        IntSetting(bits, size, symmetric=symmetric, rounding="nearest", search=False)
        for bits in (8, 6, 5, 4, 3, 2)
        for size in (16, None)
        for symmetric in (False, True)
    ]
    sizes = {setting: cost_of(IntForm(), (rows, columns), setting).stored for setting in ladder}
    within = [setting for setting in ladder if sizes[setting] <= most]
    if not within:
        return None
    return IntForm().fit(table.weight, table.metric.coarsened("identity"), max(within, key=lambda s: sizes[s]))


def by_magnitude(table: Table, most: float) -> Operator:
    """As many rows as fit, in 16-bit floats."""
    rows, columns = table.metric.shape
    kept = int(most / (2 * columns))  # no more than this, for the mask is stored too
    while cost_of(RowsForm(), (rows, columns), RowsSetting(kept / rows)).stored > most:
        kept -= 1
    return magnitude_pruned(table.weight, RowsSetting(kept / rows))


def tables_at(table: Table, most: float, blind: list[Candidate]) -> Iterator[tuple[str, str, Operator | None]]:
    """What to measure within so many bytes: name, setting, operator or None where nothing is so small."""
    run, name, plain = table.opened.run, table.site.name, table.metric.coarsened("identity")
    drawn = list(run.candidates(name))

    def fitted(candidate: Candidate | None, metric: Metric) -> tuple[str, Operator | None]:
        if candidate is None:
            return "", None
        label = candidate.setting.label
        return label, form_named(candidate.form).fit(table.weight, metric, candidate.setting)

    yield "all together", *fitted(best(drawn, most, run.gains(name)), table.metric)
    for form in FORMS:
        yield form, *fitted(best([c for c in drawn if c.form == form], most), table.metric)
    for form in BLIND:
        yield f"{form}, blind", *fitted(best([c for c in blind if c.form == form], most), plain)
    magnitude, rounded = by_magnitude(table, most), plain_rounding(table, most)
    yield "rows by magnitude", magnitude.setting.label, magnitude
    yield "round to nearest", "" if rounded is None else rounded.setting.label, rounded


@dataclass
class Judge:
    """Scores tables on the same resamples of the held-out rows, so that all differences are paired."""

    table: Table

    @cached_property
    def resamples(self) -> list[np.ndarray]:
        """All rows, and then resamples of them."""
        count, generator = len(self.table.truth), np.random.default_rng(0)
        return [np.arange(count), *(generator.integers(0, count, count) for _ in range(RESAMPLES))]

    @cached_property
    def before(self) -> np.ndarray:
        return self.aucs(self.table.before)

    def aucs(self, logits: Tensor) -> np.ndarray:
        """The AUC of every resample (1 + RESAMPLES,)."""
        values = logits[:, 0].numpy()
        return np.array([auc(values[index], self.table.truth[index]) for index in self.resamples])

    def measured(self, operator: Operator) -> dict[str, Any]:
        """AUC, its difference to the original's, and divergence, each with its interval."""
        logits = self.table.logits(operator.dense())
        found = self.aucs(logits)
        divergence = asdict(mean_estimate(self.table.divergences(logits)))
        return {"auc": estimate(found), "difference": estimate(found - self.before), "divergence": divergence}


def estimate(values: np.ndarray) -> dict[str, float]:
    """A value with its 95 % interval, from the value of all and those of resamples (1 + RESAMPLES,)."""
    low, high = np.percentile(values[1:], (2.5, 97.5))
    return {"value": float(values[0]), "low": float(low), "high": float(high)}


def shown(row: dict[str, Any]) -> str:
    if row["bytes"] is None:
        return f"  {row['name']:20} nothing is so small"
    a, b, d = row["auc"], row["difference"], row["divergence"]
    return (
        f"  {row['name']:20} {row['setting']:34} {row['bytes']:>8,}  {a['value']:.4f} [{a['low']:.4f}, {a['high']:.4f}]"
        f"  {b['value']:+.4f} [{b['low']:+.4f}, {b['high']:+.4f}]  {d['value']:.5f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, default=None)
    run = parser.parse_args().run or Path(tempfile.mkdtemp())
    clicks = click_model(crossed=True)
    check, held_out = (tuple(part[rows] for part in clicks.held_out) for rows in (slice(CHECKED), slice(CHECKED, None)))
    opened = study(
        clicks.open(), data_of("rows", clicks.fit, 512), run, forms=FORMS,
        check_data=data_of("check rows", check, 512), include=["table"], workers=1,
    )  # fmt: skip
    table = Table.of(opened, held_out)
    rows, columns = table.weight.shape
    judge = Judge(table)
    original = estimate(judge.before)
    print(f"table {rows} x {columns}, {len(table.truth):,} held-out rows, AUC {original['value']:.4f}", flush=True)
    plain = table.metric.coarsened("identity")
    blind = [c for form in BLIND for c in form_named(form).curve(table.weight, plain)]
    cells = []
    for bits in BITS:
        most = bits * rows * columns / 8
        print(f"{bits:g} bits an entry, {most:,.0f} bytes: setting, bytes, AUC, difference, divergence")
        found: list[dict[str, Any]] = []
        for form, setting, operator in tables_at(table, most, blind):
            row: dict[str, Any] = {"name": form, "setting": setting, "bytes": operator and operator.nbytes}
            if operator is not None:
                row |= judge.measured(operator)
            print(shown(row), flush=True)
            found.append(row)
        cells.append({"bits": bits, "bytes": int(most), "rows": found})
    target = RESULTS / "tables.json"
    shape = {"rows": rows, "columns": columns, "held_out": len(table.truth)}
    target.write_text(json.dumps({**shape, "original": original, "cells": cells}, indent=1), encoding="utf8")
    print(f"written to {target.name}")


if __name__ == "__main__":
    main()
