"""Every form in one middle setting at many sites at once, fitted under the identity and under both moments.

    python bench/metrics.py MODEL [--run DIR] [--every N] [--samples N] [--forms int,coded]

Of each form's ladder every site gets the setting whose size is nearest to 3 bits a weight. Coded integers, whose size
depends on the fit, get one step that brings all sites together to 3 bits under either metric. Both models are judged on
the same held-out samples; the difference is paired.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from judging import Judge, mean_of, ratio_of
from models import NAMES, reference
from tersor.curves.draw import site_metrics
from tersor.forms import FORMS, CodedSetting, Form, cost_of
from tersor.forms.base import fitted_candidate
from tersor.judge.intervals import mean_estimate
from tersor.models import Site
from tersor.steps import Study

RESULTS = Path(__file__).parent / "results"
BITS = 3.0
KINDS = ("identity", "kronecker")
NEAR = 0.003  # of the rate: how near coded integers must come
QUICK = {"forms": ("int",), "settings": {"int": [{"bits": 4}]}, "gains": False}  # metrics are all that is wanted


@dataclass(frozen=True)
class Fitted:
    """The matrices of some sites, by name, and the bits a weight that they take."""

    matrices: dict[str, Tensor]
    bits: float


def middle(form: Form, site: Site) -> Any | None:
    """The setting of the ladder at a site that is nearest to `BITS` a weight; None where there is none."""
    sized = [(cost_of(form, site.shape, s).stored, s) for s in form.settings(site.shape)]
    wanted = BITS * site.parameters / 8
    return min(sized, key=lambda pair: abs(math.log(pair[0] / wanted)), default=(0, None))[1]


def fitted(opened: Study, sites: Sequence[Site], form: Form, settings: Sequence[Any], kind: str) -> Fitted:
    """Every site in its setting, under a kind of metric."""
    matrices, stored = {}, 0
    for site, setting in zip(sites, settings, strict=True):
        weight, metric = site.matrices(opened.model.module)[0].float(), site_metrics(opened.run, site, kind)[0]
        operator, candidate = fitted_candidate(form, weight, metric, setting)
        matrices[site.name] = operator.dense()
        stored += candidate.cost.stored
    return Fitted(matrices, 8 * stored / sum(site.parameters for site in sites))


def at_rate(fit: Callable[[float], Fitted]) -> Fitted:
    """Of fits by the logarithm of the step, of which each halving costs about a bit, one of `BITS` a weight or less."""
    log = -10.0
    for _ in range(12):
        found = fit(log)
        if BITS * (1 - NEAR) <= found.bits <= BITS:
            break
        log += found.bits - BITS * (1 - NEAR / 2)
    return found


def measured(judge: Judge, sites: Sequence[Site], matrices: dict[str, Tensor]) -> np.ndarray:
    """The divergence of every held-out sample with these matrices in the model; it is then as it was."""
    module, kept = judge.model.module, []
    for site in sites:
        parameter = site.parameter(module)
        kept.append((parameter, parameter.data))
        parameter.data = site.to_parameter(matrices[site.name][None]).to(parameter.data).contiguous()
    try:
        return judge.divergences()
    finally:
        for parameter, data in kept:
            parameter.data = data


def row_of(opened: Study, judge: Judge, sites: Sequence[Site], name: str) -> dict[str, Any]:
    """A form under both metrics."""
    form = FORMS[name]
    settings = [CodedSetting(1.0) if name == "coded" else middle(form, site) for site in sites]
    if None in settings:
        return {"form": name, "note": "no setting for these shapes"}
    values, row = {}, {"form": name, "setting": settings[0].label}
    for kind in KINDS:
        if name == "coded":
            found = at_rate(lambda log, k=kind: fitted(opened, sites, form, [CodedSetting(2.0**log)] * len(sites), k))
            row["setting"] = "one step"
        else:
            found = fitted(opened, sites, form, settings, kind)
        values[kind] = measured(judge, sites, found.matrices)
        row[kind] = {"bits": found.bits, "divergence": mean_of(values[kind])}
    difference = asdict(mean_estimate(values["kronecker"] - values["identity"]))
    return {**row, "ratio": ratio_of(values["kronecker"], values["identity"]), "difference": difference}


def opened_quickly(name: str, run: Path | None, samples: int | None) -> tuple[Study, Judge]:
    """A study of a reference model with its metrics and little more, and its judge."""
    known = reference(name)
    opened = known.study(run or Path(tempfile.mkdtemp()), samples, **QUICK)
    return opened, Judge.of(known, opened.model)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=NAMES)
    parser.add_argument("--run", type=Path, default=None)
    parser.add_argument("--every", type=int, default=1, help="take one linear site in so many")
    parser.add_argument("--samples", type=int, default=None)
    parser.add_argument("--forms", default=",".join(FORMS))
    given = parser.parse_args()
    opened, judge = opened_quickly(given.model, given.run, given.samples)
    sites = [site for site in opened.sites if site.kind != "table" and site.stack == 1][:: given.every]
    target = RESULTS / f"metrics-{given.model}.json"
    found = {"model": given.model, "sites": len(sites), "every": given.every, "samples": given.samples}
    rows = []
    for name in given.forms.split(","):
        start = time.perf_counter()
        rows.append(row_of(opened, judge, sites, name))
        print(json.dumps(rows[-1]), f"{time.perf_counter() - start:.0f} s", flush=True)
        target.write_text(json.dumps({**found, "rows": rows}, indent=1), encoding="utf8")
    print(f"written to {target.name}")


if __name__ == "__main__":
    main()
