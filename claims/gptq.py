"""GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers (arXiv:2210.17323).

Claim: pushing each column's rounding error into the columns not yet rounded, under the inputs' second moment, does less
damage than rounding to the nearest. Null: round to nearest on the same min-max grid, so at exactly equal bytes.
"""

import sys

from _shared import Pair, babyllama, changed, trial, verdict

if __name__ == "__main__":
    subject, pairs = babyllama(), []
    for bits in (2, 3, 4):
        null = trial(subject, f"nearest {bits} bits", changed("rtn", bits=bits, group_size=32))
        method = trial(subject, f"gptq {bits} bits", changed("gptq", bits=bits, group_size=32))
        pairs.append(Pair(f"{bits} bits g32", null, method))
    sys.exit(verdict("GPTQ does less damage than rounding to nearest.", subject, pairs))
