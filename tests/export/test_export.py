"""Exports: plain folders that load without Tersor, and packed integers as other stacks read them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import tersor
from tersor.build import operators_of
from tersor.errors import TersorError
from tersor.export import export
from tersor.export.export import RECORD, _check_target
from tersor.export.grids import words
from tersor.forms import Operator, as_values
from tersor.steps import compress

transformers = pytest.importorskip("transformers")
Maker = Callable[..., Path]
GROUPS = {"bits": 4, "group_size": 32, "scale_bits": 16, "zeros": "whole"}
ROWS = {"bits": 8, "group_size": None, "symmetric": True, "scale_bits": 16, "zeros": "whole"}
NARROW = {"bits": 3, "group_size": 32, "scale_bits": 16, "zeros": "whole"}
TABLES = {"gpt2": ["*wte", "*wpe"], "t5": ["shared"]}
AUTO = {
    "llama-tied": "AutoModelForCausalLM", "mistral": "AutoModelForCausalLM", "gpt2": "AutoModelForCausalLM",
    "t5": "AutoModelForSeq2SeqLM", "bert": "AutoModel", "mixtral": "AutoModelForCausalLM",
    "gemma": "AutoModelForCausalLM",
}  # fmt: skip


@pytest.fixture
def artifact(
    make_checkpoint: Maker, tokens: Callable[..., Any], quick: dict[str, Any], tmp_path: Path
) -> Callable[..., Path]:
    """An artifact of a tiny model under some settings of `portable`, its tables left alone."""

    def make(
        name: str, *settings: Any, budget: str = "5.6bits", dtype: torch.dtype = torch.float32, **options: Any
    ) -> Path:
        out, source = tmp_path / "out", make_checkpoint(name, dtype)
        given = {"forms": ("portable",), "settings": {"portable": list(settings)}, **options}
        given.setdefault("exclude", TABLES.get(name, ["*embed*"]))
        compress(source, tokens(name), budget, out, **{**quick, **given})
        return out

    return make


def outputs(module: nn.Module, batch: Any) -> Tensor:
    with torch.no_grad():
        result = module(**batch) if isinstance(batch, dict) else module(batch)
    if isinstance(result, Tensor):
        return result
    found: Tensor = result.logits if hasattr(result, "logits") else result.last_hidden_state
    return found


def opened(name: str, folder: Path, **options: Any) -> nn.Module:
    found: nn.Module = getattr(transformers, AUTO[name]).from_pretrained(folder, **options)
    return found.eval()


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> bool:
    return bool((found.float() - expected.float()).norm() < tolerance * expected.float().norm())


@pytest.mark.parametrize("form", ["int", "coded"])
@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "t5", "bert", "mixtral", "gemma"])
def test_dense_loads_without_tersor(
    name: str, form: str, make_checkpoint: Maker, tokens: Callable[..., Any], quick: dict[str, Any], tmp_path: Path
) -> None:
    source = make_checkpoint(name)
    compress(source, tokens(name), "40%", tmp_path / "out", **{**quick, "forms": (form,)})
    found = export(tmp_path / "out", "dense", tmp_path / "dense")
    batch = tokens(name)[0]
    expected = outputs(tersor.load(tmp_path / "out"), batch)
    assert close(outputs(opened(name, tmp_path / "dense"), batch), expected)
    torch.save(batch, tmp_path / "batch.pt")
    code = f"""
import sys, torch, transformers
model = transformers.{AUTO[name]}.from_pretrained({str(tmp_path / "dense")!r}).eval()
with torch.no_grad():
    result = model(**torch.load({str(tmp_path / "batch.pt")!r}))
assert "tersor" not in sys.modules
torch.save(result[0] if not hasattr(result, "logits") else result.logits, {str(tmp_path / "found.pt")!r})
"""
    if (name, form) == ("llama-tied", "coded"):
        subprocess.run([sys.executable, "-c", code], check=True)
        assert close(torch.load(tmp_path / "found.pt"), expected)
    original, dense = (load_file(p / "model.safetensors") for p in (source, tmp_path / "dense"))
    assert {k: (v.shape, v.dtype) for k, v in dense.items()} == {k: (v.shape, v.dtype) for k, v in original.items()}
    assert found.exported_bytes == (tmp_path / "dense" / "model.safetensors").stat().st_size
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dense_in_a_chosen_dtype(
    dtype: torch.dtype, artifact: Callable[..., Path], tokens: Any, tmp_path: Path
) -> None:
    out = artifact("mistral", GROUPS)
    export(out, "dense", tmp_path / "dense", dtype=dtype)
    stored = load_file(tmp_path / "dense" / "model.safetensors")
    assert {v.dtype for v in stored.values()} == {dtype}
    batch, weight = tokens()[0], "model.layers.0.mlp.up_proj.weight"
    assert close(outputs(opened("mistral", tmp_path / "dense"), batch), outputs(tersor.load(out), batch), 0.05)
    small: Any = tersor.load(out)
    assert torch.equal(stored[weight], small.model.layers[0].mlp.up_proj.weight.to(dtype))


def test_dense_keeps_the_dtype_of_the_original(artifact: Callable[..., Path], tokens: Any, tmp_path: Path) -> None:
    export(artifact("bert", GROUPS, dtype=torch.bfloat16), "dense", tmp_path / "dense")
    assert {v.dtype for v in load_file(tmp_path / "dense" / "model.safetensors").values()} == {torch.bfloat16}


def test_dense_of_a_module(
    conv_net: Callable[[], nn.Module], images: Callable[..., list[Any]], quick: dict[str, Any], tmp_path: Path
) -> None:
    batches = images()
    compress(conv_net(), batches, "30%", tmp_path / "out", **quick)
    export(tmp_path / "out", "dense", tmp_path / "dense", model=conv_net)
    module = conv_net().eval()
    module.load_state_dict(load_file(tmp_path / "dense" / "model.safetensors"))
    small = tersor.load(tmp_path / "out", model=conv_net)
    assert close(outputs(module, batches[0]), outputs(small, batches[0]))
    with pytest.raises(TersorError, match="export it to dense"):
        export(tmp_path / "out", "gptq", tmp_path / "gptq", model=conv_net)


@pytest.mark.parametrize("settings", [(GROUPS,), (ROWS,), (GROUPS, ROWS)])
@pytest.mark.parametrize("name", ["llama-tied", "t5", "bert"])
def test_compressed_tensors_reads_it(
    name: str, settings: Any, artifact: Callable[..., Path], tokens: Callable[..., Any], tmp_path: Path
) -> None:
    pytest.importorskip("compressed_tensors")
    out = artifact(name, *settings, budget="5.6bits" if len(settings) == 1 and GROUPS in settings else "9bits")
    found = export(out, "compressed-tensors", tmp_path / "packed")
    plainly = {"quantization_config": transformers.CompressedTensorsConfig(dequantize=True)} if name == "t5" else {}
    module = opened(name, tmp_path / "packed", **plainly)
    batch = tokens(name)[0]
    assert close(outputs(module, batch), outputs(tersor.load(out), batch))
    assert {f"{n}.operator" for n in (*found.packed, *found.dense)} == set(operators_of(tersor.load(out)))
    stored = load_file(tmp_path / "packed" / "model.safetensors")
    assert all(f"{n}.weight_packed" in stored and f"{n}.weight" not in stored for n in found.packed)
    written = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    held, ignored = set(found.packed), set(written["ignore"])
    linear = {n for n, m in tersor.load(out, mode="dense").named_modules() if isinstance(m, nn.Linear)}
    assert held | ignored == linear and not held & ignored
    assert len(written["config_groups"]) == len({as_values(o.setting)["bits"] for o in packed(out, found.packed)})


def packed(out: Path, names: Iterable[str]) -> list[Operator]:
    operators = operators_of(tersor.load(out))
    return [operators[f"{name}.operator"] for name in names]


def gptq_weight(tensors: dict[str, Tensor], name: str, bits: int, less: int) -> Tensor:
    """The weight (out, in) by the published description of the format, one code at a time, bit by bit.

    Words hold codes from their lowest bit on; where 32 is no multiple of `bits`, codes go across the ends of words.
    A weight is `scale * (code - (zero + less))`, of the group in `g_idx`; `less` is 1 in version 1.
    """
    qweight, qzeros = (tensors[f"{name}.{part}"].numpy().view(np.uint32) for part in ("qweight", "qzeros"))
    scales, groups = tensors[f"{name}.scales"].float().numpy(), tensors[f"{name}.g_idx"].numpy()

    def code(stream: np.ndarray, number: int) -> int:
        whole = sum(int(word) << (32 * k) for k, word in enumerate(stream))
        return (whole >> (number * bits)) & (2**bits - 1)

    inputs, outputs = len(groups), qweight.shape[1]
    weight = np.empty((outputs, inputs), np.float32)
    zeros = [[code(qzeros[g], o) + less for o in range(outputs)] for g in range(len(qzeros))]
    for o in range(outputs):
        column = sum(int(word) << (32 * k) for k, word in enumerate(qweight[:, o]))
        for i in range(inputs):
            g = groups[i]
            weight[o, i] = scales[g, o] * (((column >> (i * bits)) & (2**bits - 1)) - zeros[g][o])
    return torch.from_numpy(weight)


@pytest.mark.parametrize("settings", [(GROUPS,), (ROWS,), (NARROW,), (GROUPS, ROWS)])
@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "t5"])
def test_gptq_is_as_published(name: str, settings: Any, artifact: Callable[..., Path], tmp_path: Path) -> None:
    out = artifact(name, *settings, budget="5.6bits" if len(settings) == 1 and GROUPS in settings else "9bits")
    found = export(out, "gptq", tmp_path / "gptq")
    tensors = load_file(tmp_path / "gptq" / "model.safetensors")
    written = json.loads((tmp_path / "gptq" / "quantize_config.json").read_text())
    assert json.loads((tmp_path / "gptq" / "config.json").read_text())["quantization_config"] == written
    small = tersor.load(out)
    less = {"gptq": 1, "gptq_v2": 0}[written["checkpoint_format"]]
    assert (less == 1) == all(operator.setting.symmetric for operator in packed(out, found.packed))
    for site in found.packed:
        own = [v for k, v in written.get("dynamic", {}).items() if k == "+:^" + site.replace(".", r"\.") + "$"]
        bits = (own or [written])[0]["bits"]
        operator = operators_of(small)[f"{site}.operator"]
        assert torch.allclose(gptq_weight(tensors, site, bits, less), operator.dense(), rtol=1e-6, atol=1e-9)
        assert f"{site}.weight" not in tensors
        assert tensors[f"{site}.qweight"].shape == (operator.shape[1] * bits // 32, operator.shape[0])
        size = (own or [written])[0]["group_size"]
        groups = 1 if size == -1 else operator.shape[1] // size
        assert tensors[f"{site}.scales"].shape == (groups, operator.shape[0])
        assert tensors[f"{site}.qzeros"].shape == (groups, operator.shape[0] * bits // 32)


def test_words_are_filled_from_their_lowest_bit() -> None:
    assert words(torch.tensor([[1, 2, 3, 4, 5, 6, 7, 15]]), 4).tolist() == [[0xF7654321 - 2**32]]
    assert words(torch.tensor([[7] * 11]), 3).tolist() == [[-1, 1]]


def test_what_cannot_be_held_is_refused_and_nothing_is_written(
    make_checkpoint: Maker, tokens: Callable[..., Any], quick: dict[str, Any], tmp_path: Path
) -> None:
    compress(make_checkpoint("llama-tied"), tokens(), "40%", tmp_path / "out", **quick)
    for to in ("compressed-tensors", "gptq"):
        refusal = rf"{to} cannot hold 5 of the 5 sites: model\.embed_tokens \(int.*--forms portable.*--rest dense"
        with pytest.raises(TersorError, match=refusal):
            export(tmp_path / "out", to, tmp_path / "there")
        with pytest.raises(TersorError, match="cannot hold 5 of the 5"):
            export(tmp_path / "out", to, tmp_path / "there", rest="dense")
    assert {p.name for p in tmp_path.iterdir()} == {"llama-tied", "out", "out.run"}


@pytest.mark.parametrize("to", ["compressed-tensors", "gptq"])
def test_the_rest_may_be_dense(to: str, artifact: Callable[..., Path], tokens: Any, tmp_path: Path) -> None:
    out = artifact("llama-tied", GROUPS, exclude=())
    with pytest.raises(TersorError, match=r"1 of the 6 sites: model\.embed_tokens \(tied to lm_head\)"):
        export(out, to, tmp_path / "there")
    found = export(out, to, tmp_path / "there", rest="dense")
    assert found.dense == ("model.embed_tokens",) and len(found.packed) == 5
    if to == "compressed-tensors":
        pytest.importorskip("compressed_tensors")
        batch = tokens()[0]
        assert close(outputs(opened("llama-tied", tmp_path / "there"), batch), outputs(tersor.load(out), batch))


def test_a_folder_of_something_else_is_left_alone(artifact: Callable[..., Path], tmp_path: Path) -> None:
    out = artifact("mistral", GROUPS)
    there = tmp_path / "there"
    export(out, "gptq", there)
    export(out, "gptq", there)
    with pytest.raises(TersorError, match="is no export to dense"):
        export(out, "dense", there)
    with pytest.raises(TersorError, match="is no export to dense"):
        export(out, "dense", out)
    with pytest.raises(TersorError, match="no format 'awq'"):
        export(out, "awq", tmp_path / "other")


@pytest.mark.parametrize("text", ["[" * 200_000, '["target"]', "3", '{"target": ["gptq"]}'])
def test_a_record_that_is_none_of_an_export_is_left_alone(text: str, tmp_path: Path) -> None:
    (tmp_path / RECORD).write_text(text)
    with pytest.raises(TersorError, match="is no export to gptq"):
        _check_target(tmp_path, "gptq")
