"""Observing in several processes: the same summaries to the bit for any number of them, whatever the model is."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tersor import TersorError
from tersor.data import Data
from tersor.engine import pool_of
from tersor.models import Model, custom_divergence, open_model, walk
from tersor.observe import Collector, collect
from tersor.observe.collect import Pass
from tersor.steps import build_plan, study
from tiny_models import ConvNet, image_batches, small_net, token_batches, vector_batches


@pytest.fixture(scope="module", autouse=True)
def processes() -> Iterator[None]:
    """One pool for all tests here."""
    with pool_of(3):
        yield


def observed(model: Model, batches: list[Any], workers: int | None, gradients: bool = True) -> Collector:
    given = model.batches(Data("test", batches=batches), None, 8, 3)
    return collect(model, walk(model.module).sites, given, gradients=gradients, seed=5, workers=workers)


def assert_equal(*collectors: Collector) -> None:
    first, *others = collectors
    assert first.summaries
    for other in others:
        assert list(other.summaries) == list(first.summaries)
        assert (other.rows_are_inputs, other.predictions) == (first.rows_are_inputs, first.predictions)
        for key, summary in first.summaries.items():
            for field, value in summary.tensors().items():
                assert torch.equal(value, other.summaries[key].tensors()[field]), (key, field)


@pytest.mark.parametrize("gradients", [False, True])
def test_any_number_of_workers_gives_the_same_bits(gradients: bool) -> None:
    model, batches = open_model(ConvNet()), image_batches(10)
    assert_equal(*(observed(model, batches, workers, gradients) for workers in (None, 1, 2, 3)))


def test_the_groups_add_up_to_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = open_model(ConvNet()), image_batches(10)
    found = observed(model, batches, 2, gradients=False)
    monkeypatch.setattr(sys.modules["tersor.observe.collect"], "GROUP", 10)
    whole = observed(model, batches, None, gradients=False)
    assert found.summaries.keys() == whole.summaries.keys() and found.predictions == whole.predictions
    for key, summary in whole.summaries.items():
        for field, value in summary.tensors().items():
            assert (found.summaries[key].tensors()[field] - value).norm() <= 1e-6 * value.norm(), (key, field)


def test_every_batch_has_a_probe_of_its_own() -> None:
    """Two batches that are equal are not probed alike, and the first is whatever follows it."""
    model, (batch,) = open_model(small_net()), vector_batches(1)
    alone, twice = (observed(model, [batch] * count, None).summaries["0", 0, "linear"] for count in (1, 2))
    other = observed(model, [torch.zeros_like(batch), batch], None).summaries["0", 0, "linear"]
    assert torch.allclose(alone.weighted_inputs + other.weighted_inputs, twice.weighted_inputs, rtol=1e-4)
    assert not torch.allclose(alone.weighted_inputs, other.weighted_inputs, rtol=0.01)


def test_a_folder_of_transformers(make_checkpoint: Callable[..., Path]) -> None:
    model, batches = open_model(make_checkpoint("llama-tied")), token_batches(count=5)
    assert_equal(*(observed(model, batches, workers) for workers in (None, 2)))


FACTORY = """
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x):
        return self.b(self.a(x).relu())

def net():
    return Net()

def preprocess(arrays):
    raise AssertionError
"""


def test_a_factory_is_called_by_the_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "net.py").write_text(FACTORY)
    model, batches = open_model(f"{tmp_path / 'net.py'}:net", divergence="mse"), vector_batches(5)
    here = observed(model, batches, None)
    monkeypatch.setattr(Pass, "over", None)  # nothing may be done here
    assert_equal(here, observed(model, batches, 2))


def squared(original: Tensor, new: Tensor) -> Tensor:
    return (original - new).square().sum(1)


def of_here() -> nn.Module:
    """Of a class that no other process can import."""

    class Net(nn.Sequential):
        pass

    return Net(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))


def of_this_process() -> nn.Module:
    """Of a class that can be named, but only where it was made."""
    made = types.ModuleType("made_here")
    made.Net = type("Net", (nn.Sequential,), {"__module__": "made_here"})  # type: ignore[attr-defined]
    sys.modules["made_here"] = made
    return made.Net(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))


@pytest.mark.parametrize("make", [of_here, of_this_process])
def test_a_model_that_workers_cannot_have_is_observed_here(make: Callable[[], nn.Module]) -> None:
    model, batches = open_model(make(), divergence=custom_divergence(squared)), vector_batches(5)
    assert_equal(*(observed(model, batches, workers) for workers in (None, 2)))


@pytest.mark.parametrize("workers", [None, 2])
def test_a_failing_batch_is_told_by_its_number(workers: int | None) -> None:
    model = open_model(small_net())
    batches = vector_batches(6)
    with pytest.raises(TersorError, match="outputs for batch 4 of the data are NaN"):
        observed(model, [*batches[:3], batches[3] * torch.nan, *batches[4:]], workers)
    with pytest.raises(TersorError, match="The model failed on batch 6 of the data"):
        observed(model, [*batches[:5], torch.zeros(2, 3)], workers)


def test_an_artifact_is_that_of_one_process(
    quick: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tersor.steps.memory.WORTH", 0)
    files = []
    for workers in (1, 2):
        folder = tmp_path / str(workers)
        opened = study(small_net(), vector_batches(12), folder / "run", **{**quick, "workers": workers})
        build_plan(opened, opened.plan("5bits"), folder / "out", workers=workers)
        files.append([(folder / "out" / name).read_bytes() for name in ("model.safetensors", "tersor.json")])
    assert files[0] == files[1]
