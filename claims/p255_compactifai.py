"""P255 CompactifAI: Extreme Compression of Large Language Models using Quantum-Inspired Tensor Networks.

Claim: matrix product operators of a limited bond dimension keep most of a language model at a fraction of its
parameters. Null: plain SVD of the same attention and feed-forward matrices at no fewer bytes. Shown beside it are both
under the second moments of the inputs and gradients. No retraining follows, as it does in the paper.
"""

import sys

from _shared import Pair, changed, pylm, trial, verdict

if __name__ == "__main__":
    subject, pairs = pylm(), []
    for budget, metric in (("12bits", "identity"), ("8bits", "identity"), ("8bits", "kronecker")):
        ranks = changed("svd", metric, rank=list(range(8, 160, 2)))
        bonds = changed("compactifai", metric, bond=list(range(8, 73, 4)))
        null = trial(subject, f"SVD, {metric}", ranks, budget)
        method = trial(subject, f"tt, {metric}", bonds, f"{null.bits}bits")
        pairs.append(Pair(budget, null, method, shown=metric == "kronecker"))
    sys.exit(verdict("Matrix product operators do less damage than low rank.", subject, pairs))
