"""Timing every site in each form, once on a machine.

A layer is timed on the input that it really has, as it was and in every form in turn; layers of one kind and size,
called with inputs of one size, are timed once.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from tersor.build.layers import layer_for
from tersor.curves.draw import fit_site, site_metrics
from tersor.forms import Operator, as_values, form_named, settings_of
from tersor.models.model import Batch, Model, size_of
from tersor.models.sites import Site
from tersor.models.timing import in_turn, seconds_of
from tersor.plan import Latencies
from tersor.plan.latency import ORIGINAL, time_key
from tersor.run import Run

WHOLE_ROUNDS, ROUNDS = 15, 7
LONGEST = 0.3  # seconds after which a layer is timed no more
SAMPLES = 32  # of them, the largest is the one that is timed
Settings = Mapping[str, tuple[str, Any]]  # (form, setting) by what its time depends on
Inputs = tuple[tuple[Any, ...], dict[str, Any]]  # of a call


def one_sample(model: Model, data: Any, sequence_length: int, seed: int = 0) -> Batch:
    """The largest of a few samples of the data, as a batch of one; of batches that were given, the largest."""
    return max(model.batches(data, SAMPLES, sequence_length, 1, seed), key=size_of)


def measure_latencies(
    run: Run,
    model: Model,
    sites: Sequence[Site],
    batch: Batch,
    progress: Callable[[str, int, int], Any] = lambda *_: None,
) -> Latencies:
    """Time the model and its sites in all forms drawn, unless this machine did, and keep it in the run."""
    clock = _Clock(run, model)
    settings = {site.name: _settings(run, site) for site in sites}
    if clock.knows(settings):
        return clock.found
    with torch.inference_mode():
        inputs = _inputs(model, sites, batch)
        for number, site in enumerate(sites):
            progress(site.name, number, len(sites))
            clock.time(site, settings[site.name], inputs)
        whole = median(seconds_of(model.device, lambda: model.outputs(batch)) for _ in range(WHOLE_ROUNDS))
    found = Latencies(clock.found.machine, whole, clock.found.calls, clock.found.layers)
    run.put("latencies", asdict(found))
    return found


def machine_of(model: Model) -> str:
    """The machine, as far as times depend on it."""
    if model.device.type == "cuda":
        return torch.cuda.get_device_name(model.device)
    return f"{platform.node()} ({platform.machine()}, {torch.get_num_threads()} of {os.cpu_count()} cores)"


class _Clock:
    """Times layers of a model, each kind and size once; starts from what the run knows of this machine."""

    def __init__(self, run: Run, model: Model) -> None:
        known, machine = Latencies.of(run), machine_of(model)
        self.run, self.model = run, model
        self.found = known if known is not None and known.machine == machine else Latencies(machine, 0.0)

    def knows(self, settings: Mapping[str, Settings]) -> bool:
        calls, layers = self.found.calls, self.found.layers
        return all(
            site in calls and all(key in layers[layer] for layer in calls[site] for key in keys)
            for site, keys in settings.items()
        )

    def time(self, site: Site, settings: Settings, inputs: Mapping[str, list[Inputs]]) -> None:
        """Time every layer that uses the weight of a site, for every call; one that stays as it is, is of the rest."""
        self.found.calls[site.name] = []
        for name, _ in site.places if settings else ():
            owner = self.model.module.get_submodule(name)
            for given in inputs[name]:
                sizes = ", ".join("x".join(map(str, leaf.shape)) for leaf in _tensors(given))
                kind = repr(owner) if not any(owner.children()) else f"{type(owner).__name__} {site.parameter_shape}"
                layer = f"{kind} of {sizes}"
                self.found.calls[site.name].append(layer)
                self._layer(self.found.layers.setdefault(layer, {}), owner, site, settings, given)

    def _layer(self, known: dict[str, float], owner: nn.Module, site: Site, settings: Settings, given: Inputs) -> None:
        def original() -> Any:
            return owner(*given[0], **given[1])

        for key, (form, setting) in settings.items():
            if key in known:
                continue
            operator = self._operator(site, form, setting)
            replaced = None if site.stack > 1 else layer_for(owner, operator, False, site.dtype)
            if replaced is None:  # the module stays and decodes its weights besides
                known.setdefault(ORIGINAL, 0.0)
                known[key] = site.stack * self._medians(operator.decode, lambda: None)[0]
                continue
            seconds, before = self._medians(lambda layer=replaced: layer(*given[0], **given[1]), original)  # type: ignore[misc]
            known.setdefault(ORIGINAL, before)
            known[key] = seconds * known[ORIGINAL] / before  # the machine may be slower now than it was

    def _operator(self, site: Site, form: str, setting: Any) -> Operator:
        """An operator as fast as a fit: an empty one, where its work does not depend on what is in it."""
        first = settings_of(setting, site.stack)[0]
        if "stored" not in as_values(first):
            return form_named(form).empty(site.shape, first).to(self.model.device)
        weights, metrics = site.matrices(self.model.module)[:1].cpu(), site_metrics(self.run, site)[:1]
        return fit_site(form_named(form), weights, metrics, first)[0].to(self.model.device)

    def _medians(self, first: Callable[[], Any], second: Callable[[], Any]) -> tuple[float, float]:
        """The medians of the seconds of two functions, in turn."""
        one, other = np.median(in_turn(self.model.device, first, second, ROUNDS, LONGEST), 1)
        return float(one), float(other)


def _settings(run: Run, site: Site) -> Settings:
    """What to time at a site; of settings that take equally long, the first."""
    found: dict[str, tuple[str, Any]] = {}
    for candidate in run.candidates(site.name):
        found.setdefault(time_key(candidate.form, candidate.setting), (candidate.form, candidate.setting))
    return found


def _inputs(model: Model, sites: Sequence[Site], batch: Batch) -> dict[str, list[Inputs]]:
    """What the modules of the sites are called with, call by call."""
    found: dict[str, list[Inputs]] = {name: [] for site in sites for name, _ in site.places}
    with ExitStack() as hooks:
        for name, calls in found.items():

            def keep(_: nn.Module, *given: Any, calls: list[Inputs] = calls) -> None:
                calls.append(given)

            module = model.module.get_submodule(name)
            hooks.callback(module.register_forward_pre_hook(keep, with_kwargs=True).remove)
        model.outputs(batch)
    return found


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
