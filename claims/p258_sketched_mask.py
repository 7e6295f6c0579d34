"""P258 Pruning at Initialization -- A Sketching Perspective.

Claim: choosing a mask is sketching a matrix product, so that sampling its entries by the norms of weight and input
improves on keeping the largest. The paper's masks are drawn before training and judged after it; these are drawn on a
trained model and judged as they are. Null: the largest of the same scores in each row, so at exactly equal bytes. Shown
beside it: both masks with their kept entries refitted under the inputs' second moment.
"""

import sys

from _shared import Pair, babyllama, changed, trial, verdict

CLAIM = "A mask sampled by the norms of weight and input does less damage than the largest of the same scores."

if __name__ == "__main__":
    subject, pairs = babyllama(), []
    for density in (0.7, 0.5):
        null = trial(subject, "largest", changed("wanda", density=density))
        method = trial(subject, "sampled", changed("sketched-mask", density=density))
        pairs.append(Pair(f"density {density}", null, method))
        again = [
            trial(subject, label, changed(name, "input", density=density, refit=True))
            for label, name in (("largest, refitted", "wanda"), ("sampled, refitted", "sketched-mask"))
        ]
        pairs.append(Pair(f"density {density}", *again, shown=True))
    sys.exit(verdict(CLAIM, subject, pairs))
