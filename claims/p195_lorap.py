"""P195 LoRAP: Transformer Sub-Layers Deserve Differentiated Structured Compression (its attention half).

Claim: for the matrices of the attention, SVD weighted by the size of the inputs, with ranks given to the matrices that
need them, does less damage than plain SVD. Null: plain SVD of the same matrices at the same share of each, at no fewer
bytes; plain SVD with its ranks chosen in the same way is shown beside it.
"""

import sys
from dataclasses import replace

from _shared import Pair, babyllama, trial, verdict
from tersor.methods import method_named

if __name__ == "__main__":
    subject, pairs = babyllama(), []
    subject.options["include"] = ["*self_attn*"]
    for budget in ("12bits", "8bits"):
        null = trial(subject, "svd, same share", "svd", budget)
        method = trial(subject, "lorap-svd", "lorap-svd", f"{null.bits}bits")
        chosen = replace(method_named("svd"), allocation="front")
        beside = trial(subject, "svd, ranks chosen", chosen, f"{null.bits}bits")
        pairs += [Pair(budget, null, method), Pair(budget, beside, method, shown=True)]
    sys.exit(verdict("Activation-weighted SVD of the attention does less damage than plain SVD.", subject, pairs))
