"""Every case of the corpus is refused by the command that reads it: one sentence, status 2, and nothing written."""

from __future__ import annotations

import hashlib
import os
import resource
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tersor.cli import app

pytest.importorskip("transformers")
pytest.importorskip("pyarrow")

import corpus

GREW = 1 << 20  # KiB that the process may grow by, over all cases
REFUSED: set[str] = set()


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus") / "base"
    corpus.make_base(folder)
    return folder


def snapshot(folder: Path) -> dict[str, tuple[int, str]]:
    """All that lies in a folder: kinds, and hashes of what is in files."""
    found = {}
    for path in sorted(folder.rglob("*")):
        mode = path.lstat().st_mode
        content = path.read_bytes() if stat.S_ISREG(mode) and path.stat().st_size < 1 << 26 else b""
        found[str(path.relative_to(folder))] = mode, hashlib.sha256(content).hexdigest()
    return found


@pytest.mark.parametrize("name", corpus.CASES)
def test_refused(name: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "case"
    line, named = corpus.make(base, folder, name)
    before, most = snapshot(folder), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    monkeypatch.chdir(folder)
    result = CliRunner().invoke(app, [*line.split(" "), "--json"])
    assert result.exit_code == 2, (result.exit_code, result.stderr)
    sentence = result.stderr.rstrip("\n")
    assert named in sentence and sentence.isprintable() and len(sentence) < 700, sentence
    assert sentence.endswith((".", "?")) and "Traceback" not in sentence
    assert result.stdout == "" and os.getcwd() == str(folder)
    assert snapshot(folder) == before
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - most < GREW
    REFUSED.add(name)


def test_the_base_is_sound(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(base)
    for line in ("show coded", "show study.run", "verify trellis", "verify coded --model model --data text.txt"):
        result = CliRunner().invoke(app, [*line.split(" "), "--json"])
        assert result.exit_code == 0, result.stderr


def test_there_are_many_and_each_says_what_is_wrong(counted: Callable[[str], None]) -> None:
    assert len(corpus.CASES) >= 40
    counted(f"{len(REFUSED)} of {len(corpus.CASES)} damaged and hostile files refused")
    assert all((spoil.__doc__ or "").strip().endswith((".", "?")) for spoil in corpus.CASES.values())
