"""P115 8-Bit Approximations for Parallelism in Deep Learning.

Claim: the dynamic tree (sign, a run of zeros for the power of ten, a flag, a linear fraction) keeps gradients and
weights with less relative error than other 8-bit types. Nulls: linear integers with a zero, and e4m3, at equal bytes.
Relative errors are means of |x - x_hat| / |x| with one scale a tensor, as in the paper; divergences are those of a
model whose weights are replaced, a 16-bit scale in groups of 64. The paper's training and its speed are not shown here.
"""

import sys

import torch
from torch import Tensor

from _shared import FAILS, Pair, Subject, babyllama, changed, trial, verdict
from tersor.forms import FloatForm, FloatSetting, IntForm, IntSetting
from tersor.metrics import Metric, Side

EXTREMES = {"scale_bits": 16, "rounding": "nearest", "search": False}
TYPES = {
    "dynamic tree": (FloatForm(), FloatSetting("dynamic8", **EXTREMES)),
    "linear": (IntForm(), IntSetting(8, None, symmetric=True, zeros="whole", **EXTREMES)),
    "e4m3": (FloatForm(), FloatSetting("e4m3", **EXTREMES)),
}


def gradients(subject: Subject) -> dict[str, Tensor]:
    """Of the loss of next tokens on one batch, by parameter."""
    model = subject.original
    batch = model.batches(subject.calibration, 16, 256, 16)[0]
    labels = model.labels(batch)
    assert labels is not None
    model.module.requires_grad_(True)
    loss = torch.nn.functional.cross_entropy(model.outputs(batch), labels)
    named = {name: p for name, p in model.module.named_parameters() if p.dim() == 2}
    found = torch.autograd.grad(loss, list(named.values()))
    model.module.requires_grad_(False)
    return dict(zip(named, found, strict=True))


def relative_error(values: Tensor, kind: str) -> tuple[float, float]:
    """The mean of |x - x_hat| / |x| where x is not zero, and the root of the mean square error over that of x."""
    form, setting = TYPES[kind]
    row = values.detach().reshape(1, -1)
    row = row / row.abs().max()
    metric = Metric("identity", Side(torch.ones(1)), Side(torch.ones(row.shape[1])))
    error = row - form.fit(row, metric, setting).dense()
    some = row != 0
    return float((error[some] / row[some]).abs().mean()), float(error.norm() / row.norm())


def compared(what: str, tensors: dict[str, Tensor]) -> tuple[bool, list[str]]:
    """Whether the tree has the least relative error on average over tensors; and the figures."""
    means = {}
    for kind in TYPES:
        errors = torch.tensor([relative_error(t, kind) for t in tensors.values()])
        means[kind] = errors.mean(0).tolist()
    lines = [f"{what}, {kind}: relative error {a:.4f}, of the norm {b:.4f}" for kind, (a, b) in means.items()]
    return means["dynamic tree"][0] <= min(mean for mean, _ in means.values()), lines


if __name__ == "__main__":
    subject, pairs = babyllama(), []
    tree = changed("dynamic-tree", group_size=64)
    linear = changed("rtn", bits=8, group_size=64, symmetric=True, zeros="whole")
    method = trial(subject, "dynamic tree", tree)
    pairs = [
        Pair("8 bits g64", trial(subject, "linear int8", linear), method),
        Pair("8 bits g64", trial(subject, "e4m3", changed(tree, format="e4m3")), method),
    ]
    slopes = gradients(subject)
    weights = {name: p for name, p in subject.original.module.named_parameters() if name in slopes}
    results = [compared("gradients", slopes), compared("weights", weights)]
    status = verdict(
        "The dynamic tree does less damage to weights than linear integers and e4m3.",
        subject,
        pairs,
        [line for _, lines in results for line in lines],
    )
    for what, (holds, _) in zip(("gradients", "weights"), results, strict=True):
        print(f"Its relative error is {'' if holds else 'NOT '}the least on {what}.")
    sys.exit(status if all(holds for holds, _ in results) else FAILS)
