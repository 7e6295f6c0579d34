"""P435 Rethinking Channel Dimensions to Isolate Outliers for Low-bit Weight Quantization (AdaDim).

Claim: choosing for every weight whether groups lie along its inputs or along its outputs does less damage than always
along the inputs, on top of round-to-nearest and on top of GPTQ. Null: always along the inputs. Groups of 32 divide all
weights of the blocks both ways, so bytes are exactly equal.
"""

import sys

from _shared import Pair, babyllama, changed, trial, verdict

if __name__ == "__main__":
    subject, pairs = babyllama(), []
    for bits in (2, 3):
        for null_name, name in (("rtn", "adadim"), ("gptq", "adadim-gptq")):
            null = trial(subject, f"{null_name} {bits} bits", changed(null_name, bits=bits, group_size=32))
            method = trial(subject, f"{name} {bits} bits", changed(name, bits=bits, group_size=32))
            pairs.append(Pair(f"{bits} bits g32", null, method))
    sys.exit(
        verdict("Choosing the grouping dimension does less damage than grouping along the inputs.", subject, pairs)
    )
