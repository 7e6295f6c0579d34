"""On a Ray cluster units give the same results as here, whatever dies, and errors come as they are."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

from tersor.engine import map_units, pool_of
from tersor.engine.ray import RayPool
from tersor.errors import TersorError
from tersor.steps import build_plan, study
from tiny_models import small_net
from tiny_models import vector_batches as batches

pytest.importorskip("ray")


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """One cluster for all tests here, which every engine of theirs finds running; its workers yield to nothing else."""
    import ray

    paths = os.pathsep.join(str(path) for path in (Path(__file__).parent, Path(__file__).parents[1]))
    environment = {"env_vars": {"PYTHONPATH": os.pathsep.join([paths, os.environ.get("PYTHONPATH", "")])}}
    of_cluster: dict[str, Any] = {"include_dashboard": False, "_system_config": {"worker_niceness": 0}}
    ray.init(address="local", num_cpus=4, log_to_driver=False, runtime_env=environment, **of_cluster)
    yield
    ray.shutdown()


def made(folder: Path, options: dict[str, Any], module: nn.Module | None = None, **engine: Any) -> list[bytes]:
    opened = study(module or small_net(), batches(12), folder / "run", **{**options, **engine})
    build_plan(opened, opened.plan("5bits"), folder / "out", **engine)
    return [(folder / "out" / name).read_bytes() for name in ("model.safetensors", "tersor.json")]


def test_artifacts_are_those_of_the_local_engine(
    quick: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tersor.steps.memory.WORTH", 0)  # observe on all workers, though it is little
    options = {**quick, "gains": True}
    here = made(tmp_path / "here", options, workers=1)
    for workers in (1, 2, 4):
        assert made(tmp_path / str(workers), options, workers=workers, engine="ray") == here


class Mortal(nn.Sequential):
    """Layers that end a process, though not the one that `spares` names, the first time that they run there."""

    def __init__(self, marker: Path) -> None:
        super().__init__(*small_net())
        self.marker, self.spares = marker, os.getpid()

    def forward(self, x: Tensor) -> Tensor:
        if os.getpid() != self.spares:
            dying_once(str(self.marker))
        return super().forward(x)


def test_a_worker_that_dies_while_observing_changes_nothing(
    quick: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tersor.steps.memory.WORTH", 0)
    marker = tmp_path / "died"
    here = made(tmp_path / "here", quick, Mortal(marker))
    assert not marker.exists()
    assert made(tmp_path / "there", quick, Mortal(marker), workers=2, engine="ray") == here
    assert marker.exists()


def dying_once(marker: str) -> str:
    if not Path(marker).exists():
        Path(marker).touch()
        os.kill(os.getpid(), 9)
    return marker


def test_a_unit_whose_worker_dies_is_run_again(tmp_path: Path) -> None:
    markers = [str(tmp_path / str(n)) for n in range(3)]
    with pool_of(2, "ray") as pool:
        assert isinstance(pool, RayPool)
        found = list(map_units(dying_once, ((m, partial(tuple, [m])) for m in markers), 2, in_order=True))
    assert found == [(m, m) for m in markers] and all(Path(m).exists() for m in markers)


def failing() -> None:
    raise TersorError("The site a.b has a weight that is none.")


def test_an_error_of_a_unit_is_raised_as_it_is() -> None:
    with pool_of(2, "ray"), pytest.raises(TersorError, match=r"^The site a\.b has a weight that is none\.$"):
        list(map_units(failing, [("one", tuple)], 2))


def test_an_unknown_engine_is_refused() -> None:
    with pytest.raises(TersorError, match="There is no engine 'spark'; choose local or ray"), pool_of(2, "spark"):
        pass
