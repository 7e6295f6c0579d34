"""A form that no plan would use is drawn at a few sites only, and what was not drawn is said, not passed over."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tersor.curves import draw
from tersor.curves.scouts import FAR, giants_of, scouts_of, worth_drawing
from tersor.errors import TersorError
from tersor.forms import Candidate, Cost
from tersor.steps import Study, study

BLOCKS = 9


def site(name: str, shape: tuple[int, int] = (64, 64)) -> Any:
    return SimpleNamespace(name=name, kind="linear", parameter_shape=shape, parameters=shape[0] * shape[1])


def candidate(form: str, stored: int, divergence: float, resident: int | None = None) -> Candidate:
    return Candidate(form, (form, stored), Cost(stored, resident or stored, 1), divergence)  # type: ignore[arg-type]


def test_every_kind_of_site_has_a_scout_from_its_middle() -> None:
    sites = [site(str(n)) for n in range(14)] + [site("wide", (64, 256))]
    assert [s.name for s in scouts_of(sites)] == ["2", "8", "wide"]
    assert [s.name for s in scouts_of(sites[:3])] == ["1"]


def test_a_giant_is_many_times_as_large_as_most_scouts() -> None:
    small = [site(str(n), (64, 64 * n)) for n in (1, 2, 4)]
    assert giants_of(small) == []
    assert giants_of([*small, site("giant", (64, 64 * 32))])[0].name == "giant"
    assert giants_of([]) == giants_of(small[:1]) == []


def forms_worth(curves: list[list[Candidate]], resources: list[str]) -> dict[str, int]:
    return {form: len(settings) for form, settings in worth_drawing(curves, resources).items()}


def test_a_setting_is_worth_drawing_where_it_comes_near_to_other_forms() -> None:
    good = [candidate("good", size, 2.0**-size, resident=4 * size) for size in (0, 2, 4, 6)]
    bad = [candidate("bad", size, 2.0 ** (1 - size)) for size in (2, 3, 5)]
    assert forms_worth([good + bad], ["stored"]) == {"good": 3}
    assert forms_worth([good + bad], ["stored", "resident"]) == {"good": 3, "bad": 2}
    near = [candidate("near", 3, 1.05 * 2.0**-3), candidate("near", 5, 1.2 * 2.0**-5)]
    assert forms_worth([good + bad, good + near], ["stored"]) == {"good": 3, "near": 1}
    assert forms_worth([bad], ["stored"]) == {"bad": 1}  # two of three are ruin


class Net(nn.Module):
    """Rotations one after the other: nothing in them has a low rank."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(nn.Linear(96, 96) for _ in range(BLOCKS)))
        for block in self.blocks:
            nn.init.orthogonal_(block.weight)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.blocks(x)
        return found


def studied(run: Path, **options: Any) -> Study:
    torch.manual_seed(0)
    net, generator = Net(), torch.Generator().manual_seed(0)
    batches = [torch.randn(200, 96, generator=generator) for _ in range(5)]
    return study(net, batches, run, forms=("coded", "lowrank"), workers=1, **options)


def test_the_rest_is_drawn_when_it_is_asked_for(tmp_path: Path) -> None:
    opened = studied(tmp_path / "run", resources=("stored",))
    drawn = [s.name for s in opened.sites if opened.run.is_drawn(s.name, "lowrank")]
    assert drawn == [s.name for s in scouts_of(opened.sites)] and len(drawn) == 2
    assert all(opened.run.is_drawn(s.name, "coded") for s in opened.sites)
    gains = [opened.run.get(f"gain/{site.name}")["by_form"].keys() for site in opened.sites]
    assert all(forms == {"coded"} for forms in gains)  # at scouts too: no plan would use the other
    sparing = opened.plan("3bits")
    with pytest.raises(TersorError, match="lowrank: drawn in part only"):
        opened.plan("3bits", forms=["lowrank"])
    with pytest.raises(TersorError, match="drew what limits on other costs need"):
        opened.plan("3bits", memory_budget="90%")
    with pytest.raises(TersorError, match="drew what limits on other costs need"):
        opened.plan("3bits", flops_budget="90%")
    opened = studied(tmp_path / "run")
    assert all(opened.run.is_drawn(s.name, "lowrank") for s in opened.sites)
    assert opened.plan("6bits", forms=["lowrank"]).stored > 0
    assert sparing.divergence == pytest.approx(opened.plan("3bits").divergence, rel=0.01)


def test_forms_that_are_needed_for_another_cost_are_drawn_for_it(tmp_path: Path) -> None:
    opened = studied(tmp_path / "run", resources=("stored", "resident"))
    assert opened.plan("6bits", memory_budget="90%").resident > 0


class Speaker(nn.Module):
    """A table many times as large as the rotations behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.net = nn.Embedding(3000, 96), Net()

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.net(self.table(x))
        return found


def test_a_giant_draws_what_the_small_scouts_showed_and_forms_of_tables_are_drawn_there_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randint(3000, (200,), generator=generator) for _ in range(5)]
    monkeypatch.setattr(draw, "APART", 9000)  # so that scouts of both sizes draw a form a unit
    steps: list[tuple[str, int]] = []
    forms = ("coded", "lowrank", "rows")
    opened = study(
        Speaker(), batches, tmp_path / "run", forms=forms, workers=1, resources=("stored",),
        progress=lambda step, what, done, total: steps.append((what, done)) if step == "draw" else None,
    )  # fmt: skip
    drawn = {s.name: {form for form in forms if opened.run.is_drawn(s.name, form)} for s in opened.sites}
    scouts = {s.name for s in scouts_of(opened.sites)}
    assert drawn.pop("table") == {"coded", "rows"}
    assert all(found == ({"coded", "lowrank"} if name in scouts else {"coded"}) for name, found in drawn.items())
    assert sorted(name for name, _ in steps[1:]) == sorted(s.name for s in opened.sites)
    assert steps[-1][1] == len(opened.sites)
    for form in ("lowrank", "rows"):
        with pytest.raises(TersorError, match=f"{form}.*drawn in part only"):
            opened.plan("3bits", forms=[form])


class Placed(nn.Module):
    """The same with a small table of rank one beside the large one."""

    def __init__(self) -> None:
        super().__init__()
        self.speaker, self.places = Speaker(), nn.Embedding(200, 96)
        with torch.no_grad():
            self.places.weight.copy_(torch.outer(torch.randn(200), torch.randn(96)))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.speaker.net(self.speaker.table(x) + self.places(torch.arange(len(x))))
        return found


def test_a_giant_draws_too_what_came_near_at_small_scouts_of_another_kind(tmp_path: Path) -> None:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randint(3000, (200,), generator=generator) for _ in range(5)]
    forms = ("coded", "lowrank", "int")
    opened = study(Placed(), batches, tmp_path / "run", forms=forms, workers=1, resources=("stored",))
    curves = [[c for c in opened.run.candidates("places") if c.form in forms]]
    assert "coded" not in worth_drawing(curves, ["stored"], FAR)
    assert opened.run.is_drawn("speaker.table", "coded") and opened.run.is_drawn("speaker.table", "lowrank")
    assert not opened.run.is_drawn("speaker.table", "int")
