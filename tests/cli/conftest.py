"""A folder as `script/demo` leaves it, with a tiny model: the examples of the help run in it as written."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tersor.cli import app
from tersor.cli.compress import EXAMPLE
from tiny_models import write_model, write_texts


@contextmanager
def inside(folder: Path) -> Iterator[None]:
    """The folder as the current one."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which `demo/` lies, after the example of `compress` has run."""
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("clone")
    (folder / "demo").mkdir()
    write_model(folder / "demo" / "model")
    write_texts(folder / "demo" / "calibration.txt", 24, 0)
    write_texts(folder / "demo" / "held-out.txt", 8, 1)
    with inside(folder):
        result = CliRunner().invoke(app, [*EXAMPLE.replace("\\\n", " ").split()[1:], "--workers", "1"])
    assert result.exit_code == 0, result.stderr
    (folder / "compress.txt").write_text(result.stdout)
    return folder


@pytest.fixture
def tersor(demo: Path) -> Callable[..., Any]:
    """Run `tersor` with some arguments in the folder of the demo."""

    def run(*arguments: str) -> Any:
        with inside(demo):
            return CliRunner().invoke(app, list(arguments))

    return run
