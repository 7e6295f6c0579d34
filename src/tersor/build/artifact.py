"""The artifact: a folder with `model.safetensors`, `config.json` and `tersor.json`, and reading it back.

`config.json` names form and setting of every site, so that transformers can load the folder after `import tersor`;
`tersor.json` holds the plan, the ledger, versions and hashes. Sizes are known to the byte before anything is fitted.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from tersor.build.activations import Activations
from tersor.build.calibrate import Rounded
from tersor.build.layers import ApproximateLayer, install
from tersor.build.layout import distinct_state
from tersor.errors import TersorError
from tersor.forms import Form, form_named, setting_of, settings_of
from tersor.models.files import Checkpoint, open_checkpoint, write_safetensors, write_text
from tersor.models.sites import Site, walk
from tersor.plan import Choice

VERSION = 1
WEIGHTS = "model.safetensors"
RECORD = "tersor.json"


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
    module: nn.Module,
    sites: Sequence[Site],
    choices: Sequence[Choice],
    dtypes: Mapping[str, torch.dtype],
    config: dict[str, Any] | None,
    record: dict[str, Any],
    rounded: Sequence[Rounded] = (),
) -> int:
    """Write a built module with what is needed to load it; returns the bytes of the weights file."""
    tensors = {k: v.to(dtypes.get(k, v.dtype)) for k, v in distinct_state(module).items()}
    write_safetensors(out / WEIGHTS, tensors)
    places = {site.name: [list(place) for place in site.places] for site in sites}
    layout: dict[str, dict[str, Any]] = {
        c.site: {"form": c.form, "setting": c.setting, "places": places[c.site]} for c in choices
    }
    for r in rounded:
        layout[r.site].setdefault("activations", {})[r.place] = asdict(r.setting)
    if config is not None:
        quantization = {"quant_method": "tersor", "version": VERSION, "sites": layout}
        write_text(out / "config.json", json.dumps({**config, "quantization_config": quantization}, indent=2))
    size = (out / WEIGHTS).stat().st_size
    record = {
        "version": VERSION,
        **record,
        "sites": layout,
        "weights_bytes": size,
        "weights_sha256": sha256(out / WEIGHTS),
    }
    write_text(out / RECORD, json.dumps(record, indent=2))
    return size


def read_record(folder: Path) -> dict[str, Any]:
    """`tersor.json` of an artifact; raises TersorError where the folder is none."""
    path = folder / RECORD
    try:
        record = json.loads(path.read_text(encoding="utf8"))
    except FileNotFoundError as error:
        raise TersorError(f"{folder} is no artifact of Tersor: it has no tersor.json.") from error
    except ValueError as error:
        raise TersorError(f"{path} is damaged: {error}.") from error
    if not isinstance(record, dict) or record.get("version") != VERSION:
        raise TersorError(f"{path} is not of version {VERSION} of the format; this Tersor cannot read it.")
    lacking = [name for name in ("model", "plan", "sites") if not isinstance(record.get(name), dict)]
    if lacking:
        raise TersorError(f"{path} is damaged: it has no {lacking[0]!r}.")
    return record


def install_empty(module: nn.Module, sites: Mapping[str, Mapping[str, Any]]) -> None:
    """Give a module operators without data at the named sites, on the device of its parameters."""
    found = {site.name: site for site in walk_all(module)}
    for name, value in sites.items():
        if name not in found:
            raise TersorError(f"The artifact has a site {name!r} that the model lacks; it was made from another model.")
        site, form = found[name], form_named(value["form"])
        device = site.parameter(module).device
        settings = _settings(name, site, form, value["setting"])
        site = replace(site, places=tuple((m, p) for m, p in value["places"]))  # tied weights may be tied only later
        with device:
            operators = [form.empty(site.shape, setting) for setting in settings]
            install(module, site, operators)
            for place, values in value.get("activations", {}).items():
                _round_inputs(module, place, values)


def _round_inputs(module: nn.Module, place: str, values: Mapping[str, Any]) -> None:
    """Give a layer a rounding of its inputs without data."""
    layer = module.get_submodule(place)
    try:
        if not isinstance(layer, ApproximateLayer):
            raise TersorError("it is no layer that was replaced.")
        layer.rounding = layer.rounding_for(Activations.from_json(values))
    except TersorError as error:
        raise TersorError(f"The inputs of {place} cannot be rounded as the artifact has it: {error}") from error


def _settings(name: str, site: Site, form: Form, values: Mapping[str, Any]) -> list[Any]:
    """The settings of the matrices of a site as an artifact has them."""
    try:
        settings = settings_of(setting_of(form, values), site.stack)
    except (TypeError, TersorError) as error:
        raise TersorError(f"The setting of {name} in the artifact is none: {error}") from error
    if len(settings) != site.stack:
        raise TersorError(f"The artifact has {len(settings)} settings for {name}, which has {site.stack} matrices.")
    return settings


def walk_all(module: nn.Module) -> tuple[Site, ...]:
    """All sites of any size, finite or not: names and shapes only."""
    return walk(module, minimum=0, check=False).sites


def load_weights(module: nn.Module, folder: Path) -> None:
    """Fill a module with operators in place from the weights of an artifact."""
    path = folder / WEIGHTS
    open_checkpoint(path)
    tensors = load_file(path)
    state = module.state_dict(keep_vars=True)
    first = distinct_state(module)
    strange, lacking = sorted(set(tensors) - set(state)), sorted(set(first) - set(tensors))
    if strange or lacking:
        raise TersorError(f"{path} does not fit the model: {(strange + lacking)[0]} is on one side only.")
    with torch.no_grad():
        for name, tensor in tensors.items():
            if state[name].shape != tensor.shape:
                raise TersorError(f"{path}: {name} has shape {tuple(tensor.shape)}, not {tuple(state[name].shape)}.")
            state[name].copy_(tensor)


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def update_record(folder: Path, values: dict[str, Any]) -> None:
    """Add values to `tersor.json`."""
    write_text(folder / RECORD, json.dumps({**read_record(folder), **values}, indent=2))
