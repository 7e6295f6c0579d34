"""P086 PHNNs: Lightweight Neural Networks via Parameterized Hypercomplex Convolutions.

Claim: a sum of n Kronecker products with n x n matrices does the work of a layer with about 1/n of its parameters. What
can be shown without training anew: the nearest such sum to a trained weight (Van Loan). Null: plain SVD with ranks of
which every matrix takes one part in n, and a hundredth more, as ranks are whole numbers.
"""

import sys

from _shared import Pair, changed, pylm, trial, verdict

if __name__ == "__main__":
    subject, pairs = pylm(), []
    for n in (2, 4):
        method = trial(subject, f"phnn n={n}", changed("phnn", rows=n, columns=n, terms=n))
        ranks = changed("svd", rank=list(range(8, 160)))
        null = trial(subject, "plain SVD", ranks, f"{1.01 * method.bits}bits")
        pairs.append(Pair(f"{16 // n} bits", null, method))
        low, high = (changed(m, "kronecker") for m in (ranks, changed("phnn", rows=n, columns=n, terms=n)))
        felt = trial(subject, "phnn, kronecker", high)
        beside = trial(subject, "SVD, kronecker", low, f"{1.01 * felt.bits}bits")
        pairs.append(Pair(f"{16 // n} bits", beside, felt, shown=True))
    sys.exit(verdict("The nearest hypercomplex layer does less damage than low rank.", subject, pairs))
