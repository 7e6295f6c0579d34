"""P260 LQER: Low-Rank Quantization Error Reconstruction for LLMs.

Claim: scaling the quantisation error by the size of its inputs before its SVD does less damage than the plain SVD of
the error. Null: that plain SVD, on the same integers at the same rank, so at exactly equal bytes. Shown beside it are
EoRA's full second moment at the same bytes, and the same integers with one bit more.
"""

import sys

from _shared import Pair, changed, pylm, trial, verdict

if __name__ == "__main__":
    subject, pairs = pylm(), []
    for bits, rank in ((3, 16), (2, 16)):
        lqer = changed("lqer", first={"bits": bits, "group_size": 64}, second={"rank": rank})
        null, method = trial(subject, "plain SVD", changed(lqer, "identity")), trial(subject, "lqer", lqer)
        full = trial(subject, "full second moment", changed(lqer, "input"))
        codes = trial(subject, f"nearest {bits + 1} bits", changed("rtn", bits=bits + 1, group_size=64))
        budget = f"{bits} bits + r{rank}"
        pairs.append(Pair(budget, null, method))
        pairs += [Pair(budget, beside, method, shown=True) for beside in (full, codes)]
    sys.exit(verdict("A correction scaled by the inputs does less damage than plain SVD.", subject, pairs))
