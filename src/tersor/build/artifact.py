"""The artifact: a folder with `model.safetensors`, `config.json` and `tersor.json`, and reading it back.

`config.json` names form and setting of every site, so that transformers can load the folder after `import tersor`;
`tersor.json` holds the plan, the ledger, versions and hashes. Sizes are known to the byte before anything is fitted.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tersor.build.activations import Activations
from tersor.build.calibrate import Rounded
from tersor.build.layers import ApproximateLayer, install
from tersor.build.layout import distinct_state
from tersor.errors import TersorError
from tersor.foreign import COUNT, POSITIVE, check, read_json, refuse_links, understood
from tersor.forms import Operator, form_named, setting_of, settings_of
from tersor.models.files import Checkpoint, Entry, open_checkpoint, read_tensors, weights_of, write_text, write_weights
from tersor.models.ondemand import values_of
from tersor.models.sites import Site, walk
from tersor.plan import PLAN, Choice
from tersor.run.facts import JUDGEMENT, PLACES, UNTOUCHED_ROWS

VERSION = 1
RECORD = "tersor.json"
MOST_BYTES = 8  # an entry of a matrix that an operator may take, beside `SPARE_BYTES`
SPARE_BYTES = 1 << 16
ROUNDING = {"format": str, "scale": str, "shift": bool, "dither": bool}
SITES = {str: {"form": str, "setting": {str: object}, "places": PLACES, "activations?": {str: ROUNDING}}}
FORMAT = {
    "model": {"kind": str, "source": str, "fingerprint": str, "stored_bytes": POSITIVE},
    "divergence": str,
    "plan": PLAN,
    "sites": SITES,
    "site_weights": {str: POSITIVE},
    "weights_bytes": COUNT,
    "files": {str: str},
    "untouched": UNTOUCHED_ROWS,
    "unused_sites": [str],
    "judgement?": (JUDGEMENT, None),
    "judged_on?": {"data": str, "samples": (POSITIVE, None), "sequence_length": POSITIVE, "batch_size": POSITIVE},
    "limit?": (float, None),
    "cuts?": {str: [float]},
}


def stored_dtypes(module: nn.Module, checkpoint: Checkpoint | None) -> dict[str, torch.dtype]:
    """The dtype in which each tensor of a module is kept in a file: that of its checkpoint, else its own."""
    state = distinct_state(module)
    if checkpoint is None:
        return {name: tensor.dtype for name, tensor in state.items()}
    known = [e[2] for e in checkpoint.entries.values() if e[2] is not None and e[2].is_floating_point]
    usual = max(set(known), key=known.count) if known else torch.float32
    return {
        name: checkpoint.dtype_of(name, usual if tensor.is_floating_point() else tensor.dtype)
        for name, tensor in state.items()
    }


def write_artifact(
    out: Path,
    entries: Sequence[Entry],
    tensor_of: Callable[[str], Tensor],
    sites: Sequence[Site],
    choices: Sequence[Choice],
    config: dict[str, Any] | None,
    record: dict[str, Any],
    rounded: Sequence[Rounded] = (),
    shard_bytes: int | None = None,
) -> int:
    """Write the tensors of a built model with what is needed to load it; returns the bytes of the weights files."""
    size = write_weights(out, entries, tensor_of, shard_bytes)
    places = {site.name: [list(place) for place in site.places] for site in sites}
    layout: dict[str, dict[str, Any]] = {
        c.site: {"form": c.form, "setting": c.setting, "places": places[c.site]} for c in choices
    }
    for r in rounded:
        layout[r.site].setdefault("activations", {})[r.place] = asdict(r.setting)
    if config is not None:
        quantization = {"quant_method": "tersor", "version": VERSION, "sites": layout}
        write_text(out / "config.json", json.dumps({**config, "quantization_config": quantization}, indent=2))
    hashes = {str(path.relative_to(out)): sha256(path) for path in sorted(out.rglob("*")) if path.is_file()}
    record = {
        "version": VERSION,
        **record,
        "sites": layout,
        "weights_bytes": size,
        "files": hashes,
    }
    write_text(out / RECORD, json.dumps(record, indent=2))
    return size


def read_record(folder: Path) -> dict[str, Any]:
    """`tersor.json` of an artifact; raises TersorError where the folder is none."""
    path = folder / RECORD
    if folder.is_dir():
        refuse_links(folder)
    try:
        record = read_json(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise TersorError(f"{folder} is no artifact of Tersor: it has no tersor.json.") from error
    if not isinstance(record, dict) or record.get("version") != VERSION:
        raise TersorError(f"{path} is not of version {VERSION} of the format; this Tersor cannot read it.")
    check(record, FORMAT, path)
    named = {choice["site"] for choice in record["plan"]["choices"]} | set(record["sites"])
    if not named <= set(record["site_weights"]):
        raise TersorError(f"{path} is damaged: its site_weights lack {min(named - set(record['site_weights']))}.")
    return record


def install_empty(module: nn.Module, sites: Mapping[str, Mapping[str, Any]], device: str | None = None) -> None:
    """Give a module operators without data at the named sites, on a device, by default that of its parameters."""
    found = {site.name: site for site in walk_all(module)}
    for name, value in check(sites, SITES, "The layout of the artifact").items():
        if name not in found:
            raise TersorError(f"The artifact has a site {name!r} that the model lacks; it was made from another model.")
        site = found[name]
        places = tuple((m, p) for m, p in value["places"] if _has(module, m, p, site))  # tied weights may be so later
        if len(places) != len(value["places"]) or site.places[0] not in places:
            raise TersorError(
                f"The artifact has {name} in places that the model lacks; it was made from another model."
            )
        with site.parameter(module).device if device is None else torch.device(device):
            operators = empty_operators(name, site, value["form"], value["setting"])
            install(module, replace(site, places=places), operators)
            for place, values in value.get("activations", {}).items():
                _round_inputs(module, place, values)


def _round_inputs(module: nn.Module, place: str, values: Mapping[str, Any]) -> None:
    """Give a layer a rounding of its inputs without data."""
    try:
        layer = module.get_submodule(place)
        if not isinstance(layer, ApproximateLayer):
            raise TersorError("it is no layer that was replaced.")
        layer.rounding = layer.rounding_for(Activations.from_json(values))
    except (TersorError, AttributeError) as error:
        raise TersorError(f"The inputs of {place} cannot be rounded as the artifact has it: {error}") from error


def _has(module: nn.Module, place: str, parameter: str, site: Site) -> bool:
    """Whether there is a parameter of the shape of a site at a place."""
    try:
        return tuple(module.get_submodule(place).get_parameter(parameter).shape) == site.parameter_shape
    except AttributeError:
        return False


def empty_operators(name: str, site: Site, form: str, values: Mapping[str, Any]) -> list[Operator]:
    """The operators of a site without data; raises TersorError for a setting that is none, or far too large."""
    family, most = form_named(form), SPARE_BYTES + MOST_BYTES * site.shape[0] * site.shape[1]
    with understood(f"The setting of {name}"):
        settings = settings_of(setting_of(family, values), site.stack)
        if len(settings) != site.stack:
            raise TersorError(f"There are {len(settings)} settings for {name}, which has {site.stack} matrices.")
        for setting in {id(s): s for s in settings}.values():
            with torch.device("meta"):
                taken = family.empty(site.shape, setting).nbytes
            if taken > most:
                raise TersorError(f"The setting of {name} asks for {taken:,} bytes, of {most:,} that it may take.")
        return [family.empty(site.shape, setting) for setting in settings]


def walk_all(module: nn.Module) -> tuple[Site, ...]:
    """All sites of any size, finite or not: names and shapes only."""
    return walk(module, minimum=0, check=False).sites


def load_weights(module: nn.Module, folder: Path) -> None:
    """Fill a module with operators in place from the weights of an artifact."""
    checkpoint = open_checkpoint(folder)
    state = module.state_dict(keep_vars=True)
    check_fit(state, checkpoint)
    lacking = sorted(set(distinct_state(module)) - set(checkpoint.entries))
    if lacking:
        raise TersorError(f"{weights_of(folder)} does not fit the model: {lacking[0]} is on one side only.")
    with torch.no_grad():
        for path in checkpoint.files:
            for name, tensor in read_tensors(path).items():
                state[name].copy_(tensor)


def check_fit(state: Mapping[str, Tensor], checkpoint: Checkpoint) -> None:
    """Raise TersorError for the first tensor of a checkpoint that a state lacks, or has in another shape or dtype."""
    for name, (path, shape, dtype) in checkpoint.entries.items():
        if name not in state:
            raise TersorError(f"{path} does not fit the model: {name} is on one side only.")
        due = state[name]
        if tuple(due.shape) != shape:
            raise TersorError(f"{path}: {name} has shape {shape}, not {tuple(due.shape)}.")
        if dtype != due.dtype and not (due.is_floating_point() and dtype is not None and dtype.is_floating_point):
            raise TersorError(f"{path}: {name} is kept as {dtype}, not as {due.dtype}.")


def refuse_not_finite(module: nn.Module, folder: Path) -> None:
    """Raise TersorError for the first weight that was left as it was and has NaN or infinite entries."""
    for name, parameter in module.named_parameters():
        if parameter.is_floating_point() and not torch.isfinite(values_of(parameter)).all():
            raise TersorError(f"{weights_of(folder)}: {name} has NaN or infinite entries.")


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def update_record(folder: Path, values: dict[str, Any]) -> None:
    """Add values to `tersor.json`."""
    write_text(folder / RECORD, json.dumps({**read_record(folder), **values}, indent=2))
