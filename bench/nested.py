"""What nesting costs on BabyLlama: low-rank artifacts cut as they are loaded, and integers without their lowest bits.

    python bench/nested.py [--run DIR]

One artifact of low-rank factors is cut to smaller budgets, beside plans that were built for these. Integers lose their
lowest `k` bits, so that `s (C - z)` becomes `2^k s (C >> k - z')`, `z' = (z - (2^k - 1) / 2) / 2^k`, beside integers
fitted with as many bits as are left.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from judging import Judge, mean_of, ratio_of
from metrics import measured, opened_quickly
from models import reference
from tersor.build.load import load
from tersor.curves.draw import site_metrics
from tersor.forms import IntForm, IntSetting
from tersor.forms.integers import IntOperator
from tersor.forms.packing import unpack
from tersor.steps import build_plan

RESULTS = Path(__file__).parent / "results"
LARGEST, BUDGETS = "30%", ("25%", "20%")  # in the largest every site is low rank already
LADDER = [{"rank": rank} for rank in range(4, 90, 4)]
GROUP = 64
PAIRS = ((8, 6), (8, 4), (6, 4), (5, 4))


def shortened(operator: IntOperator, dropped: int) -> torch.Tensor:
    """The matrix of an operator without the lowest bits of its codes, at the middles of the intervals these were in."""
    scale, zero = (g.repeat_interleave(GROUP, 1)[:, : operator.shape[1]] for g in operator.grid())
    codes = unpack(operator.codes, operator.setting.bits, operator.shape[1]).int() >> dropped
    return ((codes * 2**dropped).float() + (2**dropped - 1) / 2 - zero) * scale


def integers(run: Path) -> list[dict[str, Any]]:
    opened, judge = opened_quickly("babyllama", run / "quick.run", None)
    sites = [site for site in opened.sites if site.kind != "table"]
    form, fits = IntForm(), {}
    for bits in sorted({b for pair in PAIRS for b in pair}):
        fits[bits] = {
            site.name: form.fit(
                site.matrices(opened.model.module)[0], site_metrics(opened.run, site)[0], IntSetting(bits, GROUP)
            )
            for site in sites
        }
    rows = []
    plain = {low: measured(judge, sites, {n: op.dense() for n, op in fits[low].items()}) for _, low in PAIRS}
    for high, low in PAIRS:
        cut = measured(judge, sites, {name: shortened(op, high - low) for name, op in fits[high].items()})
        direct = plain[low]
        rows.append(
            {"from": high, "to": low, "cut": mean_of(cut), "direct": mean_of(direct), "ratio": ratio_of(cut, direct)}
        )
        print(json.dumps(rows[-1]), flush=True)
    return rows


def ranks(run: Path) -> list[dict[str, Any]]:
    known = reference("babyllama")

    def study() -> Any:
        return known.study(run / "lowrank.run", forms=("lowrank",), settings={"lowrank": LADDER}, gains=False)

    def built(budget: str) -> Path:
        opened, out = study(), run / f"out-{budget.rstrip('%')}"
        if not out.exists():
            build_plan(opened, opened.plan(budget), out)
        return out

    judge = Judge.of(known, known.open())
    whole, rows = built(LARGEST), []
    for budget in BUDGETS:
        values = {}
        for name, out, asked in (("cut", whole, budget), ("direct", built(budget), None)):
            judge.held.model = copy.copy(judge.model)
            judge.held.model.module = load(out, dtype=torch.float32, budget=asked)
            values[name] = judge.held.divergences()
        cut, direct = values["cut"], values["direct"]
        rows.append({"budget": budget, "cut": mean_of(cut), "direct": mean_of(direct), "ratio": ratio_of(cut, direct)})
        print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, default=None)
    run = parser.parse_args().run or Path(tempfile.mkdtemp())
    found = {"largest": LARGEST, "ranks": ranks(run), "integers": integers(run)}
    (RESULTS / "nested-babyllama.json").write_text(json.dumps(found, indent=1), encoding="utf8")


if __name__ == "__main__":
    main()
