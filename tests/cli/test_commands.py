"""The commands on a tiny model: examples as written, JSON alone on stdout, silence when asked for."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import save_file
from typer.testing import CliRunner

from tersor.cli import COMMANDS, app
from tersor.cli.runs import CLEAN_EXAMPLE
from tersor.run import Run


def words_of(example: str) -> list[str]:
    return example.replace("\\\n", " ").split()[1:]


EXAMPLES = {command.__name__: example for command, example in COMMANDS}
LATER = [name for name in EXAMPLES if name != "compress"]


def test_help_imports_nothing_heavy() -> None:
    heavy = "{'torch', 'numpy', 'scipy', 'transformers', 'plotly', 'safetensors'}"
    code = f"import sys, tersor.cli; found = {heavy} & set(sys.modules); assert not found, found"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", EXAMPLES)
def test_help_ends_with_the_example(name: str) -> None:
    result = CliRunner().invoke(app, [name, "--help"], terminal_width=200)
    assert result.exit_code == 0
    end = [line.strip() for line in result.stdout.rstrip().splitlines()]
    lines = [line.strip() for line in EXAMPLES[name].splitlines()]
    assert end[-len(lines) :] == lines


def test_compress_ends_with_the_judge(demo: Path) -> None:
    shown = (demo / "compress.txt").read_text()
    for words in (
        "bytes on disk",
        "divergence (nats)",
        "as predicted",
        "measured / predicted",
        "perplexity",
        "latency",
    ):
        assert words in shown
    assert (demo / "demo/small/model.safetensors").exists()


@pytest.mark.parametrize("name", LATER)
def test_example_runs_as_written(name: str, tersor: Callable[..., Any]) -> None:
    result = tersor(*words_of(EXAMPLES[name]))
    assert result.exit_code == 0, result.stderr
    assert result.stdout.strip()
    assert "Warning" not in result.stderr + result.stdout


@pytest.mark.parametrize("name", EXAMPLES)
def test_json_alone_on_stdout(name: str, tersor: Callable[..., Any]) -> None:
    result = tersor(*words_of(EXAMPLES[name]), "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)
    assert result.stderr == ""


@pytest.mark.parametrize("name", ["study", "front", "plan", "show", "methods", "forms", "report"])
def test_quiet_prints_nothing(name: str, tersor: Callable[..., Any]) -> None:
    result = tersor(*words_of(EXAMPLES[name]), "--quiet")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "")


def test_front_and_plan_need_no_model(demo: Path, tersor: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tersor.models.open_model", None)
    monkeypatch.setattr("tersor.steps.opening.open_model", None)
    points = json.loads(tersor("front", "demo/small.run", "--json").stdout)["front"]
    sizes, damages = [p["stored"] for p in points], [p["divergence"] for p in points]
    assert 5 <= len(points) <= 15
    assert sizes == sorted(sizes) and damages == sorted(damages, reverse=True)
    assert sizes[-1] == (demo / "demo/model/model.safetensors").stat().st_size
    limits = [p["limit"] for p in points]
    assert limits == sorted(limits, reverse=True)
    assert all(p["times_limit"] == p["divergence"] / p["limit"] for p in points[:-1])
    made = json.loads(tersor("plan", "demo/small.run", "--budget", "12%", "--json").stdout)
    assert made["plan"]["name"] == "12%" and made["share"] <= 0.12
    assert made["times_limit"] == made["plan"]["divergence"] / made["limit"]


def test_plan_is_built_by_name_to_the_byte(demo: Path, tersor: Callable[..., Any]) -> None:
    planned = json.loads(tersor("plan", "demo/small.run", "--budget", "14%", "--json").stdout)
    result = tersor("build", "demo/small.run", "--plan", "14%", "--out", "demo/named", "--json")
    assert result.exit_code == 0, result.stderr
    size = (demo / "demo/named/model.safetensors").stat().st_size
    # where a coded size was interpolated the plan promises no more than it
    assert 0.99 * planned["stored_bytes"] < size <= planned["stored_bytes"]
    assert size == json.loads(result.stdout)["stored_bytes"]


def test_forms_may_be_restricted(tersor: Callable[..., Any]) -> None:
    arguments = ("plan", "demo/small.run", "--budget", "20%", "--json", "--forms")
    made = json.loads(tersor(*arguments, "coded").stdout)
    assert {f["form"] for f in made["forms"]} <= {"coded", "untouched"}
    assert made["plan"]["name"] == "20%,coded"
    refused = tersor(*arguments, "lowrank")  # compress draws what its budget needs
    assert refused.exit_code == 2 and "drawn in part only in demo/small.run; call `tersor study`" in refused.stderr


def test_sites_alone_go_into_the_ledger(demo: Path, tersor: Callable[..., Any]) -> None:
    from tersor.run import Run

    arguments = ("--model", "demo/model", "--data", "demo/held-out.txt", "--run", "demo/small.run", "--sites", "--json")
    found = json.loads(tersor("judge", "demo/small", *arguments).stdout)
    assert found["sites"] and all(s["low"] <= s["measured"] <= s["high"] for s in found["sites"])
    plan = json.loads((demo / "demo/small/tersor.json").read_text())["plan"]
    rows = {site for name, site, *_ in Run(demo / "demo/small.run").ledger() if name == plan["name"]}
    assert rows == {"*", *(c["site"] for c in plan["choices"] if c["form"] != "untouched")}


def test_rounded_inputs_are_built_measured_and_shown(demo: Path, tersor: Callable[..., Any]) -> None:
    options = ("--activations", "int4,tensor,shift,dither", "--data", "demo/calibration.txt", "--sequence-length", "32")
    built = tersor("build", "demo/small.run", "--budget", "16%", "--out", "demo/rounded", *options, "--json")
    assert built.exit_code == 0, built.stderr
    found = json.loads(built.stdout)
    size = (demo / "demo/rounded/model.safetensors").stat().st_size
    assert size == found["stored_bytes"] <= 0.16 * found["original_bytes"]
    layers = found["activations"]["layers"]
    assert found["plan"]["name"] == "16%,activations=int4,tensor,shift,dither"
    arguments = ("--model", "demo/model", "--data", "demo/held-out.txt", "--sites", "--json")
    measured = json.loads(tersor("judge", "demo/rounded", *arguments).stdout)["sites"]
    alone = {s["site"]: s["predicted"] for s in measured}
    assert all(alone[f"{place} (inputs)"] == values["divergence"] for place, values in layers.items())
    assert f"Inputs of {len(layers)} layers rounded (int4,tensor,shift,dither" in tersor("show", "demo/rounded").stdout
    lacking = tersor("build", "demo/small.run", "--budget", "16%", "--out", "demo/no", "--activations", "int8")
    assert lacking.exit_code == 2 and "--data goes with --activations" in lacking.stderr


def test_show_tells_bytes_damage_and_what_was_left(tersor: Callable[..., Any]) -> None:
    for what in ("demo/small", "demo/small.run"):
        shown = tersor("show", what).stdout
        for words in (
            "→",
            "Limit at these bytes",
            "Bytes by form",
            "Most damage",
            "Left untouched",
            "of the original",
        ):
            assert words in shown


def test_factory_with_weights_and_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    factory = "import torch\nMEAN = STD = [0.5, 0.5, 0.5]\n\ndef small():\n    return torch.nn.Sequential(\n"
    factory += (
        "        torch.nn.Conv2d(3, 64, 4, stride=4), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(256, 32))\n"
    )
    (tmp_path / "net.py").write_text(factory)
    scope: dict[str, Any] = {}
    exec(factory, scope)
    save_file(scope["small"]().state_dict(), tmp_path / "net.safetensors")
    generator = np.random.default_rng(0)
    images = generator.integers(0, 255, (40, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", images=images, labels=generator.integers(0, 10, 40))
    arguments = "compress net.py:small --weights net.safetensors --data images.npz --held-out images.npz --forms int"
    more = "--budget 50% --out small --workers 1 --include 3 --json"
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, f"{arguments} {more}".split())
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert {s["name"] for s in found["judgement"]["scores"]} == {"agreement of top-1", "accuracy"}
    again = CliRunner().invoke(app, ["build", "small.run", "--budget", "60%", "--out", "larger"])
    assert again.exit_code == 0, again.stderr


def test_runs_are_listed_and_removed(tersor: Callable[..., Any], demo: Path, tmp_path: Path) -> None:
    (whole,) = (run for run in json.loads(tersor("runs", "demo", "--json").stdout) if run["plans"])
    assert whole["state"] == "judged" and whole["model"] == "model" and whole["size"] > 10_000
    assert "judged" in tersor("runs", "demo").stdout and "removed" in tersor(*words_of(CLEAN_EXAMPLE)).stdout
    copied = tmp_path / "runs" / "one"
    shutil.copytree(demo / whole["folder"], copied)
    (tmp_path / "runs" / "two").mkdir()
    (tmp_path / "runs" / "two" / "run.db").write_text("no database")
    listed = json.loads(tersor("runs", str(tmp_path), "--json").stdout)
    assert {Path(run["folder"]).name: run["state"] for run in listed} == {"one": "judged", "two": "damaged"}
    assert tersor("runs", "clean", str(tmp_path)).exit_code == 1 and copied.exists()  # nobody answers
    assert tersor("runs", "clean", str(tmp_path), "--unfinished", "--yes").exit_code == 0
    assert copied.exists() and not (tmp_path / "runs" / "two").exists()
    with Run(copied).alone():
        assert json.loads(tersor("runs", "clean", str(tmp_path), "--yes", "--json").stdout) == []
    assert len(json.loads(tersor("runs", "clean", str(tmp_path), "--yes", "--json").stdout)) == 1
    assert not copied.exists() and tersor("runs", "nowhere").exit_code != 0
