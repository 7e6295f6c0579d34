"""P047 Unified Low-rank Compression Framework for Click-through Rate Prediction.

Claim: compressing the output features of the embedding table and of the layers, not the weights themselves, keeps the
AUC at a third to a fifth of the size. Null: plain SVD of the same weights, its ranks chosen in the same way, at no
fewer bytes. The model is made here, on the census table as clicks: one table for the values of all 14 columns, numbers
cut into quantiles, and three layers on top, trained for a few epochs; no fine-tuning follows the compression.
"""

import sys
from dataclasses import replace

import torch

from _shared import Pair, Subject, trial, verdict
from click_model import click_model, data_of
from tersor.judge.scores import auc
from tersor.methods import method_named

if __name__ == "__main__":
    clicks = click_model()
    (x, y), (_, held_out) = clicks.fit, clicks.held_out
    subject = Subject(
        "Click model on census data",
        clicks.open,
        data_of("calibration rows", (x[:8192], y[:8192]), 512),
        data_of("held-out rows", clicks.held_out, 1024),
        options={},
    )
    truth = held_out.numpy()

    def score(tried) -> float:
        with torch.no_grad():
            logits = torch.cat([tried.outputs(batch) for batch in subject.reference.batches])
        return auc(logits[:, 0].numpy(), truth)

    pairs, notes = [], [f"AUC of the original {score(subject.original):.4f}"]
    for budget in ("33%", "25%", "20%"):
        null = trial(subject, "svd, ranks chosen", replace(method_named("svd"), allocation="front"), budget)
        method = trial(subject, "low-rank-ctr", "low-rank-ctr", f"{null.nbytes}B")
        pairs.append(Pair(budget, null, method))
        notes.append(f"AUC at {budget}: {score(null.model):.4f} svd, {score(method.model):.4f} low-rank-ctr")
    sys.exit(verdict("Compressing output features does less damage than compressing weights.", subject, pairs, notes))
