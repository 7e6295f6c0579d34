"""Every reader, given noise or a sound file spoiled by chance, gives a value or a TersorError, and nothing else."""

from __future__ import annotations

import json
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("transformers")

from changing import CHANGES, Choose, changed, refused_or_read
from readers import READERS, SHAPE, ladder, made, site

from tersor.build.artifact import empty_operators
from tersor.build.layers import decoded_of
from tersor.coding.trellis import Trellis
from tersor.forms import FORMS
from tersor.models.config import laid_out, model_class, read_config, refuse_too_large
from tersor.models.files import open_checkpoint
from tiny_models import write_model

OWN = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


def fuzzed(examples: int) -> Callable[[Any], Any]:
    """The same examples in every run."""
    return settings(max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=OWN)


def choice(draw: st.DrawFn) -> Choose:
    return lambda options: draw(st.sampled_from(options))


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


@pytest.mark.parametrize("name", READERS)
def test_reader(name: str, tmp_path: Path) -> None:
    reader = made(name, tmp_path / "reader")
    for seed in reader.seeds:
        reader.read(seed)

    @fuzzed(60)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        whole, change = data.draw(st.sampled_from(reader.seeds)), CHANGES.get(reader.kind)
        if change is not None and data.draw(st.sampled_from((True, True, False))):
            content = change(choice(data.draw), whole)
        else:
            content = data.draw(spoilt(whole))
        with refused_or_read():
            reader.read(content)

    check()


NOISE = st.binary(max_size=100) | st.lists(st.sampled_from(list('[]{},:"0123aeE.-\\u')), max_size=60).map(
    lambda letters: "".join(letters).encode()
)


@fuzzed(100)
@given(NOISE)
def test_json(tmp_path: Path, text: bytes) -> None:
    with refused_or_read():
        made("json_text", tmp_path / "reader").read(text)


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
    config = changed(choice(data.draw), json.loads((model / "config.json").read_text()))
    (folder / "config.json").write_text(json.dumps(config))
    with refused_or_read():
        read, checkpoint = read_config(folder), open_checkpoint(folder)
        cls, _ = model_class(folder, read)
        refuse_too_large(folder, laid_out(folder, cls, read, checkpoint), checkpoint)


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
