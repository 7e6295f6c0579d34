"""P130 Greenformers: Improving Computation and Memory Efficiency in Transformer Models via Low-Rank Approximation.

Claim: a block with low-rank projections is the cheaper one for short sequences, up to 512 tokens, and Linformer's
projection of the keys and values to fewer positions for long ones. Random weights, as time and memory do not depend on
them: a block of the width of BERT-base, factors of half the parameters, 128 or 256 positions left by Linformer. Medians
of paired rounds on one thread; the null of each is the other. What either loses is not shown: Linformer is trained.
"""

import math
import sys
import time

import numpy as np
import torch
from torch import Tensor, nn

from _shared import FAILS, HOLDS, hand_over
from tersor.judge.costs import peak_bytes

WIDTH, HEADS, HIDDEN = 768, 12, 3072
LENGTHS = (64, 128, 256, 512, 1024, 2048, 4096)
KEPT = (128, 256)  # positions of keys and values that Linformer leaves


def factored(columns: int, rows: int) -> nn.Module:
    """Two factors with half the parameters of the layer."""
    rank = rows * columns // (2 * (rows + columns))
    return nn.Sequential(nn.Linear(columns, rank, bias=False), nn.Linear(rank, rows))


class Block(nn.Module):
    """Attention and a feed-forward layer; `kept` is the number of positions that keys and values are projected to."""

    def __init__(self, length: int, low_rank: bool = False, kept: int | None = None, fused: bool = False) -> None:
        super().__init__()
        layer = factored if low_rank else nn.Linear
        self.query, self.key, self.value, self.out = (layer(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = layer(WIDTH, HIDDEN), layer(HIDDEN, WIDTH)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.projections = None
        if kept is not None:
            self.projections = nn.ParameterList(torch.randn(kept, length) / math.sqrt(length) for _ in range(2))
        self.fused = fused

    def forward(self, x: Tensor) -> Tensor:
        keys, values = self.key(x), self.value(x)
        if self.projections is not None:
            keys, values = (p @ t for p, t in zip(self.projections, (keys, values), strict=True))
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (self.query(x), keys, values))
        if self.fused:
            mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        else:
            mixed = (q @ k.transpose(-1, -2) / math.sqrt(WIDTH // HEADS)).softmax(-1) @ v
        x = self.norms[0](x + self.out(mixed.transpose(1, 2).flatten(2)))
        return self.norms[1](x + self.down(nn.functional.gelu(self.up(x))))


def measured(length: int, fused: bool) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """Seconds (rounds,) and peak bytes of every block at a length, in turn."""
    blocks = {"dense": Block(length, fused=fused), "low rank": Block(length, low_rank=True, fused=fused)}
    blocks |= {f"Linformer {kept}": Block(length, kept=kept, fused=fused) for kept in KEPT}
    x = torch.randn(1, length, WIDTH)
    seconds: dict[str, list[float]] = {name: [] for name in blocks}
    with torch.no_grad():
        for round_number in range((5 if length > 1024 else 9) + 1):
            for name, block in blocks.items():
                start = time.perf_counter()
                block(x)
                if round_number:
                    seconds[name].append(time.perf_counter() - start)
        peaks = {name: peak_bytes(lambda b=b: b(x), b, torch.device("cpu")) for name, b in blocks.items()}
    return {name: np.array(values) for name, values in seconds.items()}, peaks


def crossover(ratios: list[float]) -> float | None:
    """The length at which low rank over Linformer passes 1, between lengths on a scale of logarithms; None if never."""
    logs = np.log(ratios)
    for k in range(1, len(logs)):
        if logs[k - 1] < 0 <= logs[k]:
            share = logs[k - 1] / (logs[k - 1] - logs[k])
            return float(LENGTHS[k - 1] * (LENGTHS[k] / LENGTHS[k - 1]) ** share)
    return None


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    rows, notes, holds, told = [], [], True, []
    for fused in (False, True):
        attention = "fused attention" if fused else "attention in steps"
        times: dict[int, list[float]] = {kept: [] for kept in KEPT}
        sizes: dict[int, list[float]] = {kept: [] for kept in KEPT}
        print(f"\n{attention}, one block of width {WIDTH}, batch 1, one thread\n{'tokens':>6} {'block':14} ms / MB")
        for length in LENGTHS:
            seconds, peaks = measured(length, fused)
            cells = {n: f"{1e3 * np.median(s):.1f} ms, {peaks[n] / 1e6:.1f} MB" for n, s in seconds.items()}
            rows.append([attention, length, *cells.values()])
            for kept in KEPT:
                other = f"Linformer {kept}"
                times[kept].append(float(np.median(seconds["low rank"] / seconds[other])))
                sizes[kept].append(peaks["low rank"] / peaks[other])
            print(f"{length:6} " + "; ".join(f"{name} {cell}" for name, cell in cells.items()), flush=True)
            if length == 512:
                share = float(np.median(seconds["low rank"] / seconds["dense"]))
                memory = peaks["low rank"] / peaks["dense"]
                notes.append(f"{attention}: at 512 tokens low rank takes {share:.2f} of the dense block's time, "
                             f"{memory:.2f} of its peak memory")  # fmt: skip
        for kept in KEPT:
            in_time, in_memory = crossover(times[kept]), crossover(sizes[kept])
            holds = holds and in_time is not None and times[kept][-1] > 1
            at = [
                f"{what} {'never' if c is None else f'at {c:.0f}'}"
                for what, c in (("time", in_time), ("memory", in_memory))
            ]
            ratios = ", ".join(f"{length}: {t:.2f}" for length, t in zip(LENGTHS, times[kept], strict=True))
            told.append(f"{attention}, {kept} positions: {' and '.join(at)} tokens")
            notes += [f"{told[-1]}; low rank / Linformer {kept} in time: {ratios}"]
    print("\n".join(notes))
    print(f"\nLow rank is the faster for short sequences, Linformer for long: {'holds' if holds else 'does NOT hold'}.")
    hand_over(
        "Low rank is the faster block for short sequences, Linformer's projection for long ones.",
        "a block with random weights, BERT-base's width", notes,
        columns=["attention", "tokens", "dense", "low rank", *(f"Linformer {kept}" for kept in KEPT)], rows=rows,
        measured="Linformer overtakes low rank: " + "; ".join(told),
    )  # fmt: skip
    sys.exit(HOLDS if holds else FAILS)
