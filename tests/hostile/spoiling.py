"""What the cases of the corpus spoil, and how: a model, a study of it, two artifacts and a text."""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tiny_models import write_model, write_texts

Spoil = Callable[[Path], tuple[str, str]]
CASES: dict[str, Spoil] = {}
WEIGHT, NORM = "model.layers.0.mlp.up_proj.weight", "model.norm.weight"
SITE = "model.layers.0.mlp.up_proj"
STUDY = "study model --data text.txt --run new.run"


def case(spoil: Spoil) -> Spoil:
    CASES[spoil.__name__] = spoil
    return spoil


# What is spoiled: a model, a study of it, two artifacts and a text.


def make_base(folder: Path) -> None:
    """`model`, `study.run`, the artifacts `coded` (judged on `text.txt`) and `trellis`, and `text.txt`."""
    from tersor.steps import build_plan, judge_artifact, open_study, study

    folder.mkdir(parents=True, exist_ok=True)
    model, run, text = folder / "model", folder / "study.run", folder / "text.txt"
    write_model(model, intermediate_size=96)
    write_texts(text, 8, 0)
    ladders = {"coded": [{"step": 0.01}], "trellis": [{"bits": 3.0}]}
    damping = {"inputs": 0.03, "gradients": 0.3, "frequencies": 0.3}
    options: dict[str, Any] = {"settings": ladders, "damping": damping, "gains": False, "workers": 1}
    opened = study(model, text, run, forms=tuple(ladders), sequence_length=16, **options)
    for form in ladders:
        small = min(opened.planner((form,)).front())[0]
        plan = opened.plan(f"{small + 2000}B", forms=(form,))
        build_plan(opened, plan, folder / form, workers=1)
        opened = open_study(model, run)
    judge_artifact(opened.model, folder / "coded", text, sequence_length=16)
    opened.run.close()


# How files are spoiled.


class Runs:
    """Unpickled, it leaves a file that says so."""

    def __reduce__(self) -> Any:
        return (open, ("it-ran", "w"))


def parts_of(path: Path) -> tuple[dict[str, Any], bytes]:
    """The header and the data of a safetensors file."""
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    return json.loads(whole[8 : 8 + length]), whole[8 + length :]


def write_parts(path: Path, header: dict[str, Any] | bytes, data: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def change_header(folder: Path, change: Callable[[dict[str, Any]], Any]) -> tuple[str, str]:
    """Change the header of a model's weights; the command is one that opens the model."""
    path = folder / "model" / "model.safetensors"
    header, data = parts_of(path)
    change(header)
    write_parts(path, header, data)
    return STUDY, "model.safetensors"


def change_tensor(path: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> None:
    tensors = load_file(path)
    changed = change(tensors.pop(name).clone())
    save_file(tensors if changed is None else {**tensors, name: changed}, path, {"format": "pt"})


def change_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def change_both(out: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the sites of an artifact in `config.json` and `tersor.json`, as one who means harm would."""
    change_json(out / "config.json", lambda config: change(config["quantization_config"]["sites"]))
    change_json(out / "tersor.json", lambda record: change(record["sites"]))


def resealed(out: Path) -> None:
    """Make the hashes of an artifact right again."""
    from tersor.build.artifact import sha256

    def change(record: dict[str, Any]) -> None:
        record["files"] = {name: sha256(out / name) for name in record["files"]}

    change_json(out / "tersor.json", change)


def change_fact(folder: Path, name: str, change: Callable[[Any], Any]) -> None:
    with contextlib.closing(sqlite3.connect(folder / "study.run" / "run.db")) as db, db:
        (text,) = db.execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()
        db.execute("UPDATE facts SET value = ? WHERE name = ?", (json.dumps(change(json.loads(text))), name))


def change_run(folder: Path, *queries: str) -> None:
    with contextlib.closing(sqlite3.connect(folder / "study.run" / "run.db")) as db, db:
        for query in queries:
            db.execute(query)


def link(path: Path, target: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(target)


def shards(folder: Path) -> dict[str, Any]:
    """The model in two files with an index."""
    model = folder / "model"
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    weights = {}
    for number, names in enumerate((list(tensors)[::2], list(tensors)[1::2]), 1):
        file = f"model-{number}.safetensors"
        save_file({name: tensors[name] for name in names}, model / file, {"format": "pt"})
        weights |= dict.fromkeys(names, file)
    return {"metadata": {}, "weight_map": weights}


def indexed(folder: Path, change: Callable[[dict[str, Any]], Any]) -> tuple[str, str]:
    index = shards(folder)
    change(index["weight_map"])
    (folder / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    return STUDY, "model.safetensors.index.json"


DEEP = "[" * 200_000
