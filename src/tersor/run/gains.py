"""What measured probes say of a site: how much more, or less, than is predicted a form does there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Gains:
    """The fact `gain/SITE` of a run; without one every gain is 1."""

    fact: Mapping[str, Any]

    def of(self, form: str, divergence: float = 0.0) -> float:
        """Measured over predicted for a probe of the form, else as borrowed, else that of `int`, times the growth.

        Probes do little damage. Where the site was measured at larger ones too, the gain grows from the probe's
        prediction through these, linearly in the logarithm of the predicted `divergence`, and stays at the last.
        """
        known = {**self.fact.get("borrowed", {}), **self.fact.get("by_form", {})}
        return float(known.get(form, self.fact.get("gain", 1.0))) * self._growth(divergence)

    def _growth(self, divergence: float) -> float:
        probe = self.fact.get("predicted", 0.0)
        beyond = [(at, ratio) for at, ratio in self.fact.get("growth", ()) if at > probe > 0]
        if not beyond or divergence <= probe:
            return 1.0
        at, ratios = zip((probe, 1.0), *beyond, strict=True)
        return float(np.interp(np.log(divergence), np.log(at), ratios))
