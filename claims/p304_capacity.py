"""P304 Unified Scaling Laws for Compressed Representations.

Claim: how well a format fits Gaussian data ranks formats of all kinds by what they leave of a model. The paper's law is
of models trained *over* a format, which cannot be tested here; shown is whether the capacity ranks formats put on a
trained model without training. Null: the bits a weight. Every site of the blocks gets the same format, fitted under the
identity, on the weights and on a Gaussian matrix alike; the method's rank correlation with the divergence must be above
its null's in 95 % of resamples of the formats.
"""

import math
import sys
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import spearmanr

from _shared import FAILS, HOLDS, babyllama, hand_over
from tersor.forms import (
    CodebookSetting,
    FloatSetting,
    IntSetting,
    KroneckerSetting,
    LowRankSetting,
    SharedSetting,
    SparseSetting,
    TensorTrainSetting,
    TrellisSetting,
    form_named,
)
from tersor.forms.base import cost_of
from tersor.judge.intervals import bootstrap
from tersor.metrics import Metric, Side
from tersor.models import walk
from tersor.models.compare import Reference

FORMATS = [
    ("int", IntSetting(2, 32, rounding="nearest")),
    ("int", IntSetting(3, 64, rounding="nearest")),
    ("int", IntSetting(4, None, symmetric=True, rounding="nearest")),
    ("int", IntSetting(4, 32, rounding="nearest")),
    ("int", IntSetting(6, None, symmetric=True, rounding="nearest")),
    ("float", FloatSetting("e2m1", 32, rounding="nearest")),
    ("float", FloatSetting("nf4", 64, rounding="nearest")),
    ("float", FloatSetting("e4m3", None, rounding="nearest")),
    ("codebook", CodebookSetting((8,), 4)),
    ("codebook", CodebookSetting((12,), 8, lattice=True)),
    ("codebook", CodebookSetting((16,), 8, lattice=True)),
    ("trellis", TrellisSetting(2.0)),
    ("trellis", TrellisSetting(3.0)),
    ("sparse", SparseSetting(0.5, "magnitude", refit=False)),
    ("sparse", SparseSetting("2:4", "magnitude", refit=False)),
    ("sparse", SparseSetting(0.25, "magnitude", refit=False, bits=4)),
    ("sparse", SparseSetting(0.7, "magnitude", refit=False, bits=4)),
    ("lowrank", LowRankSetting(32)),
    ("lowrank", LowRankSetting(64)),
    ("lowrank", LowRankSetting(96, 4)),
    ("kronecker", KroneckerSetting(8, 16, 64)),
    ("tt", TensorTrainSetting(3, 24)),
    ("shared", SharedSetting(0.5)),
]
SHAPE = (352, 128)  # of a gate, the commonest shape but for the projections of the attention


@dataclass(frozen=True)
class Tried:
    """A format: bits a weight, the share of a Gaussian matrix's energy it leaves, the model's divergence in nats."""

    form: str
    label: str
    bits: float
    error: float
    divergence: float


def plain(shape: tuple[int, int]) -> Metric:
    return Metric("identity", Side(torch.ones(shape[0])), Side(torch.ones(shape[1])))


def tried(before: Reference, name: str, setting: object) -> Tried:
    form, model = form_named(name), before.model
    gaussian = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    left = gaussian - form.fit(gaussian, plain(SHAPE), setting).dense()
    sites = [site for site in walk(model.module).sites if "embed" not in site.name]
    kept = [site.parameter(model.module).data for site in sites]
    stored = 0
    for site in sites:
        operator = form.fit(site.matrices(model.module)[0].float(), plain(site.shape), setting)
        stored += cost_of(form, site.shape, operator.setting).stored
        new = site.to_parameter(operator.dense()[None])
        site.parameter(model.module).data = new.to(site.parameter(model.module).data).contiguous()
    divergence = before.divergence()
    for site, weight in zip(sites, kept, strict=True):
        site.parameter(model.module).data = weight
    bits = 8 * stored / sum(site.parameters for site in sites)
    label = setting.label if setting.label.startswith(name) else f"{name} {setting.label}"
    return Tried(name, label, bits, float(left.square().sum() / gaussian.square().sum()), divergence)


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    return float(spearmanr(a, b).statistic)


if __name__ == "__main__":
    subject, found = babyllama(), []
    before = subject.reference  # the outputs of the original, before anything is put into it
    print(f"{'format':34} {'bits':>6} {'Gaussian error':>15} {'log_1/4':>8} {'divergence':>11}")
    for name, setting in FORMATS:
        t = tried(before, name, setting)
        found.append(t)
        print(
            f"{t.label:34} {t.bits:6.2f} {t.error:15.5f} {-math.log(t.error, 4):8.3f} {t.divergence:11.4f}", flush=True
        )
    bits, errors, damage = (np.array([getattr(t, field) for t in found]) for field in ("bits", "error", "divergence"))

    def gain(index: np.ndarray) -> float:
        """How much better the error ranks the damage than the bits do, over some of the formats."""
        return rank_correlation(errors[index], damage[index]) - rank_correlation(-bits[index], damage[index])

    with_errors, with_bits = rank_correlation(errors, damage), rank_correlation(-bits, damage)
    difference = bootstrap(gain, len(found))
    codes = np.array([t.form in ("int", "float", "codebook", "trellis", "sparse") for t in found])
    of_codes, bits_of_codes = (
        rank_correlation(errors[codes], damage[codes]),
        rank_correlation(-bits[codes], damage[codes]),
    )
    notes = [
        f"rank correlation with the divergence: Gaussian error {with_errors:.3f}, bits a weight {with_bits:.3f}, "
        f"difference {difference.value:+.3f} [{difference.low:+.3f}, {difference.high:+.3f}]",
        f"of the {int(codes.sum())} that are integers, floats, vectors or sparse, of which the paper speaks: "
        f"Gaussian error {of_codes:.3f}, bits {bits_of_codes:.3f}",
    ]
    holds = difference.low > 0
    print("\n".join(notes))
    print(f"\nThe capacity {'ranks' if holds else 'does NOT rank'} formats better than their bits do.")
    hand_over(
        "A format's fit of Gaussian data ranks the damage it does better than its bits do.",
        subject.name,
        notes,
        columns=["format", "bits a weight", "Gaussian error", "divergence in nats"],
        rows=[[t.label, f"{t.bits:.2f}", f"{t.error:.5f}", f"{t.divergence:.4f}"] for t in found],
        measured=f"rank correlation with the divergence over {len(found)} formats: bits {with_bits:.3f} -> Gaussian "
        f"error {with_errors:.3f}; training over a format cannot be tested here",
    )
    sys.exit(HOLDS if holds else FAILS)
