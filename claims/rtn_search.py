"""Round to nearest with searched scales (folklore; the mean-squared-error observer of every quantisation library).

Claim: a grid that clips a group for the least squared error does less damage than one from the group's extremes, the
more so the fewer the bits. Null: the extremes, at exactly equal bytes.
"""

import sys

from _shared import Pair, babyllama, changed, trial, verdict

if __name__ == "__main__":
    subject, pairs = babyllama(), []
    for bits in (2, 3, 4):
        null = trial(subject, f"extremes {bits} bits", changed("rtn", bits=bits, group_size=32))
        method = trial(subject, f"searched {bits} bits", changed("rtn-search", bits=bits, group_size=32))
        pairs.append(Pair(f"{bits} bits g32", null, method))
    sys.exit(verdict("Searched scales do less damage than those of the extremes.", subject, pairs))
