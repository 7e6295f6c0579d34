"""Bad input gives one sentence on stderr, a status other than zero, and leaves nothing behind."""

from __future__ import annotations

import errno
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer

from tersor.cli.console import guarded, sentence_of
from tersor.errors import TersorError

COMPRESS = "compress demo/model --data demo/calibration.txt --out demo/bad "
BAD = {
    COMPRESS.replace("demo/model", "demo/nothing") + "--budget 8%": "neither a model folder",
    COMPRESS.replace("calibration", "nothing") + "--budget 8%": "nothing.txt does not exist",
    COMPRESS.replace("calibration.txt", "empty.txt") + "--budget 8%": "empty.txt is empty",
    COMPRESS.replace("calibration.txt", "arrays.npz") + "--budget 8%": "reads text",
    COMPRESS.replace("demo/model", "demo/truncated") + "--budget 8%": "damaged",
    COMPRESS: "Give a limit",
    COMPRESS + "--budget plenty": "not understood",
    COMPRESS + "--budget 8": "has no unit",
    COMPRESS + "--divergence -1": "above zero",
    COMPRESS + "--budget 8% --held-out demo/nothing.txt": "nothing.txt does not exist",
    COMPRESS + "--budget 8% --pairs demo/nothing.csv": "nothing.csv does not exist",
    COMPRESS + "--budget 8% --forms imt": "did you mean 'int'",
    COMPRESS + "--budget 8% --method gtpq": "did you mean 'gptq'",
    COMPRESS + "--budget 8% --metric kronneker": "no metric",
    COMPRESS + "--budget 8% --divergence-name ll": "did you mean 'kl'",
    COMPRESS + "--budget 8% --exclude nothing*": "matches no site",
    COMPRESS + "--budget 8% --device nothing": "not at hand",
    COMPRESS.replace("demo/bad", "demo") + "--budget 8%": "choose another folder",
    "study demo/model --data demo/held-out.txt --run demo/small.run": "made for other calibration data",
    "plan demo/small.run --budget 100B": "out of reach: the smallest plan takes",
    "plan demo/small.run": "Give a limit",
    "plan demo/model --budget 8%": "no run folder",
    "build demo/small.run --plan nothing --out demo/bad": "its plans are: 8%",
    "build demo/small.run --plan 8% --budget 9% --out demo/bad": "not both",
    "judge demo/model --model demo/model --data demo/held-out.txt": "no artifact of Tersor",
    "export demo/model demo/bad --to dense": "no artifact of Tersor",
    "export demo/small demo/bad --to awq": "no format 'awq'",
    "export demo/small demo/bad --to gptq": "--forms portable",
    "export demo/small demo/bad --to dense --dtype int8": "no dtype 'int8'",
    "export demo/small demo/bad --to gptq --rest sparse": "not 'sparse'",
    "export demo/small demo/model --to dense": "choose another folder",
    "show demo": "neither a run folder",
    "report demo/small.run --out demo/nothing/report.html": "does not exist",
    "methods gtpq": "did you mean 'gptq'",
}


@pytest.fixture
def bad_files(demo: Path) -> Path:
    import numpy as np

    (demo / "demo/empty.txt").write_text("")
    np.savez(demo / "demo/arrays.npz", np.zeros((4, 3)))
    (demo / "demo/truncated").mkdir(exist_ok=True)
    whole = (demo / "demo/model/model.safetensors").read_bytes()
    (demo / "demo/truncated/config.json").write_bytes((demo / "demo/model/config.json").read_bytes())
    (demo / "demo/truncated/model.safetensors").write_bytes(whole[: len(whole) // 2])
    return demo


@pytest.mark.parametrize("line", BAD)
def test_one_sentence_and_nothing_left(line: str, bad_files: Path, tersor: Callable[..., Any]) -> None:
    before = {p.relative_to(bad_files) for p in bad_files.rglob("*")}
    result = tersor(*line.split())
    assert result.exit_code == 2
    assert BAD[line] in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1 and result.stdout == ""
    assert {p.relative_to(bad_files) for p in bad_files.rglob("*")} == before


def test_usage_errors_have_status_two(tersor: Callable[..., Any]) -> None:
    assert tersor("compress", "demo/model").exit_code == 2
    assert tersor("nothing").exit_code == 2
    assert tersor("compress", "m", "--data", "d", "--out", "o", "--samples", "0").exit_code == 2


def run_with(error: BaseException, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    @guarded
    def command() -> None:
        raise error

    with pytest.raises(typer.Exit) as stopped:
        command()
    return stopped.value.exit_code, capsys.readouterr().err.strip()


def test_interruption_has_status_130(capsys: pytest.CaptureFixture[str]) -> None:
    status, sentence = run_with(KeyboardInterrupt(), capsys)
    assert status == 130 and sentence.startswith("Interrupted")


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        sqlite3.OperationalError("database or disk is full"),
        TersorError("out/model.safetensors could not be written: No space left on device (os error 28)."),
    ],
)
def test_full_disk_is_said(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    status, sentence = run_with(error, capsys)
    assert status == 1 and sentence.startswith("The disk is full") and len(sentence.splitlines()) == 1


def test_what_nobody_foresaw_keeps_its_traceback_in_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    status, sentence = run_with(ZeroDivisionError("of two\nlines"), capsys)
    assert status == 1 and "ZeroDivisionError: of two lines" in sentence and "Traceback" not in sentence
    assert "Traceback" in next(tmp_path.glob("tersor-*.log")).read_text()


def test_memory_that_ran_out_is_said() -> None:
    assert "batch-size" in sentence_of(RuntimeError("CUDA out of memory. Tried to allocate"))
