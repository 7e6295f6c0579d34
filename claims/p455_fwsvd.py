"""P455 Language model compression with weighted low-rank factorization (FWSVD).

Claim: an SVD weighted with the Fisher information of the parameters, summed over each row of the factorised matrix,
does less damage than a plain one. Null: plain SVD at the same ranks, so at exactly equal bytes; the activation-weighted
SVD, which needs no gradients, is shown beside it.
"""

import sys

from _shared import Pair, changed, minilm, trial, verdict

if __name__ == "__main__":
    subject, pairs = minilm(), []
    for budget in ("12bits", "8bits"):
        null, method = trial(subject, "svd", "svd", budget), trial(subject, "fwsvd", "fwsvd", budget)
        inputs = trial(subject, "inputs' diagonal", changed("svd", "input-diagonal"), budget)
        pairs += [Pair(budget, null, method), Pair(budget, inputs, method, shown=True)]
    sys.exit(verdict("Fisher-weighted SVD does less damage than plain SVD.", subject, pairs))
