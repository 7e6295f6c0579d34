"""A model that does not fit: a Llama of random weights is studied, built and judged within a limit on memory.

    script/bench large [--blocks 29] [--memory 6GB] [--metric input] [--folder DIR]

Writes the checkpoint in shards of 2 GB, with the widths of a model of 7 billion weights, once; then runs every step in
a process of its own. The peak is that of all pages resident of that process and its children, files that they map
counted too. A step that is done is kept in the folder with its figures, so a run that was stopped goes on with the step
that it was at, whose time is then that of what was left; remove the folder to time all anew.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from peers.processes import watched
from tersor.models import open_model
from tersor.models.files import write_text
from tersor.steps import build_plan, judge_artifact, reopen, study

RESULTS = Path(__file__).parent / "results"
SHARD = 2 << 30
WIDTH, INNER, HEADS, VOCABULARY = 4096, 11008, 32, 32000
SEQUENCES, LENGTH, ROWS = 16, 256, 4
SETTINGS = {"int": [{"bits": 4, "group_size": 64}]}
DAMPING = {"inputs": 0.03, "gradients": 0.3, "frequencies": 0.3}
DAY = 86400
ROW = ("step", "peak", "seconds")  # what every step tells


def shapes_of(blocks: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The tensors of the checkpoint in their order."""
    yield "model.embed_tokens.weight", (VOCABULARY, WIDTH)
    for number in range(blocks):
        block = f"model.layers.{number}"
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            yield f"{block}.self_attn.{name}.weight", (WIDTH, WIDTH)
        for name in ("gate_proj", "up_proj"):
            yield f"{block}.mlp.{name}.weight", (INNER, WIDTH)
        yield f"{block}.mlp.down_proj.weight", (WIDTH, INNER)
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"{block}.{name}.weight", (WIDTH,)
    yield "model.norm.weight", (WIDTH,)
    yield "lm_head.weight", (VOCABULARY, WIDTH)


def write_checkpoint(folder: Path, blocks: int) -> None:
    """Random weights in bfloat16, as large as those of trained models, in shards with an index."""
    folder.mkdir(parents=True)
    generator, places = torch.Generator().manual_seed(0), {}
    shard: dict[str, torch.Tensor] = {}
    number = 1

    def put() -> None:
        file = f"model-{number:05}.safetensors"
        save_file(shard, folder / file, {"format": "pt"})
        places.update(dict.fromkeys(shard, file))
        shard.clear()

    for name, shape in shapes_of(blocks):
        tensor = torch.ones(shape, dtype=torch.bfloat16)
        if len(shape) == 2:
            tensor.normal_(0, shape[1] ** -0.5, generator=generator)
        if sum(t.nbytes for t in shard.values()) + tensor.nbytes > SHARD:
            put()
            number += 1
        shard[name] = tensor
    put()
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": WIDTH, "intermediate_size": INNER,
        "num_hidden_layers": blocks, "num_attention_heads": HEADS, "num_key_value_heads": HEADS,
        "vocab_size": VOCABULARY, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "torch_dtype": "bfloat16",
        "tie_word_embeddings": False,
    }  # fmt: skip
    write_text(folder / "model.safetensors.index.json", json.dumps({"weight_map": places}))
    write_text(folder / "config.json", json.dumps(config))


def batches(seed: int, count: int) -> list[dict[str, torch.Tensor]]:
    """Sequences of random tokens, some at a time."""
    generator = torch.Generator().manual_seed(seed)
    shape = min(ROWS, count), LENGTH
    return [{"input_ids": torch.randint(VOCABULARY, shape, generator=generator)} for _ in range(-(-count // ROWS))]


def step(name: str, folder: Path, memory: str, metric: str) -> None:
    """One step, with the seconds of its parts printed as JSON on the last line."""
    start = time.perf_counter()
    run, out, model = folder / f"run-{metric}", folder / f"out-{metric}", folder / "model"
    found: dict[str, Any] = {}
    if name == "study":
        opened = study(
            model, batches(0, SEQUENCES), run, metric=metric, forms=("int",), settings=SETTINGS, damping=DAMPING,
            gains=False, memory=memory, progress=shown,
        )  # fmt: skip
        found = {part: opened.run.get(f"seconds/{part}") for part in ("observe", "limit", "draw")}
    elif name == "build":
        opened = reopen(run, memory=memory)
        built = build_plan(opened, opened.plan("5bits"), out, progress=shown)
        found = {"bytes": built.weights_bytes, "original": opened.stored_bytes, "predicted": built.plan.divergence}
    else:
        judged = judge_artifact(open_model(model, on_demand=True), out, batches(1, ROWS), progress=shown)
        found = {"divergence": judged.divergence.value}
    print("\n" + json.dumps({**found, "seconds": time.perf_counter() - start}), flush=True)


def shown(step: str, what: str, done: int, total: int) -> None:
    print(f"\r{step} {what} {done}/{total}", end=" " * 20, file=sys.stderr, flush=True)


def figures(name: str, given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """A step in a process of its own: its peak in bytes, its seconds, and what it tells."""
    log = folder / f"{name}.log"
    command = [sys.executable, "-m", "large", "--step", name, "--blocks", str(given.blocks), "--memory",
               given.memory, "--metric", given.metric, "--folder", str(given.folder)]  # fmt: skip
    code, peak = watched(command, Path(__file__).parent, os.environ, log, DAY)
    text = log.read_text(encoding="utf8", errors="replace").strip().splitlines()
    if code != 0:
        sys.exit(f"{name} failed: {text[-1] if text else code}")
    return {"step": name, "peak": peak, **json.loads(text[-1])}


def shown_row(row: dict[str, Any], blocks: int) -> str:
    parts = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items() if k not in ROW}
    peak, seconds = row["peak"] / 1e9, row["seconds"]
    told = ", ".join(f"{k} {v}" for k, v in parts.items())
    return f"{row['step']:6} peak {peak:.2f} GB, {seconds:.0f} s, {seconds / blocks:.1f} a block  {told}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=29)
    parser.add_argument("--memory", default="6GB")
    parser.add_argument("--metric", default="input", choices=("input", "kronecker"))
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent / ".large")
    parser.add_argument("--step", choices=("study", "build", "judge"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    folder = given.folder / f"{given.blocks}-blocks"
    if given.step:
        step(given.step, folder, given.memory, given.metric)
        return
    if not (folder / "model" / "config.json").exists():
        write_checkpoint(folder / "model", given.blocks)
    size = sum(path.stat().st_size for path in (folder / "model").glob("*.safetensors"))
    print(f"{given.blocks} blocks, {size / 1e9:.2f} GB, --memory {given.memory}, metric {given.metric}")
    rows = []
    for name in ("study", "build", "judge"):
        kept = folder / f"{name}-{given.metric}.json"
        if not kept.exists():
            write_text(kept, json.dumps(figures(name, given, folder)))
        row = json.loads(kept.read_text(encoding="utf8"))
        rows.append(row)
        print(shown_row(row, given.blocks), flush=True)
    found = {"blocks": given.blocks, "bytes": size, "memory": given.memory, "metric": given.metric, "rows": rows}
    write_text(RESULTS / f"large-{given.metric}-{given.blocks}.json", json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
