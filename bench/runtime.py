"""Built models at run time beside their originals and torchao: bytes resident and at most, latency, tokens a second.

    python bench/runtime.py MODEL [--run DIR]

The plan of each form alone, and of all forms, at the third of the model's budgets, the last of them once more in plain
weights; torchao's weight-only integers in the same place. Latency of one sample and of 32 and, for language models,
of generating, the two models in turn. Peaks are of one batch of 32.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import tersor
from models import NAMES, Reference, reference
from tersor.errors import UnreachableBudget
from tersor.judge.costs import latency, peak_bytes, resident_bytes
from tersor.models import Model
from tersor.steps import build_plan, open_study

RESULTS = Path(__file__).parent / "results"
FORMS = ("int", "coded", "lowrank", None)
PROMPT, GENERATED = 16, 64  # tokens


class Generating:
    """A language model whose outputs are the tokens it makes after a prompt, greedily."""

    def __init__(self, model: Model) -> None:
        self.module, self.device = model.module, model.device

    def outputs(self, prompt: Tensor) -> Tensor:
        return self.module.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=GENERATED, min_new_tokens=GENERATED,
            do_sample=False, pad_token_id=0,
        )  # fmt: skip


@torch.no_grad()
def measured(original: Model, new: Model, batches: dict[int, Any]) -> dict[str, Any]:
    """Bytes and latencies of `new`, with the ratios to `original`."""
    found: dict[str, Any] = {"resident": held_bytes(new.module) / held_bytes(original.module)}
    peaks = [
        peak_bytes(lambda m=m: m.outputs(batches[32]), m.module, m.device)
        for m in (original, new)  # type: ignore[misc]
    ]
    found["peak"] = peaks[1] / peaks[0]
    for size, batch in batches.items():
        timed = latency(original, new, batch, rounds=15 if size == 1 else 7)
        found[f"latency {size}"] = timed.ratio
        found[f"seconds {size}"] = timed.new
    if getattr(original, "head", None) == "causal-lm":
        timed = latency(Generating(original), Generating(new), batches[1]["input_ids"][:, :PROMPT], rounds=7)
        found["generating"] = timed.ratio
        found["tokens a second"] = GENERATED / timed.new
    return found


def held_bytes(module: nn.Module) -> int:
    """Bytes resident; tensors of torchao's classes count by what they are made of."""
    composed = [t for t in {id(t): t for t in module.state_dict(keep_vars=True).values()}.values() if _parts(t)]
    inner = sum(part.numel() * part.element_size() for t in composed for part in _parts(t))
    return resident_bytes(module) + inner - sum(t.numel() * t.element_size() for t in composed)


def _parts(tensor: Tensor) -> list[Tensor]:
    value = tensor.data if isinstance(tensor, nn.Parameter) else tensor
    if not hasattr(value, "__tensor_flatten__"):
        return []
    parts = [getattr(value, name) for name in value.__tensor_flatten__()[0]]
    return [leaf for part in parts for leaf in (_parts(part) or [part])]


def rivals() -> dict[str, Any]:
    """Configurations of torchao for linear layers on a CPU, by name; none where it is not installed."""
    try:
        from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig
        from torchao.quantization.granularity import PerGroup
    except ImportError as error:
        print(f"torchao cannot be imported, so there are no rows for it: {error}")
        return {}
    four = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))
    return {"torchao int8": Int8WeightOnlyConfig(), "torchao int4": four}


def built(known: Reference, run: Path, scratch: Path) -> Iterator[tuple[str, float, float, Model]]:
    """Every built model, loaded again: its name, its share of the original's bytes, the seconds that loading took."""
    for form in FORMS:
        opened, model = open_study(known.open(), run), known.open()
        try:
            plan = opened.plan(known.budgets[2], forms=None if form is None else (form,))
        except UnreachableBudget as error:
            print(f"{form}: {error}")
            continue
        out = scratch / str(form)
        build_plan(opened, plan, out)
        share = plan.stored / opened.stored_bytes
        for mode in ("small",) if form is not None else ("small", "dense"):
            factory = None if model.identity.kind == "huggingface" else lambda: known.open().module
            start = time.perf_counter()
            model = copy.copy(model)
            model.module = tersor.load(out, model=factory, mode=mode)
            yield (form or "all") + (", dense" if mode == "dense" else ""), share, time.perf_counter() - start, model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=NAMES)
    parser.add_argument("--run", type=Path, default=None)
    given = parser.parse_args()
    known, scratch = reference(given.model), Path(tempfile.mkdtemp())
    run = given.run or scratch / "run"
    known.study(run, gains=False)  # which plan it is matters less here than what it is made of
    original, rows = known.open(), []
    batches = {size: original.batches(known.held_out, size, known.sequence_length, size)[0] for size in (1, 32)}

    def keep(row: dict[str, Any]) -> None:
        rows.append(row)
        print(", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)

    for name, share, seconds, model in built(known, run, scratch):
        keep({"forms": name, "bytes": share, "load": seconds, **measured(original, model, batches)})
    for name, config in rivals().items():
        from torchao.quantization import quantize_

        model = known.open()
        try:
            quantize_(model.module, config)
            keep({"forms": name, **measured(original, model, batches)})
        except Exception as error:
            keep({"forms": name, "failed": " ".join(str(error).split())[:200]})
    RESULTS.mkdir(exist_ok=True)
    found = {"model": known.name, "threads": torch.get_num_threads(), "rows": rows}
    (RESULTS / f"runtime-{known.name}.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
