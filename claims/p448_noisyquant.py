"""P448 NoisyQuant: Noisy Bias-Enhanced Post-Training Activation Quantization for Vision Transformers.

Claim: a fixed uniform noise, added to the inputs of a layer before they are rounded and taken away behind it, lessens
the error of heavy-tailed inputs, those of GELU and SiLU. Null: the same integers, a scale a tensor searched in the same
way, without noise. Inputs of down projections alone are rounded, weights are whole; amplitude and scale are found on
calibration data. Beside the claim stands the noise where half of these data showed that it helps.
"""

import sys

from _rounding import ALWAYS, Comparisons, Rounder
from _shared import FAILS, HOLDS, babyllama, minilm

if __name__ == "__main__":
    holds = True
    for subject, pattern in ((minilm(), "*[0-9].output.dense"), (babyllama(), "*down_proj")):
        rounder = Rounder(subject, pattern)
        table = Comparisons("Noise before rounding lessens the error of GELU and SiLU inputs.", rounder)
        for bits in (4, 6, 8):
            plain = rounder.rounded(f"int{bits}", f"int{bits},tensor")
            always = rounder.rounded(f"int{bits} noise", f"int{bits},tensor,dither", ALWAYS)
            tested = rounder.rounded(f"int{bits} noise where it helps", f"int{bits},tensor,dither")
            table.add(plain, always)
            table.add(plain, tested, shown=True)
        holds &= table.close()
    print(f"\nThe direction {'holds' if holds else 'does NOT hold'} at every width tried.")
    sys.exit(HOLDS if holds else FAILS)
