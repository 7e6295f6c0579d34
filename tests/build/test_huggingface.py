"""Checkpoints of every architecture: built, saved and loaded again they are the same model, to the bit."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

import tersor
from tersor.build import operators_of
from tersor.errors import TersorError
from tersor.plan import UNTOUCHED
from tersor.steps import Result, compress
from tiny_models import configurations

transformers = pytest.importorskip("transformers")
TIED = {"llama-tied": "lm_head", "gpt2": "lm_head", "qwen3": "lm_head", "gemma": "lm_head", "t5": "lm_head",
        "opt": "lm_head", "bert-masked": "cls.predictions.decoder"}  # fmt: skip
GENERATING = {"llama-tied", "mistral", "gpt2", "qwen2", "qwen3", "gpt-neox", "opt", "gemma", "t5", "mixtral",
              "qwen2-moe", "qwen3-moe"}  # fmt: skip
Maker = Callable[..., Path]


@pytest.fixture
def built(
    make_checkpoint: Maker, tokens: Callable[..., Any], quick: dict[str, Any], tmp_path: Path
) -> Callable[..., tuple[Result, Path]]:
    def make(
        name: str, budget: str = "5bits", dtype: torch.dtype = torch.float32, **options: Any
    ) -> tuple[Result, Path]:
        out = tmp_path / "out"
        return compress(make_checkpoint(name, dtype), tokens(name), budget, out, **{**quick, **options}), out

    return make


def outputs(module: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        result = module(**batch)
    found: Tensor = result.logits if hasattr(result, "logits") else result.last_hidden_state
    return found


def near(found: Tensor, expected: Tensor) -> bool:
    """Equal but for the rounding of half precision."""
    return bool((found.float() - expected.float()).norm() < 0.1 * expected.float().norm())


def auto_class(module: nn.Module) -> Any:
    name = type(module).__name__
    for suffix, auto in (
        ("ForCausalLM", "AutoModelForCausalLM"),
        ("LMHeadModel", "AutoModelForCausalLM"),
        ("ForConditionalGeneration", "AutoModelForSeq2SeqLM"),
        ("ForMaskedLM", "AutoModelForMaskedLM"),
        ("ForSequenceClassification", "AutoModelForSequenceClassification"),
    ):
        if name.endswith(suffix):
            return getattr(transformers, auto)
    return transformers.AutoModel


def tensor_bytes(path: Path) -> dict[str, bytes]:
    with safe_open(path, framework="pt") as file:
        return {k: file.get_tensor(k).reshape(-1).view(torch.uint8).numpy().tobytes() for k in file.keys()}  # noqa: SIM118


CODED = ("llama-tied", "gpt2", "mixtral", "t5")
ROUND_TRIPS = [(name, "int") for name in configurations()] + [
    (name, form) for name in CODED for form in ("coded", "trellis")
]


@pytest.mark.parametrize(("name", "form"), ROUND_TRIPS)
def test_round_trip(
    name: str, form: str, built: Callable[..., tuple[Result, Path]], tokens: Callable[..., Any], tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    result, out = built(name, forms=(form,))
    batch = tokens(name)[0]
    module = result.study.model.module
    expected = outputs(module, batch)
    assert result.plan.stored == result.weights_bytes == (out / "model.safetensors").stat().st_size
    assert result.plan.stored < 0.4 * result.study.stored_bytes
    forms = {c.site: c.form for c in result.plan.choices}
    # What the model does not use is `int`; bytes that no candidate can use leave a site as it is.
    assert form in set(forms.values()) <= {form, "int", UNTOUCHED}
    assert len(operators_of(module)) == sum(s.stack for s in result.study.sites if forms[s.name] != UNTOUCHED)

    transformers.utils.logging.disable_progress_bar()
    capfd.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = auto_class(module).from_pretrained(out)
        again = tersor.load(out)
    said = capfd.readouterr()
    assert said.out == "" and said.err == ""
    for model in (loaded, again):
        assert all(operator.unready() is None for operator in operators_of(model).values())
        assert type(model) is type(module) and not model.training
        assert torch.equal(outputs(model, batch), expected)

    loaded.save_pretrained(tmp_path / "again")
    assert tensor_bytes(tmp_path / "again" / "model.safetensors") == tensor_bytes(out / "model.safetensors")
    third = auto_class(module).from_pretrained(tmp_path / "again")
    assert torch.equal(outputs(third, batch), expected)
    assert torch.equal(outputs(copy.deepcopy(loaded), batch), expected)
    if name in TIED:
        head, table = loaded.get_submodule(TIED[name]), loaded.get_input_embeddings()
        operators = [m for m in operators_of(loaded).values() if m.shape == (128, 64)]
        assert sum("embed" in k or "shared" in k or "wte" in k for k in tensor_bytes(out / "model.safetensors"))
        assert not any(k.startswith(TIED[name] + ".operator") for k in tensor_bytes(out / "model.safetensors"))
        assert torch.equal(head.weight, table.weight[:])
        assert head.weight_operator() in operators
    if name in GENERATING:
        prompt = {"input_ids": batch["input_ids"], "attention_mask": torch.ones_like(batch["input_ids"])}
        made = [m.generate(**prompt, max_new_tokens=3, do_sample=False, pad_token_id=0) for m in (module, loaded)]
        assert torch.equal(*made) and made[0].shape[1] > 1


@pytest.mark.parametrize("name", ["llama-tied", "gemma", "mixtral", "bert"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cast_keeps_what_is_stored(
    name: str, dtype: torch.dtype, built: Callable[..., tuple[Result, Path]], tokens: Callable[..., Any]
) -> None:
    _, out = built(name)
    model, batch = tersor.load(out), tokens(name)[0]
    expected = outputs(model, batch)
    stored = {k: v.clone() for op, m in operators_of(model).items() for k, v in m.state_dict(prefix=f"{op}.").items()}
    cast = model.to(dtype)
    state = cast.state_dict()
    assert all(torch.equal(state[k], v) and state[k].dtype == v.dtype for k, v in stored.items())
    found = outputs(cast, batch)
    assert found.dtype == dtype
    assert near(found, expected)
    # a cast rounds the rotary frequencies too, which loading keeps in float32
    assert near(outputs(tersor.load(out, dtype=dtype), batch), found)


@pytest.mark.parametrize("name", ["mistral", "bert"])
def test_a_bfloat16_checkpoint_stays_one(
    name: str, built: Callable[..., tuple[Result, Path]], tokens: Callable[..., Any]
) -> None:
    result, out = built(name, "75%", dtype=torch.bfloat16)
    batch = tokens(name)[0]
    with safe_open(out / "model.safetensors", framework="pt") as file:
        dtypes = {file.get_slice(k).get_dtype() for k in file.keys()}  # noqa: SIM118
    assert "BF16" in dtypes and "F32" not in dtypes
    assert result.plan.stored == (out / "model.safetensors").stat().st_size
    assert tersor.load(out).dtype == torch.bfloat16
    whole = tersor.load(out, dtype=torch.float32)
    assert torch.equal(outputs(whole, batch), outputs(result.study.model.module, batch))
    half = result.study.model.module.to(torch.bfloat16)
    assert near(outputs(tersor.load(out), batch), outputs(half, batch))


def test_a_fused_expert_weight_is_a_site_and_shrinks(built: Callable[..., tuple[Result, Path]]) -> None:
    result, out = built("mixtral", "25%")
    experts = [s for s in result.study.sites if s.kind == "experts"]
    assert {s.name for s in experts} == {f"model.layers.0.mlp.experts.{p}" for p in ("gate_up_proj", "down_proj")}
    with safe_open(out / "model.safetensors", framework="pt") as file:
        names = [k for k in file.keys() if "experts" in k]  # noqa: SIM118
        stored = sum(file.get_tensor(k).nbytes for k in names)
    assert len({k.rpartition(".")[0] for k in names}) == 8  # two weights of four experts
    assert stored < 0.25 * sum(s.nbytes for s in experts)


PAIR = {"first": {"bits": 2, "group_size": 32}, "second": {"rank": 4, "bits": 8}}


@pytest.mark.parametrize("name", ["gpt2", "gemma", "mixtral"])
@pytest.mark.parametrize(
    ("form", "ladder"),
    [
        ("lowrank", [{"rank": 8}, {"rank": 16, "bits": 4}]),
        ("int+lowrank", [PAIR]),
        ("coded", [{"step": 0.01}]),
        ("trellis", [{"bits": 2.5}]),
    ],
)
def test_other_forms_load_as_they_were_built(
    name: str, form: str, ladder: list[Any], built: Callable[..., tuple[Result, Path]], tokens: Callable[..., Any]
) -> None:
    result, out = built(name, "6.5bits", forms=(form,), settings={form: ladder})
    assert form in {c.form for c in result.plan.choices}
    assert result.plan.stored == (out / "model.safetensors").stat().st_size
    batch = tokens(name)[0]
    assert torch.equal(outputs(tersor.load(out), batch), outputs(result.study.model.module, batch))


def test_what_goes_with_a_model_is_copied_and_weights_are_not(
    make_checkpoint: Maker, tokens: Callable[..., Any], quick: dict[str, Any], tmp_path: Path
) -> None:
    folder = make_checkpoint("bert")
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "vocab.txt").write_text("a\nb\n")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    (folder / "old").mkdir()
    (folder / "old" / "config.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    compress(folder, tokens(), "60%", tmp_path / "out", **quick)
    kept = {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert kept == {"config.json", "model.safetensors", "tersor.json", "tokenizer_config.json", "vocab.txt",
                    "1_Pooling/config.json"}  # fmt: skip
    record = json.loads((tmp_path / "out" / "tersor.json").read_text())
    assert record["model"]["source"] == "bert" and str(tmp_path) not in json.dumps(record)


def test_experts_of_unlike_importance_get_streams_of_their_own_sizes(
    built: Callable[..., tuple[Result, Path]],
) -> None:
    result, out = built("mixtral", forms=("coded",))
    choice = next(c for c in result.plan.choices if "experts" in c.site)
    sizes = [setting["stored"] for setting in choice.setting["stack"]]
    assert len(set(sizes)) > 1 and sum(sizes) == choice.stored
    with safe_open(out / "model.safetensors", framework="pt") as file:
        names = sorted(k for k in file.keys() if k.startswith(choice.site))  # noqa: SIM118
        assert [file.get_tensor(name).nbytes for name in names] == sizes


@pytest.mark.parametrize(("form", "magic"), [("coded", b"TSC1"), ("trellis", b"TST1")])
def test_a_damaged_stream_is_named(form: str, magic: bytes, built: Callable[..., tuple[Result, Path]]) -> None:
    _, out = built("llama-tied", forms=(form,))
    path = out / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[data.rindex(magic) + 30] ^= 1
    path.write_bytes(data)
    with pytest.raises(TersorError, match=r"model\.safetensors is damaged: .*operator: .*checksum"):
        tersor.load(out)
    with pytest.raises(TersorError, match=r"operator: .*checksum"):
        transformers.AutoModelForCausalLM.from_pretrained(out)


@pytest.mark.parametrize(
    ("name", "form"), [("llama-tied", "int"), ("gemma", "int"), ("llama-tied", "coded"), ("gpt2", "trellis")]
)
def test_a_loaded_model_compiles(
    name: str, form: str, built: Callable[..., tuple[Result, Path]], tokens: Callable[..., Any]
) -> None:
    """The whole graph is captured; `test_module.py` compiles one to machine code."""
    _, out = built(name, forms=(form,))
    model, batch = tersor.load(out), tokens(name)[0]
    expected = outputs(model, batch)
    torch.compiler.reset()
    compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=form != "trellis")  # bits are read outside
    assert torch.allclose(outputs(compiled, batch), expected, rtol=1e-3, atol=1e-4)
