"""A model that is read on demand is studied, built and judged to the byte as one in memory."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

import tersor
from tersor import TersorError
from tersor.cli import app
from tersor.models import open_model
from tersor.models.files import write_tensors
from tersor.models.sites import walk
from tersor.steps import build_plan, compress, judge_artifact, open_study, reopen, study
from tersor.steps.memory import Memory
from tiny_models import draw_model, token_batches

FORMS = ("coded", "trellis", "lowrank", "int+lowrank")


@pytest.mark.parametrize(
    ("name", "form"), [*(("llama-tied", form) for form in FORMS), ("gpt2", "int"), ("gemma", "int"), ("bert", "int")]
)
def test_artifacts_are_those_of_a_model_in_memory(name: str, form: str, quick: dict[str, Any], tmp_path: Path) -> None:
    draw_model(name, layers=2).save_pretrained(tmp_path / "model")
    options = {**quick, "forms": (form,), "settings": None}
    outs, found = [tmp_path / "whole", tmp_path / "demand"], []
    for out, memory in zip(outs, (None, "4GB"), strict=True):
        run = out.with_suffix(".run")
        opened = study(tmp_path / "model", token_batches(name, 5), run, memory=memory, **options)
        build_plan(opened, opened.plan("30bits" if "+" in form else "50%"), out, workers=1)
        original = open_study(tmp_path / "model", run, memory=memory).model
        found.append(judge_artifact(original, out, token_batches(name, 2)).divergence)
    whole, demand = (out / "model.safetensors" for out in outs)
    assert whole.read_bytes() == demand.read_bytes()
    assert found[1].value == pytest.approx(found[0].value, rel=1e-3)  # trellis: rotations in another order


def test_an_artifact_is_loaded_on_demand(tmp_path: Path, quick: dict[str, Any]) -> None:
    draw_model("llama-tied", layers=3).save_pretrained(tmp_path / "model")
    opened = study(tmp_path / "model", token_batches(count=5), tmp_path / "run", **quick)
    build_plan(opened, opened.plan("30%"), tmp_path / "out", workers=1)
    module = tersor.load(tmp_path / "out", on_demand=True)
    resident = [t for t in (*module.parameters(), *module.buffers()) if not t.is_meta]
    assert sum(t.numel() for t in resident) < 100
    batch = token_batches()[0]
    with torch.no_grad():
        assert torch.equal(module(**batch).logits, tersor.load(tmp_path / "out")(**batch).logits)
    with pytest.raises(TersorError, match="stay as they are"):
        tersor.load(tmp_path / "out", on_demand=True, mode="dense")


@pytest.mark.parametrize("form", ["int", "codebook", "float", "sparse", *FORMS])
def test_what_ran_leaves_nothing_in_memory(form: str, quick: dict[str, Any], tmp_path: Path) -> None:
    draw_model("llama-tied", layers=2).save_pretrained(tmp_path / "model")
    options = {**quick, "forms": (form,), "settings": None}
    opened = study(tmp_path / "model", token_batches(count=5), tmp_path / "run", **options)
    build_plan(opened, opened.plan("30bits" if "+" in form else "50%"), tmp_path / "out", workers=1)
    module, batch = tersor.load(tmp_path / "out", on_demand=True), token_batches()[0]
    before = tensors()
    with torch.no_grad():
        module(**batch, use_cache=False)
    assert sum(t.untyped_storage().nbytes() for key, t in tensors().items() if key not in before) < 100


def tensors() -> dict[int, torch.Tensor]:
    """All tensors that are in memory, by where they lie there."""
    gc.collect()
    found = [t for t in gc.get_objects() if type(t) in (torch.Tensor, torch.nn.Parameter) and not t.is_meta]
    return {t.untyped_storage().data_ptr(): t for t in found}


FACTORY = """
from torch import nn

def net():
    return nn.Sequential(*[nn.Linear(64, 64) for _ in range(4)])
"""


def test_a_module_of_its_own(tmp_path: Path, quick: dict[str, Any]) -> None:
    (tmp_path / "net.py").write_text(FACTORY)
    torch.manual_seed(0)
    save_file(
        torch.nn.Sequential(*[torch.nn.Linear(64, 64) for _ in range(4)]).state_dict(), tmp_path / "w.safetensors"
    )
    spec, batches = f"{tmp_path / 'net.py'}:net", [torch.randn(8, 64) for _ in range(5)]
    values = []
    for memory in (None, "4GB"):
        run, out = tmp_path / f"run-{memory}", tmp_path / f"out-{memory}"
        opened = study(spec, batches, run, weights=tmp_path / "w.safetensors", divergence="mse", memory=memory, **quick)
        plan = opened.plan("40%")
        opened.run.close()
        build_plan(reopen(run, memory=memory), plan, out, workers=1)
        original = open_study(spec, run, weights=tmp_path / "w.safetensors", divergence="mse", memory=memory).model
        values.append(judge_artifact(original, out, batches[:2]).divergence.value)
    assert values[0] == values[1] > 0


def test_what_needs_the_model_in_memory_is_refused(tmp_path: Path, quick: dict[str, Any]) -> None:
    draw_model("llama-tied", layers=2).save_pretrained(tmp_path / "model")
    opened = study(tmp_path / "model", token_batches(count=5), tmp_path / "run", memory="4GB", **quick)
    with pytest.raises(TersorError, match="read on demand"):
        build_plan(opened, opened.plan("30%"), tmp_path / "out", activations="int8", calibration=token_batches())
    assert not (tmp_path / "out").exists()
    for option in ({"sequential": True}, {"activations": "int8"}, {"latency_budget": "80%"}):
        with pytest.raises(TersorError, match=r"read (on demand|from disk)"):
            compress(tmp_path / "model", token_batches(), "50%", tmp_path / "out", memory="4GB", **option)
    assert not (tmp_path / "out.run").exists()


def test_a_file_that_is_damaged_meanwhile_is_named(tmp_path: Path) -> None:
    draw_model("llama-tied", layers=2).save_pretrained(tmp_path / "model")
    model = open_model(tmp_path / "model", on_demand=True)
    (tmp_path / "model" / "model.safetensors").write_bytes(b"gone")
    with pytest.raises(TersorError, match=r"model\.safetensors changed since it was opened"):
        model.outputs(token_batches()[0])


def test_too_little_memory_is_refused_with_what_it_takes(tmp_path: Path, quick: dict[str, Any]) -> None:
    draw_model("llama-tied", layers=2).save_pretrained(tmp_path / "model")
    with pytest.raises(TersorError, match=r"--memory allows 0\.1 GB, but fitting"):
        study(tmp_path / "model", token_batches(count=5), tmp_path / "run", memory="100MB", **quick)
    assert not (tmp_path / "run").exists()
    with pytest.raises(TersorError, match="is no number of bytes"):
        Memory.of("40%")


def test_less_memory_means_fewer_processes_and_smaller_batches(tmp_path: Path) -> None:
    draw_model("llama-tied", layers=2).save_pretrained(tmp_path / "model")
    sites = open_study(tmp_path / "model", tmp_path / "run").sites
    found = [Memory(n << 30).workers(sites, 16, ("coded",), "kronecker") for n in (1, 4, 64)]
    assert found == sorted(found) and found[0] == 1 and found[-1] == 16
    found = [Memory((512 << 20) + n).batch_size(sites, 64, 256, True) for n in (20 << 20, 60 << 20, 1 << 30)]
    assert found == sorted(found) and 1 <= found[0] < found[-1] == 64


def test_integers_take_less_memory_while_they_are_fitted() -> None:
    (site,) = walk(nn.Sequential(nn.Linear(11008, 4096, bias=False))).sites
    found = {form: Memory.of("10GB").workers([site], 16, (form,), "kronecker") for form in ("int", "coded")}
    assert found == {"int": 2, "coded": 1}
    assert Memory.of("6GB").workers([site], 16, ("int",), "kronecker") == 1
    with pytest.raises(TersorError, match=r"--memory allows 6\.0 GB, but fitting 0 takes up to 7\.1 GB"):
        Memory.of("6GB").workers([site], 16, ("coded",), "kronecker")


def test_gains_are_those_of_a_model_in_memory(tmp_path: Path, quick: dict[str, Any]) -> None:
    draw_model("llama-tied", layers=2).save_pretrained(tmp_path / "model")
    found = []
    for memory in (None, "4GB"):
        run = tmp_path / f"run-{memory}"
        opened = study(tmp_path / "model", token_batches(count=5), run, memory=memory, **{**quick, "gains": True})
        found.append([opened.run.get(f"gain/{site.name}") for site in opened.sites])
        assert not (run / "outputs").exists() and not (run / "spool").exists()
    assert found[0] == found[1] and all(found[0])


def test_judging_takes_no_larger_batches_than_the_memory_allows(tmp_path: Path, quick: dict[str, Any]) -> None:
    draw_model("llama-tied", layers=2).save_pretrained(tmp_path / "model")
    opened = open_study(tmp_path / "model", tmp_path / "run", memory="600MB")
    assert opened.batch_size(4096, 256, gradients=False) < 4096
    opened.run.close()
    opened = study(tmp_path / "model", token_batches(count=5), tmp_path / "other", **quick)
    build_plan(opened, opened.plan("30%"), tmp_path / "out", workers=1)
    asked = ["judge", str(tmp_path / "out"), "--model", str(tmp_path / "model"), "--data", "none.txt", "--memory"]
    found = CliRunner().invoke(app, [*asked, "40%"])
    assert found.exit_code == 2 and "is no number of bytes" in found.output
    found = CliRunner().invoke(app, [*asked, "100MB"])
    assert found.exit_code == 2 and "--memory allows 0.1 GB" in found.output


def test_tensors_written_one_by_one_are_the_file_that_safetensors_writes(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(3, 5), "b.c": torch.randn(7).bfloat16(), "d": torch.arange(4), "e": torch.tensor(1.0),
        "é": torch.ones(3, dtype=torch.bool), "f": torch.zeros(2, 3, dtype=torch.uint8), "g": torch.randn(2).half(),
    }  # fmt: skip
    save_file(tensors, tmp_path / "theirs.safetensors", {"format": "pt"})
    entries = [(name, tuple(t.shape), t.dtype) for name, t in tensors.items()]
    write_tensors(tmp_path / "ours.safetensors", entries, tensors.__getitem__)
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()
    with pytest.raises(TersorError, match="d has shape"):
        write_tensors(tmp_path / "x.safetensors", entries, lambda _: torch.zeros(2))
    assert not (tmp_path / "x.safetensors").exists()
