"""P160 EoRA: Training-free Compensation for Compressed LLM with Eigenspace Low-Rank Approximation, on 2:4 weights.

Claim: correcting 2:4 sparse weights in the eigenspace of the layer's inputs does less damage than plain SVD of what was
removed. Null: that plain SVD, at the same rank of the same mask, so at exactly equal bytes. Shown beside it: kept
entries refitted under the same second moment (SparseGPT) with no correction, in fewer bytes.
"""

import sys

from _shared import Pair, babyllama, changed, trial, verdict

CLAIM = "A correction of 2:4 sparse weights in the eigenspace of the inputs does less damage than plain SVD."

if __name__ == "__main__":
    subject, pairs = babyllama(), []
    refitted = trial(subject, "sparsegpt, no correction", changed("sparsegpt", density="2:4"))
    for rank in (8, 16):
        eora = changed("eora-sparse", first={"density": "2:4"}, second={"rank": rank})
        null, method = trial(subject, "plain SVD", changed(eora, "identity")), trial(subject, "eora", eora)
        pairs += [Pair(f"2:4 + r{rank}", null, method), Pair(f"2:4 + r{rank}", method, refitted, shown=True)]
    sys.exit(verdict(CLAIM, subject, pairs))
