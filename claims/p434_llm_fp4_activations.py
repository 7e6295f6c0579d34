"""P434 LLM-FP4: 4-Bit Floating-Point Quantized Transformers, its second half: activations.

Claim: 4-bit floats do less damage to activations than 4-bit integers, and a power of two a channel, taken into the
exponents of the weight, lessens it further. Nulls: integers for the first, the same format without the shift for the
second, all with a scale a tensor searched in the same way. The inputs of all linear layers are rounded, weights are
whole; the floats are the best of e1m2, e2m1 and e3m0 at each layer. Beside the claim stand a scale a token, which takes
no bytes, and 8 bits.
"""

import sys

from _rounding import ALWAYS, Comparisons, Rounder
from _shared import FAILS, HOLDS, babyllama, minilm

FLOATS = ("e1m2", "e2m1", "e3m0")

if __name__ == "__main__":
    holds = True
    for subject, pattern in ((babyllama(), "*layers*"), (minilm(), "*encoder*")):
        rounder = Rounder(subject, pattern)
        table = Comparisons("4-bit floats beat 4-bit integers, and shifted channels beat both.", rounder)
        whole = {
            name: rounder.rounded(name, [f"{f},tensor" for f in formats])
            for name, formats in (("int4", ["int4"]), ("fp4", FLOATS))
        }
        shifted = {
            name: rounder.rounded(f"{name} shifted", [f"{f},tensor,shift" for f in formats], ALWAYS)
            for name, formats in (("int4", ["int4"]), ("fp4", FLOATS))
        }
        table.add(whole["int4"], whole["fp4"])
        table.add(whole["fp4"], shifted["fp4"])
        table.add(whole["int4"], shifted["int4"], shown=True)
        table.add(shifted["int4"], shifted["fp4"], shown=True)
        beside = {"int4": ["int4"], "fp4": FLOATS, "int8": ["int8"], "fp8": ["fp8"]}
        tokens = {name: rounder.rounded(f"{name} token", list(formats)) for name, formats in beside.items()}
        table.add(whole["int4"], tokens["int4"], shown=True)
        table.add(whole["fp4"], tokens["fp4"], shown=True)
        table.add(tokens["int4"], tokens["fp4"], shown=True)
        table.add(tokens["int8"], tokens["fp8"], shown=True)
        holds &= table.close()
    print(f"\nThe direction {'holds' if holds else 'does NOT hold'} at every comparison tried.")
    sys.exit(HOLDS if holds else FAILS)
