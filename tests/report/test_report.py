"""The account of a plan adds up; tables say it; the page needs nothing but itself."""

from __future__ import annotations

import re
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from torch import nn

from tersor.build.layout import Layout
from tersor.errors import TersorError
from tersor.report import account, tables
from tersor.report.front import front_points
from tersor.steps import Study, build_plan, judge_artifact, limit_of, plan_named, plan_run, planner_of, study


@pytest.fixture
def studied(
    tmp_path: Path, conv_net: Callable[[], nn.Module], images: Callable[..., list[Any]], quick: dict[str, Any]
) -> Study:
    return study(conv_net(), images(), tmp_path / "run", **quick)


def shown(*renderables: Any) -> str:
    console = Console(file=StringIO(), width=100)
    for renderable in renderables:
        console.print(renderable)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_layout_survives_json_and_counts_the_same(studied: Study) -> None:
    layout = Layout.from_json(studied.run.get("layout"))
    assert layout == Layout.from_json(layout.as_json())
    assert layout.sites == studied.sites
    made = plan_run(studied.run, "50%")
    assert layout.file_bytes([c for c in made.choices if c.form != "untouched"]) == made.stored


def test_account_adds_up(studied: Study) -> None:
    made = plan_run(studied.run, "40%")
    found = account.account_of_run(studied.run, "40%")
    assert sum(f.sites for f in found.forms()) == len(studied.sites)
    assert sum(f.weights for f in found.forms()) == sum(s.parameters for s in studied.sites)
    assert sum(c.stored for c in found.approximated) + found.untouched_bytes == made.stored
    assert sum(size for *_, size in found.reasons()) <= found.untouched_bytes
    damages = [c.divergence for c in found.worst()]
    assert damages == sorted(damages, reverse=True)


def test_artifact_and_run_give_the_same_account(
    tmp_path: Path, studied: Study, conv_net: Callable[[], nn.Module], images: Callable[..., list[Any]]
) -> None:
    made = plan_run(studied.run, "40%")
    build_plan(studied, made, tmp_path / "out")
    of_run, of_artifact = account.account_of_run(studied.run, "40%"), account.account_of_artifact(tmp_path / "out")
    assert of_artifact.weights == of_run.weights and of_artifact.untouched == of_run.untouched
    assert of_artifact.plan.stored == (tmp_path / "out/model.safetensors").stat().st_size == of_run.plan.stored
    assert plan_named(studied.run, "40%") == made
    assert of_artifact.limit == of_run.limit is not None


def test_points_of_the_front_fall(studied: Study) -> None:
    points = front_points(planner_of(studied.run), studied.stored_bytes, count=6)
    assert [p.stored for p in points] == sorted(p.stored for p in points)
    assert points[-1].divergence == 0
    assert all(sum(p.forms.values()) == pytest.approx(1) for p in points)
    assert "untouched 100 %" in shown(tables.front_table(points, "nats"))


def test_the_limit_stands_beside_every_plan(studied: Study) -> None:
    made, limit = plan_run(studied.run, "40%"), limit_of(studied.run)
    assert limit is not None
    found = account.account_of_run(studied.run, "40%")
    assert found.limit == limit.divergence(made.stored)
    assert found.times_limit == made.divergence / limit.divergence(made.stored) > 1
    values = found.as_json()
    assert (values["limit"], values["times_limit"]) == (found.limit, found.times_limit)
    assert "Limit at these bytes: " in shown(*tables.account_tables(found))
    points = front_points(planner_of(studied.run), studied.stored_bytes, count=6, limit=limit)
    assert [p.limit for p in points] == [limit.divergence(p.stored) for p in points]
    assert points[-1].times_limit is None  # the original as it is stored has no divergence
    text = shown(tables.front_table(points, "nats"))
    assert "the limit" in text and "times the limit" in text


def test_a_run_without_spectra_shows_no_limit(studied: Study, tmp_path: Path) -> None:
    plan_run(studied.run, "40%")
    studied.run.put("spectra", None)
    found = account.account_of_run(studied.run, "40%")
    assert found.limit is None and found.as_json()["times_limit"] is None
    points = front_points(planner_of(studied.run), studied.stored_bytes, limit=limit_of(studied.run))
    text = shown(*tables.account_tables(found), tables.front_table(points, "nats"))
    assert "limit" not in text.lower()
    pytest.importorskip("plotly")
    from tersor.report.html import write_report

    write_report(studied.run, tmp_path / "report.html")
    assert "the limit" not in (tmp_path / "report.html").read_text(encoding="utf8")


def test_unknown_plan_names_those_there_are(studied: Study) -> None:
    plan_run(studied.run, "40%")
    with pytest.raises(TersorError, match="its plans are: 40%"):
        plan_named(studied.run, "41%")


def test_tables_speak_of_names_with_brackets(studied: Study) -> None:
    plan_run(studied.run, "40%")
    found = account.account_of_run(studied.run, "40%")
    text = shown(*tables.account_tables(found))
    assert "of the original" in text and "Left untouched" in text and "under 4096 weights" in text
    rows = [("layers[0].[red]weight", 0.1, 0.2, 0.1, 0.3)]
    assert "layers[0].[red]weight" in shown(tables.ledger_table(rows, "nats"))


def test_page_needs_nothing_but_itself(
    tmp_path: Path, studied: Study, conv_net: Callable[[], nn.Module], images: Callable[..., list[Any]]
) -> None:
    pytest.importorskip("plotly")
    from tersor.report.html import write_report

    write_report(studied.run, tmp_path / "before.html")
    original = conv_net()
    original.load_state_dict(studied.model.module.state_dict())
    made = plan_run(studied.run, "40%")
    build_plan(studied, made, tmp_path / "out")
    from tersor.models import open_model

    judge_artifact(open_model(original), tmp_path / "out", images(labels=True), run=studied.run)
    studied.run.put("source", "<odd>")
    write_report(studied.run, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf8")
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=", page)
    assert "<odd>" not in page and "&lt;odd&gt;" in page
    for title in (
        "The front",
        "Where the bytes went",
        "Damage by site",
        "Predicted against measured",
        "Damping",
        "Time",
    ):
        assert f"<h2>{title}</h2>" in page
    assert page.count("Plotly.newPlot(") >= 6
    assert "Dashed: the limit" in page and "independent Gaussians" in page and "<th>the limit</th>" in page
    assert '"name":"the limit"' in page and '"dash":"dash"' in page
    with pytest.raises(TersorError, match="does not exist"):
        write_report(studied.run, tmp_path / "nothing/report.html")


def test_the_figure_of_damping_follows_its_evidence() -> None:
    """Each damping ran while the others stood; what is chosen is marked, what was never tried is not drawn."""
    pytest.importorskip("plotly")
    from tersor.report.figures import damping_figure

    def tried(inputs: float, gradients: float, held_back: float) -> dict[str, Any]:
        values = {"inputs": inputs, "gradients": gradients, "frequencies": 0.3}
        return {**values, "fitted": 2.0, "held_back": held_back, "table": False}

    runs = [tried(0.01, 0.3, 9.0), tried(0.1, 0.3, 4.0), tried(1.0, 0.3, 6.0)]
    runs += [tried(0.1, 0.01, 5.0), tried(0.1, 0.1, 3.0), tried(0.1, 0.3, 4.0)]
    drawn = damping_figure(runs, {"inputs": 0.1, "gradients": 0.1, "frequencies": 0.3}).data
    assert [line.name for line in drawn] == ["inputs", "gradients"]
    assert list(drawn[0].x) == [0.01, 0.1, 1.0] and list(drawn[0].y) == [4.5, 2.0, 3.0]
    assert list(drawn[1].x) == [0.01, 0.1, 0.3] and list(drawn[1].y) == [2.5, 1.5, 2.0]
    assert list(drawn[0].marker.symbol) == ["circle", "diamond", "circle"]
