"""Observing block by block: the summaries of one pass over the whole model, to the bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tersor import TersorError
from tersor.data import Data
from tersor.models import open_model, walk
from tersor.models.passage import Passage, Spool
from tersor.observe import collect, collect_by_block
from tiny_models import draw_model, token_batches

ARCHITECTURES = ("llama-tied", "gpt2", "opt", "gemma", "t5", "bert", "bert-masked", "distilbert")


def _summaries(model: Any, batches: Any, folder: Path, **options: Any) -> dict[Any, dict[str, Tensor]]:
    found: dict[Any, dict[str, Tensor]] = {}
    for collector in collect_by_block(model, walk(model.module).sites, batches, folder, **options):
        for key, summary in collector.summaries.items():
            assert key not in found, "a use of a weight was counted in two stretches"
            found[key] = summary.tensors()
    return found


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_summaries_are_those_of_one_pass(name: str, gradients: bool, tmp_path: Path) -> None:
    draw_model(name, layers=3).save_pretrained(tmp_path)
    whole, model = open_model(tmp_path), open_model(tmp_path, on_demand=True)
    batches = whole.batches(Data("tokens", batches=token_batches(name)), None, 8, 3)
    options = {"gradients": gradients, "seed": 5}
    expected = collect(whole, walk(whole.module).sites, batches, **options).summaries
    found = _summaries(model, batches, tmp_path / "spool", **options)
    assert set(found) == set(expected)
    for key, summary in expected.items():
        for field, values in summary.tensors().items():
            sampled = name == "t5" and key[0] == "shared" and field == "overlap"  # by the moments so far
            assert sampled or (found[key][field] - values).norm() <= 1e-5 * values.norm(), (key, field)
    assert not (tmp_path / "spool").exists()


class Killed(BaseException):
    """The end of a process."""


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("name", ["llama-tied", "t5"])
def test_a_pass_that_was_stopped_goes_on_at_its_stretch(
    name: str, gradients: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw_model(name, layers=3).save_pretrained(tmp_path)
    model = open_model(tmp_path, on_demand=True)
    batches = model.batches(Data("tokens", batches=token_batches(name, count=2)), None, 8, 3)
    options = {"gradients": gradients, "seed": 5, "key": "one"}
    through, calls, end = Passage._through, 0, 10**9

    def counted(*given: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > end:
            raise Killed
        return through(*given, **options)

    monkeypatch.setattr(Passage, "_through", counted)
    expected, whole = _summaries(model, batches, tmp_path / "spool", **options), calls
    for end in range(1, whole, 3):
        calls, found = 0, {}
        with pytest.raises(Killed):
            for collector in collect_by_block(model, walk(model.module).sites, batches, tmp_path / "spool", **options):
                found |= {key: summary.tensors() for key, summary in collector.summaries.items()}
        stopped, calls, end = calls, 0, 10**9
        found |= _summaries(model, batches, tmp_path / "spool", **options)
        assert calls <= whole - stopped + 1 + len(batches), "more was done twice than a stretch"
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[k][f], v) for k, fields in expected.items() for f, v in fields.items())
        assert not (tmp_path / "spool").exists()


def test_what_another_pass_left_is_not_gone_on_with(tmp_path: Path) -> None:
    draw_model("llama-tied", layers=3).save_pretrained(tmp_path)
    model = open_model(tmp_path, on_demand=True)
    batches = model.batches(Data("tokens", batches=token_batches(count=2)), None, 8, 3)
    options = {"gradients": False, "seed": 5}
    first = collect_by_block(model, walk(model.module).sites, batches, tmp_path / "spool", key="one", **options)
    next(first), next(first)
    first.close()
    assert (tmp_path / "spool").exists()
    found = _summaries(model, batches, tmp_path / "spool", key="other", **options)
    assert found.keys() == _summaries(model, batches, tmp_path / "spool", key="other", **options).keys()
    assert not (tmp_path / "spool").exists()


def test_what_files_cannot_tell_is_begun_anew(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool", "one")
    spool.put("a", 0, [torch.ones(2), 3])
    spool.mark("a")
    assert Spool(tmp_path / "spool", "one").get("a", 0)[1] == 3
    spool.put("b", 0, [torch.ones(2), object()])
    spool.mark("b")
    assert not Spool(tmp_path / "spool", "one").is_done("a") and not (tmp_path / "spool").exists()


@pytest.mark.parametrize("metric", ["input", "kronecker"])
def test_a_study_on_demand_is_that_of_the_whole_model(
    metric: str, make_checkpoint: Callable[..., Path], quick: dict[str, Any], tmp_path: Path
) -> None:
    from tersor.steps import study

    folder, batches = make_checkpoint("llama-tied", torch.bfloat16), token_batches(count=5)  # one group
    options = {**quick, "metric": metric, "damping": None}
    studies = [
        study(folder, batches, tmp_path / f"run{d}", memory="4GB" if d else None, **options) for d in (False, True)
    ]
    for site in studies[0].sites:
        a, b = ([(c.setting, c.divergence) for c in s.run.candidates(site.name)] for s in studies)
        assert a == b and a


class Around(nn.Module):
    """Every block reads what the first layer made, beside what the block before hands on."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 64)
        self.blocks = nn.ModuleList(nn.Linear(64, 64) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        side = self.first(x)
        for block in self.blocks:
            x = block(x + side).relu()
        return x


def _opened(tmp_path: Path, factory: str) -> Any:
    (tmp_path / "net.py").write_text(f"from test_by_block import {factory} as factory\n")
    save_file(globals()[factory]().state_dict(), tmp_path / "net.safetensors")
    return open_model(f"{tmp_path / 'net.py'}:factory", weights=tmp_path / "net.safetensors", on_demand=True)


def test_gradients_that_go_around_the_blocks_are_refused(tmp_path: Path) -> None:
    model = _opened(tmp_path, "Around")
    batches = model.batches(Data("x", batches=[torch.randn(4, 64)]), None, 1, 1)
    assert _summaries(model, batches, tmp_path / "spool", gradients=False, seed=0)
    with pytest.raises(TersorError, match="first past the blocks"):
        _summaries(model, batches, tmp_path / "spool", gradients=True, seed=0)
    assert not (tmp_path / "spool").exists()


class Loose(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu())


def test_a_model_without_a_chain_is_refused(tmp_path: Path) -> None:
    model = _opened(tmp_path, "Loose")
    batches = model.batches(Data("x", batches=[torch.randn(4, 64)]), None, 1, 1)
    with pytest.raises(TersorError, match="no chain of blocks"):
        _summaries(model, batches, tmp_path / "spool", gradients=False, seed=0)
