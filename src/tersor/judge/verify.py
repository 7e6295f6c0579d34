"""Verifying an artifact: that it is what its `tersor.json` says, and does what was measured of it.

Hashes, settings, shapes and streams need nothing but the folder; with the original and the data that it was judged on,
the divergence is measured again. The first thing that does not hold is a TersorError.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tersor.build import operators_of
from tersor.build.artifact import RECORD, read_record, sha256
from tersor.build.layers import decoded_of
from tersor.build.load import load
from tersor.data import read_data
from tersor.errors import TersorError
from tersor.judge.artifact import Source, adopt, plan_of
from tersor.judge.judge import compared
from tersor.models import Model
from tersor.models.config import read_config
from tersor.models.files import open_checkpoint, weights_of
from tersor.plan import UNTOUCHED
from tersor.run import fingerprint_of

Progress = Callable[[str, str, int, int], Any]
HASHES, SETTINGS, OPERATORS, DIVERGENCE = "hashes", "settings", "operators", "divergence"


@dataclass(frozen=True)
class Verified:
    """One thing that holds: its name, and what was found in words."""

    name: str
    found: str


def verify(
    out: str | Path,
    original: Model | None = None,
    data: Source | None = None,
    progress: Progress = lambda *_: None,
) -> list[Verified]:
    """All that holds of an artifact. A module of one's own is needed, as `original`, to load what was made of it.

    Raises TersorError, naming file or site, for the first that does not hold, and where `data` is not what the artifact
    was judged on.
    """
    out = Path(out)
    record = read_record(out)
    if original is not None:
        plan_of(original, out)
    found = [_hashes(out, record), _settings(out, record)]
    if original is not None or record["model"]["kind"] == "huggingface":
        found.append(_operators(out, record, original, progress))
    if original is not None and data is not None:
        found.append(_divergence(out, record, original, data, progress))
    return found


def _hashes(out: Path, record: dict[str, Any]) -> Verified:
    files, weights = record["files"], open_checkpoint(out)
    unnamed = [path for path in weights.files if path.name not in files]
    if unnamed:
        raise TersorError(f"{unnamed[0]} is a file that {RECORD} does not name.")
    for name, due in files.items():
        path = out / name
        if not path.resolve().is_relative_to(out.resolve()):
            raise TersorError(f"{out / RECORD} names {name}, which lies outside of the folder.")
        if not path.is_file():
            raise TersorError(f"{out / RECORD} names {name}, which is missing.")
        if sha256(path) != due:
            raise TersorError(f"{path} is not the file that {RECORD} names: its SHA-256 is another.")
    size = weights.file_bytes
    for what, bytes_due in (("weights_bytes", record["weights_bytes"]), ("plan", record["plan"]["stored"])):
        if size != bytes_due:
            raise TersorError(f"{weights_of(out)} takes {size:,} bytes, but {what} of {RECORD} has {bytes_due:,}.")
    return Verified(HASHES, f"{len(files)} files")


def _settings(out: Path, record: dict[str, Any]) -> Verified:
    """The same sites, forms and settings in the plan, in the layout and in `config.json`."""
    layout = {name: (site["form"], site["setting"]) for name, site in record["sites"].items()}
    planned = {c["site"]: (c["form"], c["setting"]) for c in record["plan"]["choices"] if c["form"] != UNTOUCHED}
    if record["model"]["kind"] == "huggingface":
        of_config = (read_config(out).get("quantization_config") or {}).get("sites")
        if of_config != record["sites"]:
            raise TersorError(f"{out / 'config.json'} has other sites or settings than {RECORD}.")
    different = sorted(name for name in {*layout, *planned} if layout.get(name) != planned.get(name))
    if different:
        raise TersorError(f"{out / RECORD}: {different[0]} is not the same in its plan and in its sites.")
    return Verified(SETTINGS, f"{len(layout)} sites")


def _operators(out: Path, record: dict[str, Any], original: Model | None, progress: Progress) -> Verified:
    """Shapes fit, streams decode to finite matrices, and sites take the bytes that the plan says."""
    module = load(out, None if original is None else copy.deepcopy(original.module))
    operators = operators_of(module)
    for number, (name, operator) in enumerate(operators.items()):
        progress("verify", name, number, len(operators))
        finite = bool(torch.isfinite(decoded_of(name, operator)).all())
        if not finite:
            raise TersorError(f"{weights_of(out)}: {name} has NaN or infinite entries.")
    taken = sum(operator.nbytes for operator in operators.values())
    planned = sum(c["stored"] for c in record["plan"]["choices"] if c["form"] != UNTOUCHED)
    if taken != planned:
        raise TersorError(f"{weights_of(out)}: its operators take {taken:,} bytes, but {planned:,} were planned.")
    return Verified(OPERATORS, f"{len(operators)} decoded")


def _divergence(out: Path, record: dict[str, Any], original: Model, data: Source, progress: Progress) -> Verified:
    """The divergence, measured as it was judged, lies in the interval that was found then."""
    judged, on = record.get("judgement"), record.get("judged_on")
    if judged is None or on is None:
        raise TersorError(f"{out} was not judged, so there is no divergence to reproduce; call `tersor judge` first.")
    held_out = read_data(data)
    made = original.batches(held_out, on["samples"], on["sequence_length"], on["batch_size"], seed=0)
    batches = original.compact(made)
    if fingerprint_of(batches) != on["data"]:
        raise TersorError(f"{held_out.source} is not the data that {out} was judged on.")
    new = adopt(original, out)
    *_, values = compared(original, new, batches, lambda *at: progress("verify", *at))
    measured, interval = float(values.mean()), judged["divergence"]
    if not interval["low"] <= measured <= interval["high"]:
        between = f"{interval['low']:.4g} to {interval['high']:.4g}"
        raise TersorError(f"{out} has a divergence of {measured:.4g}, outside of the interval {between} in {RECORD}.")
    return Verified(DIVERGENCE, f"{measured:.4g}, in {interval['low']:.4g} to {interval['high']:.4g}")
