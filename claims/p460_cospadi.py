"""P460 CoSpaDi: Compressing LLMs via Calibration-Guided Sparse Dictionary Learning.

Claim: a dictionary of which every output neuron uses half of the atoms, fitted so that activations match, does less
damage than low rank fitted in the same way. Null: low rank under the same second moment of the inputs, in no fewer
bytes, indices counted. Layer by layer: the paper's dictionaries of groups of layers are not here. Shown beside it is
plain rounding at two thirds of the bytes or less.
"""

import sys

from _shared import Pair, babyllama, changed, trial, verdict

if __name__ == "__main__":
    subject, pairs = babyllama(), []
    for budget in ("12bits", "8bits"):
        null = trial(subject, "low rank", "lord", budget)
        method = trial(subject, "cospadi", "cospadi", f"{null.bits}bits")
        codes = trial(subject, "nearest, 4 bits", changed("rtn", bits=4, group_size=64))
        pairs += [Pair(budget, null, method), Pair(budget, codes, method, shown=True)]
    sys.exit(verdict("A dictionary does less damage than low rank at equal bytes.", subject, pairs))
