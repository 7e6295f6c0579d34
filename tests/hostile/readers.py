"""Every reader of files, as a function of the bytes of one file, with sound ones to spoil.

A reader here is made in a folder of its own, in which it writes the bytes and reads them as a command would.
"""

from __future__ import annotations

import contextlib
import io
import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import readers_of_runs  # noqa: F401 - adds its own
import torch
from changing import refused_or_read
from reading import READERS, Reader, encoded, made, of_file, reader
from safetensors.torch import save, save_file
from torch import nn

from tersor.build.artifact import empty_operators, install_empty, read_record
from tersor.coding import decode, encode, stream
from tersor.coding.stream import Coded
from tersor.coding.trellis import Trellis
from tersor.data import read_data, read_pairs
from tersor.export.export import RECORD as EXPORT
from tersor.export.export import _check_target
from tersor.foreign import Row, check, parse_json, read_header
from tersor.forms import FORMS, as_values
from tersor.models.config import model_class, read_config
from tersor.models.files import open_checkpoint, read_tensors
from tersor.models.huggingface import _pooling
from tersor.models.sites import Site, walk
from tersor.report.account import account_of_artifact
from tersor.report.tables import account_tables

SHAPE = (64, 72)
TEXTS = ["one", "two, three", "f\u00fcnf"]
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


__all__ = ["READERS", "SHAPE", "ladder", "made", "site"]
