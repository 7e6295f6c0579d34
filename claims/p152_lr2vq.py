"""P152 LR2VQ: Learning Low-Rank Representations for Model Compression.

Claim: a codebook in d < m dimensions with a projection back to m does less damage than one of full vectors. Null: full
vectors of m with the same codes and so the same number of entries, which take a few bytes more. The paper then trains
entries and projection on the task; here they are as k-means leaves them.
"""

import sys

from _shared import Pair, changed, minilm, trial, verdict

if __name__ == "__main__":
    subject, pairs = minilm(), []
    for bits in ([8, 8], [10, 10]):
        null, *methods = (
            trial(subject, f"d {dims or 8} of 8", changed("lr2vq", bits=[bits], dims=dims)) for dims in (None, 6, 4)
        )
        pairs += [Pair(f"{'+'.join(map(str, bits))} bits", null, method) for method in methods]
    sys.exit(verdict("A codebook in fewer dimensions does less damage than full vectors.", subject, pairs))
