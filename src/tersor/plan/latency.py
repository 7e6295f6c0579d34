"""How long a model takes for one sample: as long as its sites, each in its form, and the rest of it.

What was measured on a machine is kept in the run, so that every budget of time is a look-up.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from tersor.forms import as_values, settings_of
from tersor.run import Run

ORIGINAL = "original"


@dataclass(frozen=True)
class Latencies:
    """Seconds of one sample on `machine`: of the original, and of its layers as they were and in every form.

    `calls` are the layers that a site is called in, `layers` the seconds of each, by form and setting.
    """

    machine: str
    whole: float
    calls: dict[str, list[str]] = field(default_factory=dict)
    layers: dict[str, dict[str, float]] = field(default_factory=dict)

    @classmethod
    def of(cls, run: Run) -> Latencies | None:
        """Those that were measured last; None where none were."""
        found = run.get("latencies")
        return None if found is None else cls(**found)

    @property
    def rest(self) -> float:
        """Seconds of all that is no site."""
        return self.whole - sum(self.at(site) or 0.0 for site in self.calls)

    def total(self, sites: Iterable[float | None]) -> float | None:
        """Seconds of the model whose sites take these; None where one is not known."""
        known = list(sites)
        return None if None in known else self.rest + sum(known)  # type: ignore[arg-type]

    def at(self, site: str, form: str | None = None, setting: Any = None) -> float | None:
        """Seconds of a site in a form, or as it was; None where this was not measured."""
        key = ORIGINAL if form is None else time_key(form, setting)
        known = [self.layers[layer].get(key) for layer in self.calls.get(site, ())]
        return None if None in known else sum(known)  # type: ignore[arg-type]


def time_key(form: str, setting: Any) -> str:
    """What the time of an operator depends on: of codes whose size is found by a fit, on the form alone."""
    values = as_values(settings_of(setting, 1)[0])
    return form if "stored" in values else f"{form} {json.dumps(values, sort_keys=True)}"
