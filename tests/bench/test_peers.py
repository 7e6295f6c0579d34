"""The accounts of `script/bench peers`: bytes of files, divergences at equal bytes, plans of touched sites alone."""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch import nn

import tersor
from peers.adapters import task
from peers.equal import best_at, bits_of, interpolated, whole_bytes
from peers.ours import NEAR, NEAR_BITS, Ours, plan_at
from peers.processes import watched
from peers.running import reason_in
from peers.settings import label_of, settings_of
from peers.setup import PEERS, requirements_of


def test_a_file_keeps_what_the_peer_left_alone() -> None:
    assert whole_bytes(1000, 800, 100) == 300
    assert whole_bytes(1000, 0, 0) == 1000
    assert bits_of({"stored": 100, "touched_bytes": 800}) == 4.0


def test_interpolation_is_a_line_in_both_logarithms() -> None:
    curve = [(100.0, 1.0), (400.0, 0.01)]
    assert interpolated(curve, 100) == 1.0
    assert interpolated(curve, 400) == 0.01
    assert interpolated(curve, 200) == pytest.approx(math.sqrt(1.0 * 0.01))
    power = [(size, 3.0 * size**-2.5) for size in (10.0, 40.0, 90.0)]
    assert interpolated(power, 63.0) == pytest.approx(3.0 * 63.0**-2.5)


def test_a_tool_has_nothing_below_its_smallest_and_stays_at_its_best_above() -> None:
    curve = [(400.0, 0.01), (100.0, 1.0), (500.0, 0.5)]  # the largest does more damage than a smaller one
    assert interpolated(curve, 99) is None
    assert interpolated(curve, 450) == 0.01
    assert interpolated(curve, 1e9) == 0.01


def test_the_best_tool_is_that_of_the_least_divergence_at_the_size() -> None:
    rows = [
        {"tool": "a", "bytes": 100, "divergence": {"value": 1.0}},
        {"tool": "a", "bytes": 400, "divergence": {"value": 0.01}},
        {"tool": "b", "bytes": 150, "divergence": {"value": 0.2}},
        {"tool": "c", "failed": "it is not here"},
    ]
    assert best_at(rows, 149)[0] == "a"
    assert best_at(rows, 160) == ("b", 0.2)
    assert best_at(rows, 400) == ("a", 0.01)


def test_a_plan_of_the_touched_sites_leaves_all_others_and_keeps_to_the_bytes(
    tmp_path: Path, conv_net, images, quick
) -> None:
    opened = tersor.study(conv_net(), images(), tmp_path / "run", **quick)
    touched = {opened.sites[-1].parameter_name}
    whole = plan_at(opened.planner(), opened.stored_bytes, None)
    stored = opened.stored_bytes - opened.sites[-1].nbytes * 3 // 4
    plan = plan_at(opened.planner(), stored, touched)
    assert plan.stored <= stored
    assert [c.form == tersor.steps.UNTOUCHED for c in plan.choices] == [True] * (len(opened.sites) - 1) + [False]
    assert whole.divergence <= plan.divergence


def test_a_plan_stands_for_peers_of_hardly_more_bytes_and_for_none_of_fewer() -> None:
    subject = SimpleNamespace(bytes_of=lambda names: 32_000)
    ours = Ours(subject, None, Path())
    most = int(1000 * (1 + NEAR))
    assert [ours.standing_for(size, None) for size in (1000, most, most + 1, 999)] == [1000, 1000, most + 1, 999]
    most = 70_000 + int(1000 * NEAR_BITS)
    assert [ours.standing_for(size, ["w"]) for size in (70_000, most, most + 1)] == [70_000, 70_000, most + 1]


def test_every_peer_has_pinned_requirements_settings_and_an_adapter() -> None:
    adapters = Path(task.__file__).parent
    for peer in PEERS:
        lines = requirements_of(peer).read_text(encoding="utf8").splitlines()
        assert all("==" in line for line in lines), peer
        assert any(line.startswith("torch==") for line in lines), peer
        assert (adapters / f"with_{peer.replace('-', '_')}.py").exists()
        settings = [s for model in ("babyllama", "pylm", "minilm", "resnet56") for s in settings_of(peer, model)]
        assert settings
        assert len({label_of(s) for s in settings}) == len({json.dumps(s, sort_keys=True) for s in settings})


def test_an_adapter_counts_what_is_stored_and_writes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.Linear(4, 3)
    given = SimpleNamespace(folder=tmp_path, setting={"bits": 8})
    monkeypatch.setattr(task, "version", lambda name: "1")
    task.write_result(given, {"w": layer.weight}, {"w": 24}, {"seconds": 1.0, "cpu_seconds": 1.0}, ("peer",))
    found = json.loads((tmp_path / "result.json").read_text(encoding="utf8"))
    assert (found["stored"], found["touched"]) == (24, ["w"])
    with pytest.raises(AssertionError):
        task.write_result(given, {"w": layer.weight}, {}, {}, ())


def test_the_reason_of_a_failure_is_the_last_error_that_the_log_names() -> None:
    log = "loading\nTraceback\nValueError: 35 is odd\n  at the end\n"
    assert reason_in(log, 1) == "ValueError: 35 is odd"
    assert reason_in("", 137) == "ended with 137"


def test_memory_is_that_of_a_command_and_its_children_and_too_long_is_told(tmp_path: Path) -> None:
    held = "import subprocess, sys, time; kept = bytearray(120 << 20); time.sleep(1)"
    both = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {held!r}])"
    code, peak = watched([sys.executable, "-c", both], tmp_path, os.environ, None, 60)
    assert code == 0
    assert 120 << 20 < peak < 400 << 20
    slow = [sys.executable, "-c", "print('here', flush=True); import time; time.sleep(60)"]
    assert watched(slow, tmp_path, os.environ, tmp_path / "log.txt", 2)[0] is None
    assert (tmp_path / "log.txt").read_text() == "here\n"
