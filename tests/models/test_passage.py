"""All batches through one stretch of a model, then the next: the outputs of the whole model, weights read once."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tersor.data import Data
from tersor.errors import TersorError
from tersor.models import open_model
from tersor.models.files import write_safetensors
from tersor.models.module import ModuleModel
from tersor.models.passage import Spool, by_stretches
from tiny_models import draw_model, token_batches


@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "t5", "bert", "mixtral"])
def test_outputs_are_those_of_the_whole_model(name: str, tmp_path: Path) -> None:
    draw_model(name, layers=3).save_pretrained(tmp_path / "model")
    model = open_model(tmp_path / "model", on_demand=name != "mixtral")
    batches = list(model.batches(Data("tokens", batches=token_batches(name, count=3)), None, 8, 3))
    other = next(iter(model.batches(Data("tokens", batches=token_batches(name, count=4)[3:]), None, 8, 3)))
    with torch.no_grad():
        expected = [model.outputs(batch) for batch in batches]
        with by_stretches(model, batches, tmp_path / "spool") as found:
            for _ in range(2):
                assert all(torch.equal(found.outputs(b), e) for b, e in zip(batches, expected, strict=True))
            assert torch.equal(found.outputs(other), model.outputs(other))
    assert not (tmp_path / "spool").exists()


def test_weights_of_blocks_are_read_once_for_all_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tersor.models import ondemand

    draw_model("llama-tied", layers=3).save_pretrained(tmp_path / "model")
    model = open_model(tmp_path / "model", on_demand=True)
    batches, read, counts = token_batches(count=5), ondemand.read_tensor, Counter[str]()

    def counted(path: Path, name: str) -> Tensor:
        counts[name] += 1
        return read(path, name)

    monkeypatch.setattr(ondemand, "read_tensor", counted)
    with torch.no_grad(), by_stretches(model, batches, tmp_path / "spool") as found:
        for batch in batches:
            found.outputs(batch)
    assert {count for name, count in counts.items() if "layers" in name} == {2}  # once to see what runs when


class Remembering(nn.Module):
    """A block that reads what another one left in it, behind the back of the module."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.last = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        seen: list[Any] = []
        for block in self.blocks:
            x = block(x)
            seen.append(x)
        result: Tensor = self.last(x) + seen[0]
        return result


def test_a_model_that_is_no_chain_runs_as_a_whole(tmp_path: Path) -> None:
    torch.manual_seed(0)
    batches = list(ModuleModel(Remembering()).batches(Data("x", batches=[torch.randn(4, 8)] * 2), None, 0, 0))
    model = ModuleModel(Remembering())
    with torch.no_grad():
        expected = [model.outputs(batch) for batch in batches]
        with by_stretches(model, batches, tmp_path / "spool") as found:
            assert all(torch.equal(found.outputs(b), e) for b, e in zip(batches, expected, strict=True))


@pytest.mark.parametrize(
    ("kind", "context"),
    [
        ("collections.defaultdict",
         {"default_factory_module": "hostile", "default_factory_name": "run", "dict_context": []}),
        ("builtins.dict", '[{"__enum__": true, "fqn": "hostile:run", "name": "x"}]'),
    ],
)  # fmt: skip
def test_a_tree_that_names_code_imports_none(
    kind: str, context: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hostile.py").write_text("raise SystemExit('it ran')")
    monkeypatch.syspath_prepend(tmp_path)
    spool = Spool(tmp_path / "spool", "key")
    spool.put("x", 0, [torch.ones(2)])
    spool.mark("begun")
    (path,) = (tmp_path / "spool").glob("*.safetensors")
    tree = json.dumps([1, {"type": kind, "context": context, "children_spec": []}])
    write_safetensors(path, {}, {"tree": tree, "leaves": "[]"})
    with pytest.raises(TersorError, match="names code"):
        Spool(tmp_path / "spool", "key").get("x", 0)


def test_a_spool_that_is_cut_short_is_named(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool", "key")
    spool.put("x", 0, [torch.ones(2)])
    spool.mark("begun")
    (path,) = (tmp_path / "spool").glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(TersorError, match=rf"{path.name} is damaged"):
        Spool(tmp_path / "spool", "key").get("x", 0)


def test_what_text_cannot_tell_stays_in_memory(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool", "key")
    spool.put("x", 0, defaultdict(list, a=torch.ones(2)))
    spool.mark("begun")
    assert torch.equal(spool.get("x", 0)["a"], torch.ones(2)) and not spool.is_begun
