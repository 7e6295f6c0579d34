"""P051 In defense of parameter sharing for model-compression (STABLE-RPS).

Claim, the part that trained weights can show: hashing by partitions that are permutations loses nothing where the array
is as large as the weights, and hashing every weight on its own does not. Null: the latter, with the same array and the
same least squares. Its accuracies beside pruning and smaller models are of networks trained with sharing, which nothing
here does; what is left of a trained network at half the array is shown beside, and what plain SVD and rounding leave.
"""

import sys
from unittest.mock import patch

from torch import Tensor

from _shared import Pair, babyllama, changed, trial, verdict
from tersor.forms.shared import SharedSetting, mixed


def independent(shape: tuple[int, int], setting: SharedSetting, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Place and sign of every entry from a hash of its own, without partitions."""
    position = rows[:, None] * shape[1] + rows.new_ones(shape[1]).cumsum(0) - 1
    word = mixed(position)
    return word % setting.size(shape), 1 - 2 * (mixed(word) & 1)


if __name__ == "__main__":
    subject, pairs = babyllama(), []
    for share in (1.0, 0.5):
        rps = changed("stable-rps", share=share)
        with patch("tersor.forms.shared.places", independent):
            null = trial(subject, "each on its own", rps)
        method = trial(subject, "stable-rps", rps)
        pairs.append(Pair(f"share {share}", null, method, shown=share < 1))
        if share < 1:
            svd = trial(subject, "svd", "svd", f"{method.bits}bits")
            nearest = trial(subject, "nearest, 6 bits", changed("rtn", bits=6, group_size=64))
            pairs += [Pair(f"share {share}", beside, method, shown=True) for beside in (svd, nearest)]
    sys.exit(verdict("An array as large as the weights loses nothing.", subject, pairs))
