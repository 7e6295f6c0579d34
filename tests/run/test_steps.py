"""The steps together: resumed, repeated and seeded, they give one result and do nothing twice."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tersor import engine
from tersor.build import fits
from tersor.curves import draw
from tersor.errors import TersorError
from tersor.forms import form_named
from tersor.judge.costs import resident_bytes
from tersor.steps import build_plan, compress, open_study, study
from tiny_models import small_net
from tiny_models import vector_batches as batches

Images = Callable[..., list[Any]]
Net = Callable[[], nn.Module]


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often models are observed, sites are drawn, and candidates are fitted."""
    from tersor.steps import studying

    calls = {"collect": 0, "draw": 0, "fit": 0}

    def count(place: Any, name: str, what: str) -> None:
        original = getattr(place, name)

        def counting(*args: Any, **kwargs: Any) -> Any:
            calls[what] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(place, name, counting)

    count(studying, "collect", "collect")
    count(draw, "draw_unit", "draw")
    count(fits, "fit_unit", "fit")
    return calls


def test_nothing_is_done_twice(counted: dict[str, int], quick: dict[str, Any], tmp_path: Path) -> None:
    first = compress(small_net(), batches(), "5bits", tmp_path / "a", run=tmp_path / "run", **quick)
    done = dict(counted)
    assert done["collect"] == 2 and done["draw"] == 3 and done["fit"] >= 3
    second = compress(small_net(), batches(), "5bits", tmp_path / "b", run=tmp_path / "run", **quick)
    assert counted == done
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in "ab"]
    assert files[0] == files[1] and first.plan == second.plan
    compress(small_net(), batches(), "4bits", tmp_path / "c", run=tmp_path / "run", **quick)
    assert counted["collect"] == 2 and counted["draw"] == 3 and counted["fit"] <= done["fit"] + 3


def test_a_killed_study_goes_on_where_it_stopped(
    counted: dict[str, int], quick: dict[str, Any], tmp_path: Path
) -> None:
    def dying(step: str, what: str, done: int, total: int) -> None:
        if step == "draw" and done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        study(small_net(), batches(), tmp_path / "run", progress=dying, **quick)
    drawn = counted["draw"]
    resumed = study(small_net(), batches(), tmp_path / "run", **quick)
    assert counted["collect"] == 2 and counted["draw"] == 3 and 2 <= drawn < 4
    whole = study(small_net(), batches(), tmp_path / "other", **quick)
    for site in whole.sites:
        assert list(resumed.run.candidates(site.name)) == list(whole.run.candidates(site.name))


def test_a_killed_build_does_not_fit_again(counted: dict[str, int], quick: dict[str, Any], tmp_path: Path) -> None:
    opened = study(small_net(), batches(), tmp_path / "run", **quick)
    plan = opened.plan("5bits")
    before = counted["fit"]

    def dying(step: str, what: str, done: int, total: int) -> None:
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_plan(opened, plan, tmp_path / "out", progress=dying)
    assert not (tmp_path / "out").exists()
    halfway = counted["fit"] - before
    build_plan(open_study(small_net(), tmp_path / "run"), plan, tmp_path / "out")
    assert halfway >= 1 and counted["fit"] - before <= len(plan.choices)


@pytest.mark.parametrize("gains", [False, True])
def test_one_seed_gives_one_file(gains: bool, quick: dict[str, Any], tmp_path: Path) -> None:
    options = {**quick, "gains": gains} | ({} if not gains else {"damping": None, "forms": ("int", "lowrank")})
    plans = [compress(small_net(), batches(), "5bits", tmp_path / n, seed=4, **options).plan for n in "ab"]
    assert plans[0] == plans[1]
    contents = [(tmp_path / n / "model.safetensors").read_bytes() for n in "ab"]
    assert contents[0] == contents[1]


def test_the_users_seed_is_left_alone(quick: dict[str, Any], tmp_path: Path) -> None:
    module = small_net()
    torch.manual_seed(77)
    state = torch.get_rng_state()
    compress(module, batches(), "5bits", tmp_path / "a", held_out=batches(), **quick)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_larger_budget_never_predicts_more_damage(quick: dict[str, Any], tmp_path: Path) -> None:
    opened = study(small_net(), batches(), tmp_path / "run", **quick)
    plans = [opened.plan(f"{budget}%") for budget in (16, 20, 25, 30, 40, 60, 99)]
    divergences = [plan.divergence for plan in plans]
    assert all(b <= a * (1 + 1e-4) for a, b in pairwise(divergences))
    for plan, budget in zip(plans, (16, 20, 25, 30, 40, 60, 99), strict=True):
        assert plan.stored <= budget / 100 * opened.stored_bytes
    front = opened.planner().front()
    assert front[0][0] == min(size for size, _ in front) and front[-1][1] == 0.0


def test_every_limit_holds(quick: dict[str, Any], tmp_path: Path) -> None:
    opened = study(small_net(), batches(), tmp_path / "run", **quick)
    resident = opened.plan(memory_budget="30%")
    assert resident.resident <= 0.3 * opened.stored_bytes
    damage = opened.plan("30%").divergence
    smallest = opened.plan(divergence=damage * 1.01)
    assert smallest.divergence <= damage * 1.01 and smallest.stored <= 0.3 * opened.stored_bytes


def test_an_unreachable_budget_names_the_smallest_reachable(quick: dict[str, Any], tmp_path: Path) -> None:
    opened = study(small_net(), batches(), tmp_path / "run", **quick)
    with pytest.raises(TersorError, match="out of reach: the smallest plan takes") as caught:
        opened.plan("2%")
    named = int(next(w for w in str(caught.value).split() if w[0].isdigit()).replace(",", ""))
    assert opened.plan(f"{named + 1}B").stored <= named + 1
    with pytest.raises(TersorError, match="out of reach"):
        opened.plan(f"{named - 1}B")


def test_memory_is_what_the_decoded_weights_take(quick: dict[str, Any], tmp_path: Path) -> None:
    """A memory budget counts streams and the integers made of them; the built module keeps to it."""
    opened = study(small_net(), batches(), tmp_path / "run", **{**quick, "forms": ("int", "coded"), "settings": None})
    limit = opened.stored_bytes * 0.3
    plan = opened.plan(memory_budget="30%", forms=("coded",))
    assert plan.stored < plan.resident <= limit < opened.plan("30%", forms=("coded",)).resident
    assert opened.plan(memory_budget="30%").divergence <= plan.divergence
    build_plan(opened, plan, tmp_path / "out")
    assert 0.8 * plan.resident < resident_bytes(opened.model.module) <= plan.resident


def test_a_memory_budget_draws_trellis_codes(quick: dict[str, Any], tmp_path: Path) -> None:
    options = {**quick, "forms": None, "settings": None}
    plain = compress(small_net(), batches(), "30%", tmp_path / "a", **options)
    small = compress(small_net(), batches(), None, tmp_path / "b", memory_budget="30%", **options)
    drawn = [{c.form for c in result.study.run.candidates("4")} for result in (plain, small)]
    assert drawn[1] - drawn[0] == {"trellis"}
    assert small.plan.resident <= 0.3 * small.study.stored_bytes


def test_sequential_building_keeps_coded_sizes(quick: dict[str, Any], tmp_path: Path) -> None:
    options = {**quick, "forms": ("coded",), "settings": None}
    result = compress(small_net(), batches(), "3bits", tmp_path / "out", sequential=True, **options)
    planned = sum(choice.stored for choice in result.study.plan("3bits").choices)
    built = sum(choice.stored for choice in result.plan.choices)
    assert 0.98 * planned < built <= planned and result.plan.stored == result.weights_bytes
    assert result.plan.divergence < 2 * result.study.plan("3bits").divergence


def test_sequential_building_observes_the_built_prefix(quick: dict[str, Any], tmp_path: Path) -> None:
    plain = compress(small_net(), batches(), "3.3bits", tmp_path / "a", **quick)
    module = small_net()
    sequential = compress(module, iter(batches()), "3.3bits", tmp_path / "b", sequential=True, **quick)  # type: ignore[arg-type]
    assert sequential.weights_bytes == plain.weights_bytes
    assert sequential.study.run.get("observed")
    files = [(tmp_path / n / "model.safetensors").read_bytes() for n in "ab"]
    assert files[0] != files[1]


@pytest.mark.parametrize("metric", ["identity", "diagonal", "input", "output", "kronecker"])
def test_every_metric_makes_a_plan(metric: str, quick: dict[str, Any], tmp_path: Path) -> None:
    result = compress(small_net(), batches(), "5bits", tmp_path / "a", metric=metric, **quick)
    assert result.study.run.get("metric") == metric
    assert 0 < result.plan.divergence < 100


def test_one_batch_is_enough(quick: dict[str, Any], tmp_path: Path) -> None:
    assert compress(small_net(), batches(1), "5bits", tmp_path / "a", **quick).weights_bytes > 0


def test_gains_are_measured_on_check_data(quick: dict[str, Any], tmp_path: Path) -> None:
    """Outputs ten times as large have larger errors, so a run that is checked on such data must see larger gains."""

    def gain(run: str, **options: Any) -> float:
        opened = study(small_net(), batches(), tmp_path / run, divergence="mse", **{**quick, "gains": True}, **options)
        return float(opened.run.gain("4", "int"))

    large = [10 * batch for batch in batches(3)]
    assert gain("large", check_data=large) > 10 * gain("same", check_data=batches(3))
    with pytest.raises(TersorError, match="other check data"):
        gain("large", check_data=batches(3))
    with pytest.raises(TersorError, match=r"nowhere\.txt does not exist"):
        gain("missing", check_data="nowhere.txt")
    assert not (tmp_path / "missing").exists()


def test_a_coded_weight_has_a_probe_of_its_own(quick: dict[str, Any], tmp_path: Path) -> None:
    options = {**quick, "gains": True, "forms": ("int", "coded"), "settings": None}
    opened = study(small_net(), batches(), tmp_path / "run", **options)
    gains = opened.run.get("gain/4")["by_form"]
    assert gains["coded"] > 0 and gains["coded"] != gains["int"] == opened.run.gain("4", "int")
    drawn = [c for c in opened.run.candidates("4") if c.form == "coded"]
    site = next(s for s in opened.sites if s.name == "4")
    probe = form_named("coded").probe(site.shape, drawn)
    (near,) = [c for c in drawn if c.setting == probe]
    assert 1.9 < 8 * near.cost.stored / site.parameters < 3.1 and probe.stored is None
    assert form_named("coded").probe(site.shape, []) is None


def test_workers_of_the_engine_agree(quick: dict[str, Any], tmp_path: Path) -> None:
    assert engine.map_units is draw.map_units
    runs = [study(small_net(), batches(), tmp_path / str(n), **{**quick, "workers": n}) for n in (1, 2)]
    for site in runs[0].sites:
        assert list(runs[0].run.candidates(site.name)) == list(runs[1].run.candidates(site.name))
