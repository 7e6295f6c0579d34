"""Artifacts cut to a budget as they are loaded: bytes kept to, damage no more than that of equal ranks, refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tersor
from tersor.build import operators_of
from tersor.errors import TersorError, UnreachableBudget
from tersor.forms import FORMS, IntSetting, LowRankSetting, SumSetting
from tersor.forms.lowrank import cut
from tersor.methods import method_named, run_method
from tersor.metrics import Metric
from tersor.steps import Result, compress

DAMPING = {"inputs": 0.03, "gradients": 0.3, "frequencies": 0.3}
Maker = Callable[..., Path]
Nets = Callable[[], nn.Module]


def at_rank(rank: int, model: Any, data: Any, out: Path, bits: int | None = None) -> Result:
    """An artifact with this rank at every site."""
    method = replace(method_named("svd"), settings={"rank": rank, "bits": bits}, metric="kronecker")
    return run_method(method, model, data, "100%", out, damping=DAMPING, gains=False, workers=1)


def outputs(module: nn.Module, batch: Any) -> Tensor:
    with torch.no_grad():
        found = module(**batch) if isinstance(batch, dict) else module(batch)
    logits: Tensor = found if isinstance(found, Tensor) else found.logits
    return logits


def sums_at(rank: int, model: Any, data: Any, out: Path, first: str = "int", bits: int | None = None) -> Result:
    """An artifact with a correction of this rank at every site."""
    of_first = {"int": {"bits": 3, "group_size": None, "symmetric": True}, "sparse": {"density": "2:4", "bits": 4}}
    settings = {"first": of_first[first], "second": {"rank": rank, "bits": bits}}
    method = replace(method_named("eora"), form=f"{first}+lowrank", settings=settings, metric="kronecker")
    return run_method(method, model, data, "100%", out, damping=DAMPING, gains=False, workers=1)


@pytest.fixture
def built(make_checkpoint: Maker, tokens: Callable[..., Any], tmp_path: Path) -> Path:
    out = tmp_path / "out"
    at_rank(24, make_checkpoint("llama-tied"), tokens("llama-tied"), out)
    return out


@pytest.mark.parametrize("name", ["llama-tied", "mixtral"])
@pytest.mark.parametrize("bits", [None, 4])
def test_a_cut_model_saves_as_a_file_within_the_budget(
    name: str,
    bits: int | None,
    make_checkpoint: Maker,
    tokens: Callable[..., Any],
    quick: dict[str, Any],
    tmp_path: Path,
) -> None:
    out, again, batches = tmp_path / "out", tmp_path / "again", tokens(name)
    at_rank(24, make_checkpoint(name), batches, out, bits)
    whole = (out / "model.safetensors").stat().st_size
    budget = int(0.85 * whole)
    module = tersor.load(out, budget=f"{budget}B")
    module.save_pretrained(again)  # type: ignore[operator]
    size = (again / "model.safetensors").stat().st_size
    assert 0.97 * budget < size <= budget
    assert torch.equal(outputs(tersor.load(again_with_record(again, out)), batches[0]), outputs(module, batches[0]))


def again_with_record(folder: Path, out: Path) -> Path:
    """The saved folder with the record of the artifact it was loaded from."""
    (folder / "tersor.json").write_text((out / "tersor.json").read_text())
    return folder


def test_the_predicted_damage_is_no_more_than_that_of_equal_ranks(built: Path) -> None:
    damages = json.loads((built / "tersor.json").read_text())["cuts"]
    whole = tersor.load(built)
    original = json.loads((built / "tersor.json").read_text())["weights_bytes"]
    for rank in (4, 10, 17):
        bytes_less = sum(2 * (24 - rank) * sum(op.shape) for op in operators_of(whole).values())
        module = tersor.load(built, budget=f"{original - bytes_less + 256}B")  # no more than a step of one site
        ranks = {name: op.setting.rank for name, op in operators_of(module).items()}
        assert len(set(ranks.values())) > 1
        added = sum(damages[name.removesuffix(".operator")][k] for name, k in ranks.items())
        assert added <= sum(damage[rank] for damage in damages.values())


def test_a_module_of_ones_own_and_plain_weights(
    conv_net: Nets, images: Callable[..., list[Any]], tmp_path: Path
) -> None:
    result = at_rank(8, conv_net(), images(), tmp_path / "out")
    share = f"{90 * result.weights_bytes / result.study.stored_bytes}%"
    small = tersor.load(tmp_path / "out", model=conv_net, budget=share)
    ranks = [op.setting.rank for op in operators_of(small).values()]
    assert 1 <= min(ranks) < 8
    dense = tersor.load(tmp_path / "out", model=conv_net, budget=share, mode="dense")
    assert torch.allclose(outputs(dense, images()[0]), outputs(small, images()[0]), atol=1e-5)


@pytest.mark.parametrize(("first", "bits", "name"), [("int", None, "llama-tied"), ("sparse", 4, "mixtral")])
def test_a_cut_sum_is_the_sum_with_its_correction_cut(
    first: str, bits: int | None, name: str, make_checkpoint: Maker, tokens: Callable[..., Any], tmp_path: Path
) -> None:
    out, again, batches = tmp_path / "out", tmp_path / "again", tokens(name)
    sums_at(12, make_checkpoint(name), batches, out, first, bits)
    whole = tersor.load(out)
    budget = int(0.93 * (out / "model.safetensors").stat().st_size)
    module = tersor.load(out, budget=f"{budget}B")
    ranks = {place: op.setting.second.rank for place, op in operators_of(module).items()}
    assert 1 <= min(ranks.values()) < 12
    for place, operator in operators_of(whole).items():
        cut(operator, ranks[place])
        assert torch.equal(operator.dense(), operators_of(module)[place].dense())
    module.save_pretrained(again)  # type: ignore[operator]
    assert 0.97 * budget < (again / "model.safetensors").stat().st_size <= budget
    assert torch.equal(outputs(tersor.load(again_with_record(again, out)), batches[0]), outputs(module, batches[0]))


def test_a_cut_correction_in_full_precision_is_a_fit_of_that_rank(make_metric: Callable[..., Metric]) -> None:
    weight, metric = torch.randn(24, 32, generator=torch.Generator().manual_seed(0)), make_metric(24, 32)
    form, setting = FORMS["int+lowrank"], SumSetting(IntSetting(3, None), LowRankSetting(9))
    operator, small = form.fit(weight, metric, setting), replace(setting, second=LowRankSetting(4))
    cut(operator, 4)
    assert operator.setting == small
    assert torch.equal(operator.dense(), form.fit(weight, metric, small).dense())


def test_a_budget_that_it_fits_leaves_it_as_it_is(built: Path, tokens: Callable[..., Any]) -> None:
    batch = tokens("llama-tied")[0]
    assert torch.equal(outputs(tersor.load(built, budget="100%"), batch), outputs(tersor.load(built), batch))


def test_what_cannot_be_cut_is_refused(
    built: Path, make_checkpoint: Maker, tokens: Callable[..., Any], quick: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(UnreachableBudget, match=r"at rank 1 it takes [\d,]+ bytes, [\d.]+% of the original") as refused:
        tersor.load(built, budget="1%")
    least = str(refused.value).split(" takes ")[1].split(" bytes")[0].replace(",", "")
    ranks = {op.setting.rank for op in operators_of(tersor.load(built, budget=f"{least}B")).values()}
    assert ranks == {1}
    for wrong in ("4bits", "40ms"):
        with pytest.raises(TersorError, match=wrong):
            tersor.load(built, budget=wrong)
    integers = tmp_path / "integers"
    compress(make_checkpoint("gpt2"), tokens("gpt2"), "5bits", integers, **quick)
    with pytest.raises(TersorError, match="no weight of the form 'lowrank'"):
        tersor.load(integers, budget="1%")
