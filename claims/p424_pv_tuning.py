"""P424 PV-Tuning: Beyond Straight-Through Estimation for Extreme LLM Compression.

Claim: improving entries (V) and codes (P) in turn does less damage than codes chosen once. Null: the same codebooks by
k-means with codes chosen once, at exactly equal bytes. The paper descends the divergence of the whole model by its
gradients; here the objective is the distance of one weight, under the same metric for both. Shown beside it is the
lattice E8, which stores no entries.
"""

import sys

from _shared import Pair, changed, minilm, trial, verdict

if __name__ == "__main__":
    subject, pairs = minilm(), []
    for bits, lattice in (([8], 12), ([8, 8], 16)):
        null = trial(subject, "codes once", changed("pv-tuning", bits=[bits], rounds=0))
        method = trial(subject, "in turn, twice", changed("pv-tuning", bits=[bits]))
        beside = trial(subject, "E8", changed("quip-sharp", "kronecker", bits=[[lattice]]))
        budget = f"{sum(bits) / 8:.0f} bits"
        pairs += [Pair(budget, null, method), Pair(budget, beside, method, shown=True)]
    sys.exit(verdict("Entries and codes improved in turn do less damage than codes chosen once.", subject, pairs))
