"""Every reader, given noise or a sound file spoiled by chance, gives a value or a TersorError, and nothing else."""

from __future__ import annotations

import contextlib
import copy
import json
import shutil
import sqlite3
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from tersor.build.artifact import empty_operators, read_record
from tersor.build.layers import decoded_of
from tersor.coding import decode, encode
from tersor.coding.stream import Coded
from tersor.coding.trellis import Trellis
from tersor.data import read_data, read_pairs
from tersor.errors import TersorError
from tersor.foreign import parse_json, read_header
from tersor.forms import FORMS, as_values
from tersor.models.config import laid_out, model_class, read_config, refuse_too_large
from tersor.models.files import open_checkpoint, read_tensors
from tersor.models.sites import Site, walk

pytest.importorskip("transformers")

from spoiling import parts_of, write_parts

from tiny_models import write_model

SHAPE = (64, 72)
OWN = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


def fuzzed(examples: int) -> Callable[[Any], Any]:
    """The same examples in every run."""
    return settings(max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=OWN)


@contextlib.contextmanager
def refused_or_read() -> Iterator[None]:
    """Inside, nothing may go wrong but in a sentence."""
    try:
        yield
    except TersorError as error:
        text = str(error)
        assert "\n" not in text and len(text) < 700, text


@st.composite
def spoilt(draw: st.DrawFn, whole: bytes) -> bytes:
    """A sound file that lost its end, or a part, or in which bytes are others; or noise alone."""
    how = draw(st.sampled_from(("cut", "flip", "flip", "drop", "noise")))
    at = draw(st.integers(0, max(0, len(whole) - 1)))
    if how == "cut":
        return whole[:at]
    if how == "drop":
        return whole[:at] + whole[at + draw(st.integers(1, 64)) :]
    if how == "noise":
        return draw(st.binary(max_size=400))
    found = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        near = draw(st.integers(0, max(0, min(len(found), 400) - 1)))  # where headers are
        found[draw(st.sampled_from((at, near)))] = draw(st.integers(0, 255))
    return bytes(found)


LEAVES = st.sampled_from(
    (None, True, -1, 0, 1, 2, 3, 1000, 1 << 40, 1 << 62, 1 << 70, -(1 << 63), 10**400, 0.5, -1.5, 1e308, float("nan"),
     float("inf"), "", "a", "../a", "\x1b[2J", "\u00e9", "int", "F32", [], {}, [[]], [1], {"a": {}})
)  # fmt: skip


def places(value: Any) -> list[tuple[Any, ...]]:
    """The ways to everything inside of a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [(key, *rest) for key, child in items for rest in [(), *places(child)]]


def changed(draw: st.DrawFn, value: Any) -> Any:
    """A JSON value in which something is another, or missing."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 2))):
        found = places(value)
        if not found:
            break
        *way, last = draw(st.sampled_from(found))
        parent = value
        for key in way:
            parent = parent[key]
        if draw(st.booleans()) and isinstance(parent, dict):
            del parent[last]
        else:
            parent[last] = draw(LEAVES)
    return value


def encoded(letters: list[str]) -> bytes:
    return "".join(letters).encode()


@fuzzed(100)
@given(st.binary(max_size=100) | st.lists(st.sampled_from(list('[]{},:"0123aeE.-\\u')), max_size=60).map(encoded))
def test_json(text: bytes) -> None:
    with refused_or_read():
        parse_json(text, "it")


@fuzzed(80)
@given(st.data())
def test_safetensors(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(3, 4), "b": torch.zeros(2, dtype=torch.int16), "c": torch.ones(0, 3)}, path, {"a": "b"})
    header, rest = parts_of(path)
    if data.draw(st.booleans()):
        write_parts(path, json.dumps(changed(data.draw, header)).encode(), rest)
    else:
        path.write_bytes(data.draw(spoilt(path.read_bytes())))
    with refused_or_read():
        found = read_header(path)
        assert sum(part.stop - part.start for part in found.values()) < path.stat().st_size
        assert {name: tuple(t.shape) for name, t in read_tensors(path).items()} == {
            n: p.shape for n, p in found.items()
        }
        open_checkpoint(path).refuse_empty()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz") / "model"
    write_model(folder, intermediate_size=96)
    return folder


@fuzzed(40)
@given(st.data())
def test_config(model: Path, tmp_path: Path, data: st.DataObject) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model, folder, dirs_exist_ok=True)
    config = changed(data.draw, json.loads((model / "config.json").read_text()))
    (folder / "config.json").write_text(json.dumps(config))
    with refused_or_read():
        read, checkpoint = read_config(folder), open_checkpoint(folder)
        cls, _ = model_class(folder, read)
        refuse_too_large(folder, laid_out(folder, cls, read, checkpoint), checkpoint)


RECORD = {
    "version": 1,
    "model": {"kind": "huggingface", "source": "m", "fingerprint": "f", "stored_bytes": 100},
    "divergence": "kl",
    "plan": {
        "name": "p", "stored": 10, "resident": 10, "flops": 5, "divergence": 0.1, "gap": 0.0, "limits": {"stored": 12},
        "latency": None, "latency_share": None,
        "choices": [
            {"site": "a", "form": "int", "setting": {"bits": 4}, "label": "int4", "stored": 5, "resident": 5,
             "flops": 5, "divergence": 0.1, "latency": None}
        ],
    },
    "sites": {"a": {"form": "int", "setting": {"bits": 4}, "places": [["a", "weight"]]}},
    "site_weights": {"a": 50, "b": 3},
    "weights_bytes": 10,
    "files": {"model.safetensors": "00"},
    "untouched": [["b", 3, 12, "under 4096 weights"]],
    "unused_sites": [],
    "judgement": None,
    "limit": 0.05,
}  # fmt: skip


@fuzzed(80)
@given(st.data())
def test_record(tmp_path: Path, data: st.DataObject) -> None:
    from tersor.report.account import account_of_artifact
    from tersor.report.tables import account_tables

    (tmp_path / "tersor.json").write_text(json.dumps(changed(data.draw, RECORD)))
    with refused_or_read():
        read_record(tmp_path)
        account = account_of_artifact(tmp_path)
        json.dumps(account.as_json())
        account_tables(account)


def site() -> Site:
    return walk(nn.Sequential(nn.Linear(SHAPE[1], SHAPE[0])), minimum=0).sites[0]


def ladder(name: str) -> list[dict[str, Any]]:
    """A few settings of a form, for a weight of the shape or of a kernel."""
    found = [s for shape in (SHAPE, (256, 512), (64, 576)) for s in FORMS[name].settings(shape)]
    return [as_values(setting) for setting in found[:3]]


@pytest.mark.parametrize("name", FORMS)
def test_settings(name: str) -> None:
    known, at = ladder(name), site()

    @fuzzed(25)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        values = changed(data.draw, json.loads(json.dumps(data.draw(st.sampled_from(known)))))
        with refused_or_read():
            for operator in empty_operators("a", at, name, values):
                assert operator.nbytes <= 8 * SHAPE[0] * SHAPE[1] + (1 << 16)

    check()


@pytest.mark.parametrize("name", FORMS)
def test_tensors_of_operators(name: str) -> None:
    """Buffers of the right shapes and dtypes that hold anything."""
    at, values = site(), ladder(name)[0]
    if name == "coded":
        values |= {"stored": 500}

    @fuzzed(8)
    @given(st.integers(0, 1 << 30))
    def check(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        with refused_or_read():
            (operator,) = empty_operators("a", at, name, values)
            for buffer in operator.state_dict().values():
                noise = torch.randint(0, 256, (buffer.numel() * buffer.element_size(),), generator=generator)
                if buffer.numel():
                    buffer.copy_(noise.to(torch.uint8).view(buffer.dtype).view(buffer.shape))
            assert decoded_of("a", operator).shape == SHAPE

    check()


@fuzzed(80)
@given(st.data())
def test_coded_stream(data: st.DataObject) -> None:
    generator = np.random.default_rng(0)
    codes = np.rint(generator.normal(0, 2, (9, 20))).astype(np.int32)
    whole = encode(Coded(codes, np.arange(9), np.arange(20), 4))
    with refused_or_read():
        decode(data.draw(spoilt(whole)), (9, 20))


@fuzzed(80)
@given(st.data())
def test_trellis_stream(data: st.DataObject) -> None:
    """With a checksum that is right."""
    from tersor.forms.trellis_read import Reader, parsed

    size = 4 * (-(-6 * 5 // 8))
    head = struct.pack("<4sIIBBH" + "hH" * 4, b"TST1", 6, 6, data.draw(st.integers(0, 3)), 0, 0, *(64, 1) * 4)
    body = head + bytes(size) + bytes(40)
    body = data.draw(spoilt(body))
    stream = body + struct.pack("<I", zlib.crc32(body))
    with refused_or_read():
        Trellis.from_bytes(stream, (6, 6))
        tensor = torch.frombuffer(bytearray(stream), dtype=torch.uint8)
        assert Reader(parsed(tensor, (6, 6)), tensor).rows().shape == (6, 6)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of a small module, in memory."""
    from tersor.steps import study

    folder = tmp_path_factory.mktemp("fuzz") / "run"
    torch.manual_seed(0)
    damping = {"inputs": 0.03, "gradients": 0.3, "frequencies": 0.3}
    ladders = {"int": [{"bits": 2, "group_size": 32}, {"bits": 4, "group_size": 32}]}
    opened = study(
        nn.Linear(64, 64), [torch.randn(8, 64) for _ in range(5)], folder, forms=("int",), settings=ladders,
        damping=damping, gains=False, workers=1,
    )  # fmt: skip
    opened.plan("20%")
    opened.run.close()
    return folder


def read_run(folder: Path) -> None:
    from tersor.report.account import account_of_run, plan_to_show, study_facts
    from tersor.report.front import front_points
    from tersor.steps import limit_of, open_run, planner_of

    run = open_run(folder)
    try:
        study_facts(run)
        front_points(planner_of(run), run.get("stored_bytes"), limit=limit_of(run))
        if run.plans():
            account_of_run(run, plan_to_show(run)).as_json()
    finally:
        run.close()


@fuzzed(50)
@given(st.data())
def test_run_of_changed_facts(run_folder: Path, tmp_path: Path, data: st.DataObject) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run_folder, folder, dirs_exist_ok=True)
    with contextlib.closing(sqlite3.connect(folder / "run.db")) as db, db:
        table, key = data.draw(st.sampled_from((("facts", "name"), ("facts", "name"), ("plans", "name"))))
        rows = db.execute(f"SELECT {key}, value FROM {table} ORDER BY {key}").fetchall()
        name, text = data.draw(st.sampled_from(rows))
        value = changed(data.draw, {"value": json.loads(text)}).get("value")
        db.execute(f"UPDATE {table} SET value = ? WHERE {key} = ?", (json.dumps(value), name))
    with refused_or_read():
        read_run(folder)


@fuzzed(30)
@given(st.data())
def test_run_of_changed_bytes(run_folder: Path, tmp_path: Path, data: st.DataObject) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run_folder, folder, dirs_exist_ok=True)
    path = data.draw(st.sampled_from(sorted(p for p in folder.rglob("*") if p.suffix in (".db", ".safetensors"))))
    path.write_bytes(data.draw(spoilt(path.read_bytes())))
    with refused_or_read():
        read_run(folder)


def sound(folder: Path, kind: str) -> bytes:
    """A sound data file of a kind."""
    path = folder / f"sound.{kind}"
    texts = ["one", "two, three", "fünf"]
    if kind == "txt":
        path.write_text("\n".join(texts), encoding="utf8")
    elif kind == "jsonl":
        path.write_text("".join(json.dumps({"text": t, "label": 1}) + "\n" for t in texts))
    elif kind == "csv":
        path.write_text('text,label\none,1\n"two, three",2\n', encoding="utf8")
    elif kind == "npz":
        np.savez_compressed(path, x=np.ones((4, 3), np.float32), y=np.arange(4))
    elif kind == "npy":
        np.save(path, np.ones((4, 3), np.float32))
    elif kind == "safetensors":
        save_file({"x": torch.ones(4, 3)}, path)
    else:
        arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(arrow.table({"text": texts}), path)
    return path.read_bytes()


@pytest.mark.parametrize("kind", ["txt", "jsonl", "csv", "npz", "npy", "safetensors", "parquet"])
def test_data(kind: str, tmp_path: Path) -> None:
    whole, path = sound(tmp_path, kind), tmp_path / f"a.{kind}"

    @fuzzed(40)
    @given(spoilt(whole), st.sampled_from(("", ":text", ":0", ":7")))
    def check(content: bytes, column: str) -> None:
        path.write_bytes(content)
        with refused_or_read():
            assert len(read_data(f"{path}{column}")) > 0
        if kind in ("csv", "jsonl"):
            with refused_or_read():
                read_pairs(path)

    check()
