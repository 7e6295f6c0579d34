"""P147 Model-Preserving Adaptive Rounding (YAQA).

Claim: rounding with feedback from both factors of a Kronecker sketch of the divergence's Hessian reduces the KL to the
original by about 30 % against feedback from the inputs alone. Null: one-sided feedback (LDLQ) with the same integers
and the same scale search, so at exactly equal bytes; rounding to nearest is shown beside it.
"""

import sys

from _shared import Pair, babyllama, changed, trial, verdict

if __name__ == "__main__":
    subject, pairs, notes = babyllama(), [], []
    for bits in (2, 3, 4):
        yaqa = changed("yaqa", bits=bits, group_size=32)
        nearest = trial(subject, f"nearest {bits} bits", changed(yaqa, "identity", rounding="nearest"))
        null = trial(subject, f"one-sided {bits} bits", changed(yaqa, "input", rounding="feedback"))
        method = trial(subject, f"two-sided {bits} bits", yaqa)
        pairs += [Pair(f"{bits} bits g32", null, method), Pair(f"{bits} bits g32", nearest, method, shown=True)]
        notes.append(f"{bits} bits: {1 - method.divergences.mean() / null.divergences.mean():.0%} less than one-sided")
    sys.exit(verdict("Two-sided feedback does less damage than one-sided.", subject, pairs, notes))
