"""Every row of `methods.toml` loads, runs end to end on a tiny model and keeps within its budget."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from tersor.build.artifact import read_record
from tersor.errors import TersorError, UnreachableBudget
from tersor.forms import form_named
from tersor.methods import ALLOCATIONS, METHODS, Method, method_named, read_methods, run_method
from tersor.metrics import KINDS

ROW = """
[[method]]
name = "one"
papers = ["P041"]
title = "A title"
form = "int"
metric = "identity"
allocation = "uniform"
settings = { bits = [3, 4], rounding = "nearest" }
claim = "A claim."
"""


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tiny() -> nn.Module:
    """A table and three layers of 4,096 weights and more, their inputs of unequal size, so that metrics matter."""
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(80, 64)
            self.first, self.second = nn.Linear(64, 96), nn.Linear(96, 64)
            self.last = nn.Linear(64, 64)
            self.table.weight.data *= torch.logspace(-1, 1, 64)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.table(x)
            return self.last((h + self.second(self.first(h).relu())).mean(1))

    return Net()


def batches(seed: int = 1, count: int = 5) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 80, (16, 8), generator=generator) for _ in range(count)]


def run(method: str | Method, out: Path, budget: str | None = None, **options: object) -> object:
    fixed = {"workers": 1, "damping": {"inputs": 0.01, "gradients": 0.1, "frequencies": 0.1}, "held_out": batches(2, 2)}
    return run_method(method, tiny(), batches(), budget, out, **{**fixed, **options})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", METHODS)
def test_a_method_runs_end_to_end_within_its_budget(name: str, tmp_path: Path) -> None:
    result = run(name, tmp_path / "out", "40%")
    method = METHODS[name]
    assert result.weights_bytes <= 0.4 * result.study.stored_bytes
    assert result.weights_bytes == (tmp_path / "out" / "model.safetensors").stat().st_size
    assert {c.form for c in result.plan.choices} <= {method.form, "untouched"}
    form, ladder = form_named(method.form), [form_named(method.form).setting(v) for v in method.ladder()]
    assert all(form.setting(c.setting) in ladder for c in result.plan.choices if c.form == method.form)
    assert 0 < result.judgement.divergence.value < float("inf")
    assert name in result.plan.name and result.plan.name in result.study.run.plans()


@pytest.mark.parametrize("name", METHODS)
def test_a_row_says_what_it_should(name: str) -> None:
    method = METHODS[name]
    assert method.metric in KINDS and method.allocation in ALLOCATIONS and method.recovery == "none"
    assert method.title and method.claim and "\n" not in method.claim
    assert sum(len(level) for level in method.levels()) == len(method.ladder()) > 1


def test_uniform_takes_one_setting_everywhere_and_per_site_fields_where_they_are_free(tmp_path: Path) -> None:
    settings = [c.setting for c in run("rtn", tmp_path / "a", "20%").plan.choices]
    assert all(s == settings[0] for s in settings)
    free = [c.setting for c in run("adadim", tmp_path / "b", "20%").plan.choices]
    assert len({s["bits"] for s in free}) == 1
    assert {s["axis"] for s in free} == {"columns", "rows"}


def test_share_spends_the_same_share_of_every_site(tmp_path: Path) -> None:
    result = run("svd", tmp_path / "out", "50%")
    dense = {s.name: s.nbytes for s in result.study.sites}
    shares = [c.stored / dense[c.site] for c in result.plan.choices]
    assert max(shares) <= 0.5 and max(shares) < 1.3 * min(shares)


def test_a_larger_budget_is_used_and_a_limit_of_divergence_gives_the_smallest(tmp_path: Path) -> None:
    small, large = run("rtn", tmp_path / "a", "15%"), run("rtn", tmp_path / "b", "30%")
    assert small.plan.stored < large.plan.stored and small.plan.divergence > large.plan.divergence
    most = large.plan.divergence * 1.01
    same = run("rtn", tmp_path / "c", max_divergence=most)
    assert same.plan.divergence <= most and same.plan.stored <= large.plan.stored


@pytest.mark.parametrize("name", ["rtn", "svd", "lq-lora"])
def test_an_unreachable_budget_names_the_smallest_plan(name: str, tmp_path: Path) -> None:
    with pytest.raises(UnreachableBudget, match=r"smallest plan takes [\d,]+"):
        run(name, tmp_path / "out", "1%")
    assert not (tmp_path / "out").exists()


def test_an_unknown_method_offers_the_nearest_name(tmp_path: Path) -> None:
    with pytest.raises(TersorError, match="no method 'gtpq'; did you mean 'gptq'"):
        method_named("gtpq")
    with pytest.raises(TersorError, match="did you mean 'yaqa'"):
        run("yaqua", tmp_path / "out", "20%")


def test_what_a_method_decides_cannot_be_given(tmp_path: Path) -> None:
    with pytest.raises(TersorError, match="'rtn' decides its metric itself"):
        run("rtn", tmp_path / "out", "20%", metric="kronecker")
    with pytest.raises(TersorError, match="'noisyquant' decides its activations itself"):
        run("noisyquant", tmp_path / "out", "40%", activations="int8")


def test_a_run_folder_of_another_ladder_is_refused(tmp_path: Path) -> None:
    run("rtn", tmp_path / "a", "20%", run=tmp_path / "run")
    with pytest.raises(TersorError, match="other settings"):
        run("rtn-search", tmp_path / "b", "20%", run=tmp_path / "run")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (('form = "int"', 'form = "lowrnk"'), "did you mean 'lowrank'"),
        (('metric = "identity"', 'metric = "identy"'), "did you mean 'identity'"),
        (('allocation = "uniform"', 'allocation = "uniforn"'), "did you mean 'uniform'"),
        (("bits = [3, 4]", "bits = [3, 7]"), "bits is 7"),
        (("rounding =", "roundin ="), "roundin"),
        (("claim =", "clam ="), "did you mean 'claim'"),
        (('claim = "A claim."', ""), "incomplete"),
        (("P041", "P41"), "cites 'P41'"),
        (('settings = { bits = [3, 4], rounding = "nearest" }', ""), "must name its settings"),
        (('name = "one"', 'name = "one'), "not valid TOML"),
    ],
)
def test_a_bad_row_is_one_clear_sentence(change: tuple[str, str], message: str) -> None:
    assert list(read_methods(ROW)) == ["one"]
    with pytest.raises(TersorError, match=message) as caught:
        read_methods(ROW.replace(*change))
    assert "\n" not in str(caught.value).split("not valid")[0]


def test_a_method_may_round_activations_too(tmp_path: Path) -> None:
    run("noisyquant", tmp_path / "out", "40%")
    record = read_record(tmp_path / "out")["activations"]
    assert record["asked"] == "int6,tensor,dither" and set(record["layers"]) == {"first", "second", "last"}
    with pytest.raises(TersorError, match="'int9' is no format"):
        replace(METHODS["noisyquant"], activations="int9")


def test_two_methods_of_one_name_are_refused() -> None:
    with pytest.raises(TersorError, match="two methods named 'one'"):
        read_methods(ROW + ROW)


def test_a_method_can_be_changed_and_run(tmp_path: Path) -> None:
    rtn = METHODS["rtn"]
    wide = replace(rtn, name="rtn-32", settings={**rtn.settings, "group_size": 32})
    assert run(wide, tmp_path / "out", "30%").plan.choices[0].setting["group_size"] == 32
