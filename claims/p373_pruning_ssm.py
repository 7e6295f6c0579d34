"""P373 On Pruning State-Space LLMs.

Claim: Wanda is robust at a density of one half, where other ways to prune lose much. The paper's models are state-space
models; these two are transformers, so that only the direction among unstructured and 2:4 masks is shown. Null:
magnitude pruning in the same format, so at exactly equal bytes. Shown beside it: second-order removal with a refit,
from the inputs alone (SparseGPT) and from both factors.
"""

import sys

from _shared import Pair, babyllama, changed, pylm, trial, verdict

CLAIM = "At one half of the entries Wanda does less damage than magnitude pruning."

if __name__ == "__main__":
    statuses = []
    for subject in (babyllama(), pylm()):
        pairs = []
        for density in (0.5, "2:4"):
            null, method, one, both = (
                trial(subject, name, changed(name, density=density))
                for name in ("magnitude", "wanda", "sparsegpt", "sparse-two-sided")
            )
            pairs.append(Pair(f"density {density}", null, method))
            pairs += [Pair(f"density {density}", null, beside, shown=True) for beside in (one, both)]
        statuses.append(verdict(CLAIM, subject, pairs))
    sys.exit(max(statuses))
