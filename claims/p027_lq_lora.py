"""P027 LQ-LoRA: Low-rank Plus Quantized Matrix Decomposition (the decomposition, without its fine-tuning).

Claim: a weight as integers plus a low-rank term, fitted in turns, with the configuration of every matrix chosen by
integer programming, does less damage than the integers alone. Null: the integers alone, groups and bits chosen by the
same programme at no fewer bytes. Shown beside it is the weighting by the diagonal Fisher information.
"""

import sys
from dataclasses import replace

from _shared import Pair, babyllama, changed, trial, verdict

NARROW = {"first": {"bits": [2, 3, 4], "group_size": 64}, "second": {"rank": [2, 8]}}

if __name__ == "__main__":
    subject, pairs = babyllama(), []
    for budget in ("3.2bits", "4.2bits"):
        method = trial(subject, "lq-lora", changed("lq-lora", **NARROW), budget)
        settings = {"bits": [2, 3, 4, 5, 6], "group_size": [32, 64, 128], "scale_bits": 8}
        codes = replace(changed("rtn-search", **settings), allocation="front")
        null = trial(subject, "integers alone", codes, budget)
        fisher = trial(subject, "lq-lora-fisher", changed("lq-lora-fisher", **NARROW), budget)
        pairs += [Pair(budget, null, method), Pair(budget, method, fisher, shown=True)]
    sys.exit(verdict("Integers plus a low-rank term do less damage than integers alone.", subject, pairs))
