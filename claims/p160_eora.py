"""P160 EoRA: Training-free Compensation for Compressed LLM with Eigenspace Low-Rank Approximation.

Claim: correcting the error of a quantised layer by a low-rank term in the eigenspace of its inputs does less damage
than by the plain SVD of the error. Null: that plain SVD, on the same integers at the same rank, so at exactly equal
bytes. Shown beside it is what the same bytes buy as plain integers of one bit more.
"""

import sys

from _shared import Pair, changed, pylm, trial, verdict

if __name__ == "__main__":
    subject, pairs = pylm(), []
    for bits, rank in ((3, 8), (2, 8)):
        eora = changed("eora", first={"bits": bits, "group_size": 64}, second={"rank": rank})
        null, method = trial(subject, "plain SVD", changed(eora, "identity")), trial(subject, "eora", eora)
        codes = trial(subject, f"nearest {bits + 1} bits", changed("rtn", bits=bits + 1, group_size=64))
        budget = f"{bits} bits + r{rank}"
        pairs += [Pair(budget, null, method), Pair(budget, codes, method, shown=True)]
    sys.exit(verdict("A correction in the inputs' eigenspace does less damage than plain SVD.", subject, pairs))
