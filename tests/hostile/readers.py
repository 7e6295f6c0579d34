"""Every reader of files, as a function of the bytes of one file, with sound ones to spoil.

A reader here is made in a folder of its own, in which it writes the bytes and reads them as a command would.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import sqlite3
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from changing import refused_or_read
from safetensors.torch import save, save_file
from torch import nn

from tersor.build.artifact import empty_operators, install_empty, read_record
from tersor.build.fits import load_fit
from tersor.coding import decode, encode, stream
from tersor.coding.stream import Coded
from tersor.coding.trellis import Trellis
from tersor.curves.draw import site_metrics
from tersor.data import read_data, read_pairs
from tersor.export.export import RECORD as EXPORT
from tersor.export.export import _check_target
from tersor.foreign import Row, check, parse_json, read_header
from tersor.forms import FORMS, as_values
from tersor.models.config import model_class, read_config
from tersor.models.files import open_checkpoint, read_tensors
from tersor.models.huggingface import _pooling
from tersor.models.passage import Spool
from tersor.models.sites import Site, walk
from tersor.observe.store import captured_share, load_metrics, load_output_metric
from tersor.report.account import account_of_artifact, account_of_run, plan_to_show, study_facts
from tersor.report.front import front_points
from tersor.report.tables import account_tables
from tersor.run import Run
from tersor.run.listing import runs_under
from tersor.steps import limit_of, open_run, plan_named, planner_of, study

SHAPE = (64, 72)
TEXTS = ["one", "two, three", "f\u00fcnf"]
LADDER = {"int": [{"bits": 2, "group_size": 32}, {"bits": 4, "group_size": 32}]}
DAMPING = {"inputs": 0.03, "gradients": 0.3, "frequencies": 0.3}
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


@dataclass(frozen=True)
class Reader:
    """What reads the bytes of a file, sound ones, and what they are: `json`, `safetensors`, or `bytes`."""

    read: Callable[[bytes], Any]
    seeds: tuple[bytes, ...]
    kind: str = "bytes"


Make = Callable[[Path], Reader]
READERS: dict[str, Make] = {}


def reader(make: Make) -> Make:
    READERS[make.__name__] = make
    return make


def of_file(path: Path, read: Callable[[], Any], seeds: tuple[bytes, ...], kind: str = "bytes") -> Reader:
    """A reader of one file; what lies beside it stays."""

    def run(content: bytes) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        read()

    return Reader(run, seeds, kind)


def encoded(*values: Any) -> tuple[bytes, ...]:
    return tuple(json.dumps(value).encode() for value in values)


def ladder(name: str) -> list[dict[str, Any]]:
    """A few settings of a form, for a weight of the shape or of a kernel."""
    found = [s for shape in (SHAPE, (256, 512), (64, 576)) for s in FORMS[name].settings(shape)]
    return [as_values(setting) for setting in found[:3]]


def site() -> Site:
    return walk(nn.Sequential(nn.Linear(SHAPE[1], SHAPE[0])), minimum=0).sites[0]


# Forms of files.


@reader
def json_text(folder: Path) -> Reader:
    return Reader(lambda content: parse_json(content, "it"), (b'{"a": [1, -2.5e3, null, "b\\u00e9"]}',), "json")


@reader
def safetensors(folder: Path) -> Reader:
    path = folder / "a.safetensors"
    tensors = {"a": torch.ones(3, 4), "b": torch.zeros(2, dtype=torch.int16), "c": torch.ones(0).int()}

    def read() -> None:
        found = read_header(path)
        assert sum(part.stop - part.start for part in found.values()) < path.stat().st_size
        shapes = {name: tuple(tensor.shape) for name, tensor in read_tensors(path).items()}
        assert shapes == {name: part.shape for name, part in found.items()}
        open_checkpoint(path).refuse_empty()

    return of_file(path, read, (save(tensors, {"a": "b"}),), "safetensors")


@reader
def coded(folder: Path) -> Reader:
    """With checksums that are right whatever the bytes are."""
    codes = np.rint(np.random.default_rng(0).normal(0, 2, (9, 20))).astype(np.int32)
    codes[3, 4] = 100_000

    def unchecked(reader: Any, _: str) -> None:
        reader.take(4)

    def read(content: bytes) -> None:
        with patch.object(stream._Reader, "check", unchecked):
            decode(content, (9, 20))

    return Reader(read, tuple(encode(Coded(codes, np.arange(9), np.arange(20), 4), chunk) for chunk in (40, 1 << 20)))


@reader
def trellis(folder: Path) -> Reader:
    """The stream without its checksum, which is put behind it."""
    head = struct.pack("<4sIIBBH" + "hH" * 4, b"TST1", 6, 6, 1, 0, 0, *(64, 1) * 4)
    whole = head + bytes(4 * (-(-6 * 5 // 8))) + bytes(40)
    return Reader(lambda body: Trellis.from_bytes(body + struct.pack("<I", zlib.crc32(body)), (6, 6)), (whole,))


# A folder of a model.


@reader
def index(folder: Path) -> Reader:
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("a", "b"):
        save_file({name: torch.ones(2)}, folder / f"{name}.safetensors")
    places = {"metadata": {}, "weight_map": {"a": "a.safetensors", "b": "b.safetensors"}}
    path = folder / "model.safetensors.index.json"
    return of_file(path, lambda: open_checkpoint(folder).refuse_empty(), encoded(places), "json")


@reader
def config(folder: Path) -> Reader:
    """What is read of it before transformers reads it."""
    sound = {
        "architectures": ["BertForSequenceClassification"], "model_type": "bert", "num_hidden_layers": 2,
        "id2label": {"0": "a", "1": "b"}, "problem_type": "regression", "attn_implementation": "sdpa",
        "quantization_config": {"quant_method": "tersor"}, "text_config": {"num_attention_heads": 4},
    }  # fmt: skip
    return of_file(folder / "config.json", lambda: model_class(folder, read_config(folder)), encoded(sound), "json")


@reader
def pooling(folder: Path) -> Reader:
    path = folder / "1_Pooling" / "config.json"
    return of_file(path, lambda: _pooling(folder), encoded({"pooling_mode_cls_token": True}), "json")


# An artifact.


@reader
def record(folder: Path) -> Reader:
    def read() -> None:
        read_record(folder)
        account = account_of_artifact(folder)
        json.dumps(account.as_json())
        account_tables(account)

    return of_file(folder / "tersor.json", read, encoded(RECORD), "json")


@reader
def record_of_an_export(folder: Path) -> Reader:
    path = folder / EXPORT
    return of_file(path, lambda: _check_target(folder, "gptq"), encoded({"target": "gptq"}), "json")


@reader
def layout(folder: Path) -> Reader:
    """The sites of an artifact, as `config.json` and `tersor.json` have them."""
    rounding = {"format": "int8", "scale": "token", "shift": False, "dither": False}
    site = {"form": "int", "setting": {"bits": 4, "group_size": 32}, "places": [["0", "weight"]]}

    def read(content: bytes) -> None:
        install_empty(nn.Sequential(nn.Linear(SHAPE[1], SHAPE[0])), parse_json(content, "it"))

    return Reader(read, encoded({"0": site}, {"0": {**site, "activations": {"0": rounding}}}), "json")


@reader
def setting(folder: Path) -> Reader:
    at = site()

    def read(content: bytes) -> None:
        name, values = check(parse_json(content, "it"), Row((str, {str: object})), "it")
        for operator in empty_operators("a", at, name, values):
            assert operator.nbytes <= 8 * SHAPE[0] * SHAPE[1] + (1 << 16)

    return Reader(read, encoded(*([name, values] for name in FORMS for values in ladder(name))), "json")


# A run.


def studied(folder: Path) -> Path:
    """A study of a small module in memory, with a plan and a fit."""
    from tersor.steps import build_plan

    run = folder / "run"
    if not run.exists():
        torch.manual_seed(0)
        data = [torch.randn(8, 64) for _ in range(5)]
        options: dict[str, Any] = {"forms": ("int",), "settings": LADDER, "damping": DAMPING, "gains": False}
        opened = study(nn.Sequential(nn.Linear(64, 64)), data, run, workers=1, **options)
        plan = opened.plan("20%")
        build_plan(opened, plan, folder / "out", workers=1)
        opened.run.enter(plan.name, "*", 0.1, (0.1, 0.0, 0.2))
        opened.run.close()
    return run


def show(run_folder: Path) -> None:
    """All that is shown of a run without its model."""
    runs_under(run_folder)
    run = open_run(run_folder)
    try:
        study_facts(run)
        run.seconds_by_form()
        run.ledger()
        front_points(planner_of(run), run.get("stored_bytes"), limit=limit_of(run))
        if run.plans():
            account = account_of_run(run, plan_to_show(run))
            json.dumps(account.as_json())
            account_tables(account)
    finally:
        run.close()


@reader
def run_database(folder: Path) -> Reader:
    run = studied(folder)

    def read() -> None:
        (run / "run.db-journal").unlink(missing_ok=True)
        show(run)

    return of_file(run / "run.db", read, ((run / "run.db").read_bytes(),))


def rows_of(database: Path) -> list[Any]:
    """Every value of a run as `[table, row, column, value]`; facts and plans as JSON has them."""
    with contextlib.closing(sqlite3.connect(database)) as db:
        db.row_factory = sqlite3.Row
        return [
            [table, row["rowid"], column, json.loads(row[column]) if column == "value" else row[column]]
            for (table,) in list(db.execute("SELECT name FROM sqlite_master WHERE type = 'table'"))
            for row in list(db.execute(f"SELECT rowid, * FROM {table}"))
            for column in row.keys()[1:]
        ]


@reader
def rows_of_a_run(folder: Path) -> Reader:
    """A run in which a value of a table is another."""
    run = studied(folder)
    whole, sound = (run / "run.db").read_bytes(), rows_of(run / "run.db")
    known = {(table, row, column) for table, row, column, _ in sound}

    def read(content: bytes) -> None:
        found = parse_json(content, "it")
        if not isinstance(found, list) or len(found) != 4 or not any(found[:3] == list(place) for place in known):
            return
        table, row, column, value = found
        plain = isinstance(value, str | float | None) or (isinstance(value, int) and abs(value) < 1 << 62)
        (run / "run.db").write_bytes(whole)
        with contextlib.closing(sqlite3.connect(run / "run.db")) as db, contextlib.suppress(sqlite3.IntegrityError), db:
            given = value if plain and column != "value" else json.dumps(value)
            db.execute(f"UPDATE {table} SET {column} = ? WHERE rowid = ?", (given, row))
        show(run)

    return Reader(read, encoded(*sound), "json")


def of_tensors(folder: Path, name: str, read: Callable[[Run], Any]) -> Reader:
    """A reader of the first file of tensors under a name in a run."""
    run = studied(folder)
    path = min((run / name).rglob("*.safetensors"))

    def opened() -> None:
        found = open_run(run)
        try:
            read(found)
        finally:
            found.close()

    return of_file(path, opened, (path.read_bytes(),), "safetensors")


@reader
def summaries(folder: Path) -> Reader:
    def read(run: Run) -> None:
        (at,) = sites_of(run)
        for kind in ("identity", "diagonal", "input", "output", "kronecker"):
            load_metrics(run, at, kind)
        load_output_metric(run, at)
        captured_share(run, at)
        site_metrics(run, at)

    return of_tensors(folder, "summaries/fit", read)


@reader
def spectra(folder: Path) -> Reader:
    def read(run: Run) -> None:
        limit = limit_of(run)
        assert limit is not None
        limit.divergence(10_000)

    return of_tensors(folder, "spectra", read)


@reader
def fits(folder: Path) -> Reader:
    def read(run: Run) -> None:
        (at,) = sites_of(run)
        load_fit(run, at, plan_named(run, run.plans()[0]).choices[0]).matrices()

    return of_tensors(folder, "fits", read)


def sites_of(run: Run) -> tuple[Site, ...]:
    from tersor.build.layout import Layout

    return Layout.from_json(run.get("layout")).sites


@reader
def worker(folder: Path) -> Reader:
    run = studied(folder)

    def read() -> None:
        runs_under(run)
        found = Run(run)
        try:
            found.worker()
        finally:
            found.close()

    return of_file(run / "worker.json", read, encoded({"pid": 1, "host": "a"}), "json")


def spooled(folder: Path) -> Path:
    """A spool whose work was cut short, with a tree in it; its file."""
    spool = Spool(folder, "key")
    spool.put("a", 0, ({"x": torch.ones(2), "y": None}, [torch.zeros(1), 3, "z"]))
    spool.mark("begun")
    return next(folder.glob("*.safetensors"))


@reader
def spool(folder: Path) -> Reader:
    path = spooled(folder / "spool")
    return of_file(path, lambda: Spool(path.parent, "key").get("a", 0), (path.read_bytes(),), "safetensors")


@reader
def steps_of_a_spool(folder: Path) -> Reader:
    path = folder / "spool" / "done.json"
    return of_file(path, lambda: Spool(path.parent, "key").is_begun, encoded({"key": "key", "done": ["a"]}), "json")


# Data.


def of_data(kind: str, whole: bytes, columns: tuple[str, ...] = ("",)) -> None:
    def make(folder: Path) -> Reader:
        path = folder / f"a.{kind}"

        def read() -> None:
            for column in columns:
                with refused_or_read():
                    assert len(read_data(f"{path}{column}")) > 0

        return of_file(path, read, (whole,), "safetensors" if kind == "safetensors" else "bytes")

    READERS[f"data_{kind}"] = make


def saved(save: Callable[[Any], Any]) -> bytes:
    file = io.BytesIO()
    save(file)
    return file.getvalue()


def parquet() -> bytes:
    import pyarrow
    import pyarrow.parquet

    return saved(lambda file: pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), file))


ROWS = "".join(json.dumps({"text": text, "label": 1}) + "\n" for text in TEXTS).encode()
of_data("txt", "\n".join(TEXTS).encode())
of_data("jsonl", ROWS, ("", ":text", ":7"))
of_data("json", b'"one"\n"two"\n')
of_data("csv", b'text,label\none,1\n"two, three",2\n', ("", ":text", ":0", ":7"))
of_data("npz", saved(lambda file: np.savez_compressed(file, x=np.ones((4, 3), np.float32), y=np.arange(4))))
of_data("npy", saved(lambda file: np.save(file, np.ones((4, 3), np.float32))))
of_data("safetensors", save({"x": torch.ones(4, 3), "label": torch.arange(4)}))
with contextlib.suppress(ImportError):
    of_data("parquet", parquet(), ("", ":text"))


@reader
def pairs_csv(folder: Path) -> Reader:
    path = folder / "a.csv"
    return of_file(path, lambda: read_pairs(path), (b'a,b,1\n"c, d",e,2.5\nf,g,-3\n',))


@reader
def pairs_jsonl(folder: Path) -> Reader:
    path = folder / "a.jsonl"
    return of_file(path, lambda: read_pairs(path), (b'["a", "b", 1]\n["c", "d", 2.5]\n["e", "f", -3]\n',))


@reader
def images(folder: Path) -> Reader:
    from PIL import Image

    whole = saved(lambda file: Image.new("RGB", (4, 3), (1, 2, 3)).save(file, "PNG"))
    return of_file(folder / "images" / "a.png", lambda: read_data(folder / "images"), (whole,))


def made(name: str, folder: Path) -> Reader:
    """A reader with its files in an empty folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return READERS[name](folder)
