"""P365 Approximately Optimal Core Shapes for Tensor Decompositions.

Claim: a core's shape chosen by the higher-order singular values within a size loses about as little as the best shape.
Shown on the convolutions of ResNet-56 at two sizes. Null: the largest core that keeps the same part of every mode, at
no fewer bytes. Beside it, both under the second moments of the inputs and gradients.
"""

import sys

import numpy as np

from _shared import Pair, Subject, asset, changed, trial, verdict
from tersor.data import Data
from tersor.models import open_model


def resnet() -> Subject:
    """ResNet-56 on CIFAR-10: calibrated on images of train, measured on images of test."""
    folder, source = asset("resnet-cifar10"), asset("resnet_cifar.py")
    parts = []
    for part in ("train4000", "jpeg-test4000"):
        arrays = np.load(folder / f"cifar10-{part}.npz")
        order = np.random.default_rng(0).permutation(len(arrays["images"]))[:1024]
        parts.append(Data(part, arrays=arrays["images"][order], labels=arrays["labels"][order]))
    weights = folder / "resnet56.safetensors"
    return Subject("ResNet-56", lambda: open_model(f"{source}:resnet56", weights=weights), *parts, 128, 512, {})


if __name__ == "__main__":
    subject, pairs = resnet(), []
    for share, metric in ((0.7, "identity"), (0.4, "identity"), (0.4, "kronecker")):
        null = trial(subject, f"ratio, {metric}", changed("core-shapes", metric, share=share, rule="ratio"))
        method = trial(subject, f"chosen, {metric}", changed("core-shapes", metric, share=null.bits / 16))
        pairs.append(Pair(f"{share:.0%} of 16 bits", null, method, shown=metric == "kronecker"))
    sys.exit(verdict("Core shapes chosen by singular values do less damage than equal ratios.", subject, pairs))
