"""P041 LORD: Low Rank Decomposition Of Monolingual Code LLMs For One-Shot Compression.

Claim: keeping the principal part of each linear layer's outputs, in one shot on a code language model, does less
damage than truncating its weight. Null: plain SVD at the same ranks, so at exactly equal bytes. (The paper's 1 % of
perplexity at ranks cut by 40 % is of a model of 16 billion weights; small models have less to spare.)
"""

import sys

from _shared import Pair, pylm, trial, verdict

if __name__ == "__main__":
    subject, pairs = pylm(), []
    for budget in ("12bits", "10bits", "8bits"):
        null, method = trial(subject, "svd", "svd", budget), trial(subject, "lord", "lord", budget)
        pairs.append(Pair(budget, null, method))
    sys.exit(verdict("Truncating outputs does less damage than truncating weights.", subject, pairs))
