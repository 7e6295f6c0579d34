"""What all adapters share: reading a task, opening its model, measuring the work, writing what came of it.

An adapter runs in the environment of its peer, `python with_NAME.py TASK_FOLDER`, and knows nothing of Tersor. It hands
back every weight that it changed as the peer would compute with it, and the bytes of the tensors that the peer stores.
"""

from __future__ import annotations

import importlib.util
import json
import resource
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


@dataclass(frozen=True)
class Task:
    """A model, the batches to calibrate on in their order, and what the peer is asked for."""

    folder: Path
    model: dict[str, Any]
    setting: dict[str, Any]
    batches: list[dict[str, Tensor]]
    seed: int

    @property
    def is_language_model(self) -> bool:
        return self.model.get("class", "").endswith("ForCausalLM")

    def samples(self) -> list[dict[str, Tensor]]:
        """The batches cut into single samples, without the padding of each."""
        out = []
        for batch in self.batches:
            for i in range(len(next(iter(batch.values())))):
                one = {k: v[i : i + 1] for k, v in batch.items()}
                if "attention_mask" in one:
                    real = one["attention_mask"][0].bool()
                    one = {k: v[:, real] for k, v in one.items()}
                out.append(one)
        return out


def read_task() -> Task:
    """The task in the folder that the command line names; random numbers start from its seed."""
    folder = Path(sys.argv[1])
    asked = json.loads((folder / "task.json").read_text(encoding="utf8"))
    batches: list[dict[str, Tensor]] = []
    for key, tensor in sorted(load_file(asked["calibration"]).items(), key=lambda item: int(item[0].split(".")[0])):
        number, name = key.split(".", 1)
        if int(number) == len(batches):
            batches.append({})
        batches[int(number)][name] = tensor
    torch.manual_seed(asked["seed"])
    return Task(folder, asked["model"], asked["setting"], batches, asked["seed"])


def open_model(task: Task) -> nn.Module:
    """The model in float32, in evaluation mode."""
    if task.model["kind"] == "huggingface":
        import transformers

        found = getattr(transformers, task.model["class"])
        module = found.from_pretrained(task.model["folder"], dtype=torch.float32, local_files_only=True)
    else:
        spec = importlib.util.spec_from_file_location("model_file", task.model["file"])
        assert spec is not None and spec.loader is not None
        namespace = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(namespace)
        module = getattr(namespace, task.model["factory"])()
        module.load_state_dict(load_file(task.model["weights"]))
    return module.eval()


def run_batch(module: nn.Module, batch: Mapping[str, Tensor]) -> Any:
    """One forward pass; images are a positional argument."""
    return module(batch["images"]) if "images" in batch else module(**batch)


def linear_layers(module: nn.Module, kinds: tuple[type, ...] = (nn.Linear,)) -> dict[str, nn.Module]:
    """The layers that peers quantise: all but the head of a language model."""
    return {n: m for n, m in module.named_modules() if type(m) in kinds and n != "lm_head"}


def timed(work: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """What `work` returns, its seconds, and those of all processors, which other work on the machine lengthens less."""
    start, cpu = time.perf_counter(), _cpu_seconds()
    found = work()
    return found, {"seconds": time.perf_counter() - start, "cpu_seconds": _cpu_seconds() - cpu}


def _cpu_seconds() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def nbytes(tensors: Any) -> int:
    """Bytes of all tensors in a dictionary or a sequence."""
    values = tensors.values() if isinstance(tensors, Mapping) else tensors
    return sum(t.numel() * t.element_size() for t in values if isinstance(t, Tensor))


def write_result(
    task: Task,
    dense: Mapping[str, Tensor],
    stored: Mapping[str, int],
    spent: Mapping[str, float],
    packages: tuple[str, ...],
    resident: Mapping[str, int] | None = None,
) -> None:
    """Write the task's result: `dense` weights by parameter name, the bytes that each takes as stored and in memory.

    A parameter that changed without being coded, such as a norm that took up a scale, is given with its own bytes.
    """
    assert set(dense) == set(stored), sorted(set(dense) ^ set(stored))
    weights = {name: t.detach().float().contiguous().clone() for name, t in dense.items()}
    for name, weight in weights.items():
        if not torch.isfinite(weight).all():
            raise SystemExit(f"{name} has weights that are not finite.")
    save_file(weights, task.folder / "weights.safetensors")
    result = {
        "touched": sorted(weights),
        "stored": sum(stored.values()),
        "resident": sum((resident or stored).values()),
        **spent,
        "peak_memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "versions": {name: version(name) for name in ("torch", *packages)},
        "setting": task.setting,
    }
    (task.folder / "result.json").write_text(json.dumps(result, indent=1), encoding="utf8")
