"""Random weights and metrics, tiny models and their batches: what the tests of several folders share."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tersor.metrics import Metric, Side
from tiny_models import ConvNet, draw_model, image_batches, token_batches

LADDERS = {"int": [{"bits": 2, "group_size": 32}, {"bits": 3, "group_size": 32}, {"bits": 4, "group_size": 32}]}
DAMPING = {"inputs": 0.03, "gradients": 0.3, "frequencies": 0.3}
QUICK: dict[str, Any] = {"forms": ("int",), "settings": LADDERS, "damping": DAMPING, "gains": False, "workers": 1}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="every fault and fifty kills, where a few are tried else")


@pytest.fixture
def long(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--long"))


@pytest.fixture
def counted(record_property: Callable[[str, object], None]) -> Callable[[str], None]:
    """Keeps a line with what a test counted, to be shown at the end of the session whichever process ran it."""
    return lambda line: record_property("counted", line)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = [report for group in terminalreporter.stats.values() for report in group]
    found = [
        (report.nodeid, value)
        for report in reports
        if getattr(report, "when", None) == "call"
        for name, value in report.user_properties
        if name == "counted"
    ]
    if found:
        terminalreporter.section("what was counted")
    for node, value in sorted(found):
        terminalreporter.write_line(f"{node.rpartition('/')[2]}: {value}")


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    torch.manual_seed(0)
    torch.set_num_threads(1)  # small operations on a shared machine are far slower on two
    yield


def spd(size: int, seed: int = 0, spread: float = 1.5) -> Tensor:
    """A positive definite matrix whose eigenvalues span a few powers of ten."""
    generator = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    values = 10 ** (spread * torch.randn(size, generator=generator, dtype=torch.float64))
    return (basis * values) @ basis.T


def metric_of(rows: int, columns: int, kind: str = "kronecker", seed: int = 0) -> Metric:
    """A metric of a kind with random moments."""
    whole = Metric("kronecker", Side(spd(rows, seed)), Side(spd(columns, seed + 1)), 0.5)
    return whole.coarsened(kind)


@pytest.fixture
def make_metric() -> Callable[..., Metric]:
    return metric_of


@pytest.fixture
def make_moment() -> Callable[..., Tensor]:
    return spd


@pytest.fixture
def quick() -> dict[str, Any]:
    """Options of a study that draws three settings, measures no gain, and takes a damping as given."""
    return dict(QUICK)


@pytest.fixture
def conv_net() -> Callable[[], nn.Module]:
    return ConvNet


@pytest.fixture
def images() -> Callable[..., list[Any]]:
    return image_batches


@pytest.fixture
def make_checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """Write a tiny random checkpoint of a named architecture and return its folder."""

    def make(name: str, dtype: torch.dtype = torch.float32) -> Path:
        pytest.importorskip("transformers")
        folder = tmp_path / name
        draw_model(name, dtype).save_pretrained(folder)
        return folder

    return make


@pytest.fixture
def tokens() -> Callable[..., list[dict[str, Tensor]]]:
    return token_batches
