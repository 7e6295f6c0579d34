"""P434 LLM-FP4: 4-Bit Floating-Point Quantized Transformers.

Claim: searching the exponent bits and the clipping range of a 4-bit float does less damage than one format between the
extremes, and than 4-bit integers rounded to the nearest. Nulls: e2m1 and symmetric integers, both between the extremes,
at exactly equal bytes. Weights alone: activations and the shift of their scales into the exponents are out of scope.
Shown beside it are integers with searched scales, nf4, and the same floats rounded with two-sided feedback.
"""

import sys

from _shared import Pair, babyllama, changed, trial, verdict

if __name__ == "__main__":
    subject, pairs = babyllama(), []
    for group in (None, 32):
        budget = "row" if group is None else f"g{group}"
        fp4 = changed("llm-fp4", group_size=group)
        method = trial(subject, f"searched fp4 {budget}", fp4)
        extremes = trial(subject, f"e2m1 extremes {budget}", changed(fp4, "identity", format="e2m1", search=False))
        integers = changed("rtn", bits=4, group_size=group, symmetric=True)
        pairs += [
            Pair(budget, null, method) for null in (extremes, trial(subject, f"int4 extremes {budget}", integers))
        ]
        beside = {
            f"int4 searched {budget}": changed(integers, "input", search=True),
            f"nf4 searched {budget}": changed(fp4, format="nf4"),
            f"fp4 two-sided {budget}": changed(fp4, "kronecker", rounding="two-sided"),
            f"int4 two-sided {budget}": changed(integers, "kronecker", search=True, rounding="two-sided"),
        }
        pairs += [Pair(budget, trial(subject, label, other), method, shown=True) for label, other in beside.items()]
    sys.exit(verdict("Searched 4-bit floats beat e2m1 and integers between the extremes.", subject, pairs))
