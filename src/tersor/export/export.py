"""Exporting: an artifact as a plain model folder, or with its integers as another stack's formats hold them.

A format holds the sites whose form it knows; others are refused, all at once, before anything is written, unless they
may be stored dense. The folder loads without Tersor.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from tersor.build.artifact import read_record
from tersor.build.expand import plain
from tersor.build.layout import distinct_state
from tersor.build.load import load
from tersor.errors import TersorError
from tersor.export import compressed, gptq
from tersor.export.grids import Grid, held_by
from tersor.foreign import read_json, understood
from tersor.forms.integers import IntOperator
from tersor.models.config import quiet_transformers, read_config
from tersor.models.files import WEIGHTS, copy_beside, open_checkpoint, staged, weights_of, write_text, write_weights
from tersor.plan.budget import parse_shard_size

FORMATS: dict[str, ModuleType] = {"compressed-tensors": compressed, "gptq": gptq}
TARGETS = ("dense", *FORMATS)
RECORD = "tersor-export.json"
NO_SHARDS = "1000TB"
NAMED = 3  # sites that a refusal names


@dataclass(frozen=True)
class Exported:
    """What was written: bytes of the original's weights, of the artifact's and of the export's; how sites are held."""

    target: str
    original_bytes: int
    artifact_bytes: int
    exported_bytes: int
    packed: tuple[str, ...]
    dense: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def export(
    out: str | Path,
    to: str,
    folder: str | Path,
    *,
    model: nn.Module | Callable[[], nn.Module] | str | None = None,
    rest: str | None = None,
    dtype: torch.dtype | None = None,
    shard_size: str | None = None,
) -> Exported:
    """Write the artifact `out` to `folder` in the format `to`: `dense`, `compressed-tensors` or `gptq`.

    `rest="dense"` stores what the format cannot hold dense, in `dtype` or the model's own. A module of one's own
    (`model`, as for `load`) can be exported to `dense` only. With a `shard_size`, such as `2GB`, no weights file is
    larger, unless a tensor alone is. Raises TersorError where sites cannot be held.
    """
    out, folder = Path(out), Path(folder)
    if to not in TARGETS:
        raise TersorError(f"There is no format {to!r} to export to; choose one of {', '.join(TARGETS)}.")
    if rest not in (None, "dense"):
        raise TersorError(f"What a format cannot hold can be stored dense, not {rest!r}.")
    _check_target(folder, to)
    most = parse_shard_size(shard_size)
    record = read_record(out)
    is_hf = record["model"]["kind"] == "huggingface"
    if to != "dense" and not is_hf:
        raise TersorError(f"{out} is a module of one's own, which {to} has no way to name; export it to dense.")
    module = load(out, model, dtype=dtype)
    held = {} if to == "dense" else _held(module, record, to, rest)
    with understood(weights_of(out)):
        whole: Any = plain(module, dtype)
    with staged(folder, last=RECORD) as target:
        if is_hf:
            copy_beside(out, target)
            with quiet_transformers():
                whole.save_pretrained(target, max_shard_size=NO_SHARDS if held or most is None else most)
        if held:
            (target / WEIGHTS).unlink()
            _write(target, _packed(target, whole, held, to), most)
        elif not is_hf:
            _write(target, distinct_state(whole), most)
        size = open_checkpoint(target).file_bytes
        dense = tuple(name for name in record["sites"] if name not in held)
        found = Exported(to, record["model"]["stored_bytes"], record["weights_bytes"], size, tuple(held), dense)
        write_text(target / RECORD, json.dumps(found.as_json(), indent=2))
    return found


def _check_target(folder: Path, to: str) -> None:
    """Refuse to write over anything but an export to the same format."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    try:
        known = read_json(folder / RECORD)["target"]
    except (OSError, TersorError, KeyError, TypeError, IndexError):
        known = None
    if known != to:
        raise TersorError(f"{folder} exists and is no export to {to}; choose another folder.")


def _held(module: nn.Module, record: Mapping[str, Any], to: str, rest: str | None) -> dict[str, IntOperator]:
    """The layers that the format holds; raises TersorError for the others, unless they may be dense."""
    held = held_by(module, record["sites"], FORMATS[to].OWNERS)
    reasons = {name: FORMATS[to].refusal(operator) for name, operator in held.operators.items()}
    others = {**held.others, **{name: reason for name, reason in reasons.items() if reason is not None}}
    refused = {name: reason for name, reason in others.items() if name not in record["unused_sites"]}
    kept = {name: operator for name, operator in held.operators.items() if reasons[name] is None}
    if (refused and rest is None) or not kept:
        few = ", ".join(f"{name} ({reason})" for name, reason in list(refused.items())[:NAMED])
        more = ", ..." if len(refused) > NAMED else ""
        raise TersorError(
            f"{to} cannot hold {len(refused)} of the {len(record['sites'])} sites: {few}{more}; study with "
            "--forms portable, leaving out what it can never hold by --exclude, or give --rest dense."
        )
    return kept


def _write(target: Path, state: Mapping[str, Tensor], most: int | None) -> None:
    entries = [(name, tuple(tensor.shape), tensor.dtype) for name, tensor in state.items()]
    write_weights(target, entries, state.__getitem__, most)


def _packed(target: Path, whole: nn.Module, held: Mapping[str, IntOperator], to: str) -> dict[str, Tensor]:
    """The tensors with packed integers in the place of dense weights; says so in config.json."""
    settings = FORMATS[to].config(whole, held)
    state: dict[str, Tensor] = distinct_state(whole)
    for name, operator in held.items():
        dtype = state.pop(f"{name}.weight").dtype
        state |= FORMATS[to].tensors(name, Grid.of(operator), dtype, settings)
    config = {**read_config(target), "quantization_config": settings}
    write_text(target / "config.json", json.dumps(config, indent=2))
    if to == "gptq":
        write_text(target / "quantize_config.json", json.dumps(settings, indent=2))
    return state
