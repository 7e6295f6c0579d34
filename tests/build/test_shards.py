"""An artifact in several weight files is the one in a single file, divided: no tensor, no byte of one differs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

import tersor
from tersor import TersorError
from tersor.export import export
from tersor.judge.verify import verify
from tersor.models.files import INDEX, WEIGHTS, open_checkpoint, shards_of
from tersor.steps import build_plan, compress, judge_artifact, open_study, reopen, study
from tiny_models import draw_model, token_batches

SIZE, MOST = "40kB", 40_000


@pytest.fixture
def built(quick: dict[str, Any], tmp_path: Path) -> tuple[Path, Path, Path]:
    """A model, and the same plan of it in one file and in several."""
    draw_model("llama-tied", layers=2).save_pretrained(tmp_path / "model")
    opened = study(tmp_path / "model", token_batches(count=5), tmp_path / "run", **quick)
    plan = opened.plan("60%")
    opened.run.close()
    for name, size in (("whole", None), ("parts", SIZE)):
        build_plan(reopen(tmp_path / "run"), plan, tmp_path / name, workers=1, shard_size=size)
    return tmp_path / "model", tmp_path / "whole", tmp_path / "parts"


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    files = open_checkpoint(folder).files
    return {name: tensor for path in files for name, tensor in load_file(path).items()}


def test_it_is_the_same_model_in_files_of_the_size(built: tuple[Path, Path, Path]) -> None:
    model, whole, parts = built
    checkpoint = open_checkpoint(parts)
    assert len(checkpoint.files) > 2 and not (parts / WEIGHTS).exists()
    tensors = {path: load_file(path) for path in checkpoint.files}
    assert all(path.stat().st_size <= MOST or len(tensors[path]) == 1 for path in checkpoint.files)
    expected, found = tensors_of(whole), tensors_of(parts)
    assert expected.keys() == found.keys() and all(torch.equal(found[k], v) for k, v in expected.items())
    batch = token_batches()[0]
    logits = tersor.load(whole)(**batch).logits
    assert torch.equal(tersor.load(parts)(**batch).logits, logits)
    assert torch.equal(tersor.load(parts, on_demand=True)(**batch).logits, logits)
    assert torch.equal(transformers.AutoModelForCausalLM.from_pretrained(parts)(**batch).logits, logits)
    original = open_study(model, whole.parent / "other").model
    judged = [judge_artifact(original, out, token_batches()) for out in (whole, parts)]
    assert judged[0].divergence == judged[1].divergence
    verify(parts, original, token_batches())


def test_a_build_over_another_leaves_one_of_them(built: tuple[Path, Path, Path], tmp_path: Path) -> None:
    _, whole, parts = built
    for out, size in ((whole, SIZE), (parts, None)):
        opened = reopen(tmp_path / "run")
        build_plan(opened, opened.plan("60%"), out, workers=1, shard_size=size)
        assert (out / INDEX).exists() == (size is not None) != (out / WEIGHTS).exists()
        assert len(list(out.glob("*.safetensors"))) == len(open_checkpoint(out).files)
        verify(out)


def test_the_budget_holds_with_all_headers(quick: dict[str, Any], tmp_path: Path) -> None:
    draw_model("llama-tied", layers=2).save_pretrained(tmp_path / "model")
    for size in ("5kB", "20kB", "1GB"):
        out = tmp_path / size
        made = compress(tmp_path / "model", token_batches(count=5), "60%", out, shard_size=size, **quick)
        files = open_checkpoint(out).files
        stored = sum(path.stat().st_size for path in files)
        assert made.plan.stored == made.weights_bytes == stored <= 0.6 * made.study.stored_bytes
        assert (len(files) == 1) == (size == "1GB")


def test_a_lost_or_changed_part_is_named(built: tuple[Path, Path, Path]) -> None:
    *_, parts = built
    first = sorted(parts.glob("model-*.safetensors"))[0]
    content = first.read_bytes()
    first.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(TersorError, match=f"{first.name} is not the file"):
        verify(parts)
    first.unlink()
    with pytest.raises(TersorError, match=f"{INDEX} names {first.name}, which is missing"):
        tersor.load(parts)


@pytest.mark.parametrize("size", ["20%", "much", "0GB"])
def test_a_size_that_is_none_is_refused_before_the_work(size: str, tmp_path: Path) -> None:
    draw_model("llama-tied", layers=2).save_pretrained(tmp_path / "model")
    with pytest.raises(TersorError, match=size):
        compress(tmp_path / "model", token_batches(), "60%", tmp_path / "out", shard_size=size)
    assert not (tmp_path / "out.run").exists()


def test_dense_exports_in_parts(built: tuple[Path, Path, Path], tmp_path: Path) -> None:
    *_, parts = built
    whole = export(parts, "dense", tmp_path / "dense")
    divided = export(parts, "dense", tmp_path / "divided", shard_size="100kB")
    assert len(open_checkpoint(tmp_path / "divided").files) > 1
    expected, found = tensors_of(tmp_path / "dense"), tensors_of(tmp_path / "divided")
    assert all(torch.equal(found[k], v) for k, v in expected.items())
    assert divided.exported_bytes > whole.exported_bytes


def test_every_tensor_is_in_one_part() -> None:
    entries = [(f"t{n}", (n + 1, 100), torch.float32 if n % 3 else torch.uint8) for n in range(40)]
    for most in (None, 1, 4000, 50_000, 1 << 30):
        shards = shards_of(entries, most)
        assert sorted(e for s in shards for e in s) == sorted(entries) and all(shards)
