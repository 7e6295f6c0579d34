"""Bad input ends in one sentence that names the file, site or option, and leaves nothing half-written."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import tersor
from tersor.errors import TersorError
from tersor.models import files
from tersor.steps import build_plan, compress, open_study, study

Maker = Callable[..., Path]
Tokens = Callable[..., list[Any]]


def sentence(action: Callable[[], object], *named: str) -> str:
    """What `action` raises: one TersorError of one line that holds every name."""
    with pytest.raises(TersorError) as caught:
        action()
    text = str(caught.value)
    assert "\n" not in text and len(text) < 700 and text.endswith((".", "?"))
    assert all(name in text for name in named), text
    return text


def truncate(path: Path, share: float = 0.7) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


def change_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def change_weights(folder: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    changed = change(tensors.pop(name).clone())
    save_file(tensors if changed is None else {**tensors, name: changed}, path, {"format": "pt"})


WEIGHT = "model.layers.0.mlp.up_proj.weight"


def nan(weight: torch.Tensor) -> torch.Tensor:
    weight[3, 5] = float("nan")
    return weight


SPOILED: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "truncated": (lambda f: truncate(f / "model.safetensors"), ("model.safetensors", "damaged")),
    "header cut": (lambda f: truncate(f / "model.safetensors", 0.001), ("model.safetensors", "damaged")),
    "empty file": (lambda f: (f / "model.safetensors").write_bytes(b""), ("model.safetensors", "damaged")),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), ("mistral", "no model.safetensors")),
    "pickles": (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), ("pickles", "safetensors")),
    "no config": (lambda f: (f / "config.json").unlink(), ("no config.json",)),
    "broken config": (lambda f: (f / "config.json").write_text("{"), ("config.json", "not valid JSON")),
    "list config": (lambda f: (f / "config.json").write_text("[]"), ("config.json", "JSON object")),
    "wrong shape": (lambda f: change_config(f, intermediate_size=80), ("mistral", "mlp")),
    "unknown model": (lambda f: (f / "config.json").write_text('{"a": 1}'), ("config.json", "neither")),
    "quantised": (lambda f: change_config(f, quantization_config={"quant_method": "gptq"}), ("quantised", "gptq")),
    "NaN": (lambda f: change_weights(f, WEIGHT, nan), (WEIGHT, "NaN")),
    "lacking": (lambda f: change_weights(f, WEIGHT, lambda _: None), (WEIGHT, "lacks")),
}


@pytest.mark.parametrize("how", SPOILED)
def test_spoiled_checkpoints(how: str, make_checkpoint: Maker, tokens: Tokens, quick: Any, tmp_path: Path) -> None:
    folder = make_checkpoint("mistral")
    spoil, named = SPOILED[how]
    spoil(folder)
    before = sorted(tmp_path.rglob("*"))
    sentence(lambda: compress(folder, tokens(), "5bits", tmp_path / "out", **quick), *named)
    assert sorted(tmp_path.rglob("*")) == before


def test_an_index_that_lies(make_checkpoint: Maker) -> None:
    folder = make_checkpoint("mistral")
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    index.write_text(json.dumps({"weight_map": {}}))
    sentence(lambda: tersor.open_model(folder), "both model.safetensors and")
    single.unlink()
    for text, named in (
        ("{", "not valid JSON"),
        ("[]", "not an object"),
        (json.dumps({"weight_map": {"a": "part-2.safetensors"}}), "part-2.safetensors, which is missing"),
        (json.dumps({"weight_map": {"a": "../secret.safetensors"}}), "outside of the folder"),
    ):
        index.write_text(text)
        sentence(lambda: tersor.open_model(folder), named)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"data": []}, ("data is empty",)),
        ({"data": "none.txt"}, ("none.txt", "does not exist")),
        ({"data": torch.zeros(3, 3).numpy()}, ("arrays", "reads text")),
        ({"data": [torch.full((2, 3), 0.5)]}, ("input_ids", "whole numbers")),
        ({"data": [{"x": torch.ones(2, 3)}]}, ("needs `input_ids`",)),
        ({"data": [torch.full((2, 3), 5000)]}, ("batch 1 of the data", "failed")),
        ({"data": ["some text"]}, ("no tokenizer",)),
        ({"forms": ("int", "lowrnk")}, ("'lowrnk'", "'lowrank'")),
        ({"metric": "kroneker"}, ("'kroneker'", "kronecker")),
        ({"divergence": "cosin"}, ("'cosin'", "'cosine'")),
        ({"include": ["nothing.*"]}, ("'nothing.*'", "matches no site")),
        ({"exclude": ["nothing.*"]}, ("'nothing.*'", "matches no site")),
        ({"budget": "much"}, ("'much'",)),
        ({"budget": "0.1%"}, ("out of reach", "the smallest plan takes")),
        ({"budget": None}, ("Give a limit",)),
        ({"model": "nowhere"}, ("nowhere", "neither a model folder")),
        ({"held_out": "gone.txt"}, ("gone.txt", "does not exist")),
        ({"pairs": "gone.csv"}, ("gone.csv", "does not exist")),
        ({"settings": {"int": [{"bits": 9}]}}, ("bits is 9",)),
    ],
    ids=str,
)
def test_bad_options(
    options: dict[str, Any], named: tuple[str, ...], make_checkpoint: Maker, tokens: Tokens, quick: Any, tmp_path: Path
) -> None:
    given: dict[str, Any] = {
        "model": make_checkpoint("mistral"),
        "data": tokens(),
        "budget": "5bits",
        **quick,
        **options,
    }
    sentence(lambda: compress(out=tmp_path / "out", **given), *named)
    assert not (tmp_path / "out").exists()
    assert not [p for p in tmp_path.rglob("*") if p.name.endswith(".tmp")]


def test_data_of_the_wrong_kind_for_a_module(quick: Any, tmp_path: Path) -> None:
    net = nn.Linear(64, 64)
    sentence(lambda: compress(net, ["a text"], "30%", tmp_path / "out", **quick), "holds text", "arrays or batches")
    sentence(lambda: compress(net, [torch.rand(2, 9)], "30%", tmp_path / "out", run=tmp_path / "r", **quick), "batch 1")


class Overflowing(nn.Module):
    """Its inner activations overflow, its outputs do not show it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x) + self.inner(x * 1e38 * 1e38).clamp(-1, 1).nan_to_num()


def test_values_that_are_not_finite_name_their_place(quick: Any, tmp_path: Path) -> None:
    net, data = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), [torch.full((2, 64), float("inf"))]
    sentence(lambda: compress(net, data, "30%", tmp_path / "out", **quick), "outputs for batch 1", "NaN or infinite")
    data = [torch.ones(2, 64)]
    options = {**quick, "run": tmp_path / "run"}
    sentence(lambda: compress(Overflowing(), data, "30%", tmp_path / "out", **options), "NaN or infinite", "at inner")


def test_a_module_with_nothing_to_approximate(quick: Any, tmp_path: Path) -> None:
    sentence(lambda: compress(nn.Linear(4, 4), [torch.rand(2, 4)], "30%", tmp_path / "out", **quick), "4096 entries")


def test_the_run_of_another_model_or_other_data(quick: Any, tmp_path: Path) -> None:
    data = [torch.rand(4, 64) for _ in range(2)]
    net = nn.Linear(64, 64)
    study(net, data, tmp_path / "run", **quick)
    others: list[tuple[Callable[[], object], str]] = [
        (lambda: study(nn.Linear(64, 64), data, tmp_path / "run", **quick), "other model"),
        (lambda: study(net, data[:1], tmp_path / "run", **quick), "other calibration data"),
        (lambda: study(net, data, tmp_path / "run", seed=5, **quick), "other seed (0, not 5)"),
        (lambda: study(net, data, tmp_path / "run", metric="input", **quick), "other metric (kronecker, not input)"),
        (lambda: study(net, data, tmp_path / "run", divergence="mse", **quick), "other divergence (kl, not mse)"),
        (lambda: study(net, data, tmp_path / "run", **{**quick, "damping": {"inputs": 1.0}}), "other damping"),
    ]
    for action, named in others:
        sentence(action, str(tmp_path / "run"), named)


def test_a_lost_summary_is_no_unused_site(quick: Any, tmp_path: Path) -> None:
    net = nn.Linear(64, 64)
    opened = study(net, [torch.rand(4, 64)], tmp_path / "run", **quick)
    plan = opened.plan("30%")
    for path in (tmp_path / "run" / "summaries").rglob("*.safetensors"):
        path.unlink()
    sentence(lambda: build_plan(opened, plan, tmp_path / "out"), "is missing or damaged")
    assert not (tmp_path / "out").exists()


def full_disk(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("what", ["weights", "copy2", "record"])
def test_a_full_disk_leaves_nothing_half_written(
    what: str, existing: bool, make_checkpoint: Maker, tokens: Tokens, quick: Any, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    folder, out = make_checkpoint("mistral"), tmp_path / "out"
    opened = study(folder, tokens(), tmp_path / "run", **quick)
    kept: dict[str, bytes] = {}
    if existing:
        build_plan(opened, opened.plan("6bits"), out)
        kept = {p.name: p.read_bytes() for p in out.iterdir()}
    plan = opened.plan("5bits")
    opened = open_study(folder, tmp_path / "run")
    put = files.written

    def full(path: Path, write: Any) -> None:
        if path.name != "model.safetensors":
            return put(path, write)

        def half(temporary: Path) -> None:
            temporary.write_bytes(b"half of it")
            full_disk()

        return put(path, half)

    if what == "weights":
        monkeypatch.setattr(files, "written", full)
    elif what == "copy2":
        monkeypatch.setattr(files.shutil, "copy2", full_disk)
    else:
        from tersor.build import artifact

        monkeypatch.setattr(artifact, "write_text", full_disk)
    sentence(lambda: build_plan(opened, plan, out), "could not be written", "No space left")
    assert not [p for p in tmp_path.rglob("*") if ".tmp" in p.name]
    if existing:
        assert {p.name: p.read_bytes() for p in out.iterdir()} == kept
        tersor.load(out)
    else:
        assert not out.exists()


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files.write_safetensors(tmp_path / "a" / "x.safetensors", {"x": torch.ones(3)})
    monkeypatch.setattr(files.os, "replace", full_disk)
    sentence(lambda: files.write_safetensors(tmp_path / "a" / "x.safetensors", {"x": torch.zeros(9)}), "x.safetensors")
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["x.safetensors"]
    assert torch.equal(load_file(tmp_path / "a" / "x.safetensors")["x"], torch.ones(3))


@pytest.mark.parametrize("occupied", ["file", "folder"])
def test_what_is_no_artifact_is_not_written_over(
    occupied: str, make_checkpoint: Maker, tokens: Tokens, quick: Any, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    if occupied == "folder":
        out.mkdir()
    (out if occupied == "file" else out / "thesis.txt").write_text("mine")
    sentence(lambda: compress(make_checkpoint("mistral"), tokens(), "5bits", out, **quick), str(out), "no artifact")
    assert (out if occupied == "file" else out / "thesis.txt").read_text() == "mine"


@pytest.fixture
def artifact(make_checkpoint: Maker, tokens: Tokens, quick: Any, tmp_path: Path) -> Path:
    compress(make_checkpoint("mistral"), tokens(), "5bits", tmp_path / "out", **quick)
    return tmp_path / "out"


def without(path: Path, key: str) -> None:
    record = json.loads(path.read_text())
    del record[key]
    path.write_text(json.dumps(record))


OPERATOR = "model.layers.0.mlp.up_proj.operator.codes"
DAMAGED: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "no record": (lambda f: (f / "tersor.json").unlink(), ("no artifact", "tersor.json")),
    "cut record": (lambda f: truncate(f / "tersor.json", 0.5), ("tersor.json", "damaged")),
    "no model": (lambda f: without(f / "tersor.json", "model"), ("tersor.json", "'model'")),
    "no plan": (lambda f: without(f / "tersor.json", "plan"), ("tersor.json", "'plan'")),
    "later version": (
        lambda f: (f / "tersor.json").write_text('{"version": 99, "sites": {}}'),
        ("tersor.json", "version 1"),
    ),
    "cut weights": (lambda f: truncate(f / "model.safetensors"), ("out",)),
    "lost tensor": (lambda f: change_weights(f, OPERATOR, lambda _: None), ("model.safetensors", OPERATOR)),
    "other shape": (lambda f: change_weights(f, OPERATOR, lambda t: t[:, :-1].contiguous()), (OPERATOR,)),
    "cut config": (lambda f: truncate(f / "config.json", 0.5), ("config.json", "not valid JSON")),
}


@pytest.mark.parametrize("how", DAMAGED)
def test_damaged_artifacts(how: str, artifact: Path) -> None:
    damage, named = DAMAGED[how]
    damage(artifact)
    sentence(lambda: tersor.load(artifact), *named)


def test_an_artifact_is_not_compressed_again(artifact: Path, tokens: Tokens, quick: Any, tmp_path: Path) -> None:
    sentence(lambda: compress(artifact, tokens(), "5bits", tmp_path / "more", **quick), "quantised already (tersor)")


def test_an_artifact_is_judged_against_its_own_original(artifact: Path, make_checkpoint: Maker, tokens: Tokens) -> None:
    other = tersor.open_model(make_checkpoint("qwen2"))
    sentence(lambda: tersor.judge_artifact(other, artifact, tokens()), "made from another model")
