"""What is held against a form and what is not; links that may stay; artifacts of a module of one's own, verified."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tersor.errors import TersorError
from tersor.foreign import COUNT, NUMBER, POSITIVE, Row, check, read_header, refuse_links
from tersor.judge.verify import verify
from tersor.models import open_model
from tersor.steps import compress, judge_artifact


@pytest.mark.parametrize(
    ("value", "pattern"),
    [
        (3, COUNT), (0, COUNT), (1, POSITIVE), (-3, int), (2, float), (0.5, float), (float("nan"), NUMBER),
        ("a b", str),
        (None, (str, None)), ([1, 2], [COUNT]), ([], [str]), (["a", 1], Row((str, int))), ({"x": [1]}, {str: [int]}),
        ({"a": 1, "c": None}, {"a": int, "b?": str}), ([[{}]], object),
    ],
)  # fmt: skip
def test_what_has_its_form(value: Any, pattern: Any) -> None:
    assert check(value, pattern, "it") is value


@pytest.mark.parametrize(
    ("value", "pattern", "where"),
    [
        (-1, COUNT, "it is -1, not a count"),
        (True, COUNT, "it is True"),
        (1 << 62, COUNT, "not a count"),
        (0, POSITIVE, "above 0"),
        (1.0, int, "whole number"),
        (True, float, "it is True"),
        (10**400, float, "finite"),
        (float("inf"), float, "finite"),
        ("1", NUMBER, "a number"),
        ("\x1b[2J", str, "printable"),
        ({"a": {"b": [1, "x"]}}, {"a": {"b": [int]}}, "a.b.1 is 'x'"),
        ({}, {"a": int}, "it has no 'a'"),
        (["a"], Row((str, int)), "a list of 2"),
        ([1], (str, None), "printable"),
        ("abc", [str], "not a list"),
    ],
)
def test_what_has_not(value: Any, pattern: Any, where: str) -> None:
    with pytest.raises(TersorError, match="it is damaged") as caught:
        check(value, pattern, "it")
    assert where in str(caught.value)


def test_headers_say_what_the_library_wrote(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(3, 4), "b": torch.zeros(2, dtype=torch.int16), "c": torch.ones(0, 3).bfloat16()}
    save_file(tensors, tmp_path / "a.safetensors", {"format": "pt", "text": "of\nlines, ünïcode"})
    found = read_header(tmp_path / "a.safetensors")
    assert {name: part.shape for name, part in found.items()} == {name: tuple(t.shape) for name, t in tensors.items()}
    assert {name: part.dtype for name, part in found.items()} == {"a": "F32", "b": "I16", "c": "BF16"}


def test_links_of_a_cache_may_stay(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "1f"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (blobs / "abc").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/abc")
    (snapshot / "inside.json").symlink_to("config.json")
    refuse_links(snapshot)
    (tmp_path / "elsewhere").write_text("{}")
    (snapshot / "outside.json").symlink_to("../../../elsewhere")
    with pytest.raises(TersorError, match=r"outside\.json is a link that leads out"):
        refuse_links(snapshot)


def test_an_artifact_of_a_module_is_verified_with_it(tmp_path: Path, quick: dict[str, Any]) -> None:
    data = [torch.randn(16, 64) for _ in range(4)]
    made, out = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), tmp_path / "out"
    state = {name: tensor.clone() for name, tensor in made.state_dict().items()}
    compress(made, data, "30%", out, **quick)

    def original() -> Any:
        module = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
        module.load_state_dict(state)
        return open_model(module)

    assert [one.name for one in verify(out)] == ["hashes", "settings"]
    assert [one.name for one in verify(out, original())] == ["hashes", "settings", "operators"]
    with pytest.raises(TersorError, match="was not judged"):
        verify(out, original(), data)
    found = judge_artifact(original(), out, data)
    last = verify(out, original(), data)[-1]
    assert last.name == "divergence" and last.found.startswith(f"{found.divergence.value:.4g}")
    with pytest.raises(TersorError, match="is not the data"):
        verify(out, original(), data[:-1])
    record = json.loads((out / "tersor.json").read_text())
    (out / "tersor.json").write_text(json.dumps({**record, "weights_bytes": record["weights_bytes"] + 1}))
    with pytest.raises(TersorError, match=r"takes .* bytes, but weights_bytes"):
        verify(out)
