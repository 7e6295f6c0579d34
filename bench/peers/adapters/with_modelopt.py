"""modelopt's `auto_quantize`: bits for every layer by linear programming over gradient scores, AWQ below 8 bits.

It packs 8 and 4 bits alone, so codes are counted as packed without a gap at any bits, with 16-bit scales: the least
that a file could take. Beside its own presets it may choose 3 and 2 bits, as its custom formats allow. Its scores serve
every number of effective bits, so it keeps them, and each result counts the seconds of finding them as its own.
"""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path

import modelopt.torch.quantization as mtq
import torch
from task import Task, open_model, read_task, run_batch, timed, write_result
from torch import Tensor, nn


def formats(bits: list[int], group: int | None) -> list[dict]:
    """Weight-only formats: the presets for 8 and 4 bits, the latter with other bits and blocks for the rest."""
    out = []
    for number in bits:
        config = copy.deepcopy(mtq.INT8_WEIGHT_ONLY_CFG if number == 8 else mtq.INT4_AWQ_CFG)
        for entry in config["quant_cfg"]:
            if number != 8 and entry["quantizer_name"] == "*weight_quantizer" and "cfg" in entry:
                blocks = {-1: group} if group else None
                entry["cfg"] = (
                    {"num_bits": number, "block_sizes": blocks} if blocks else {"num_bits": number, "axis": 0}
                )
        if group is None:
            config["algorithm"] = "max"
        out.append(config)
    return out


def loss_of(task: Task):
    """The loss whose gradients score the layers: of the next token, of the label predicted, of a random projection."""
    generator = torch.Generator().manual_seed(task.seed)

    def loss(output, batch: dict[str, Tensor]) -> Tensor:
        if task.is_language_model:
            logits, following = output.logits[:, :-1].flatten(0, 1), batch["input_ids"][:, 1:].flatten()
            return nn.functional.cross_entropy(logits, following)
        if "images" in batch:
            return nn.functional.cross_entropy(output, output.argmax(-1))
        mask = batch["attention_mask"][..., None]
        pooled = (output.last_hidden_state * mask).sum(1) / mask.sum(1)
        unit = nn.functional.normalize(pooled, dim=-1)
        return (unit * torch.randn(unit.shape, generator=generator)).sum()

    return loss


def kept_search(task: Task) -> Path:
    """Where the scores of a search over these formats on these batches are kept, for all tasks beside this one."""
    digest = hashlib.sha256(json.dumps([task.setting["formats"], task.setting.get("group"), task.seed]).encode())
    for batch in task.batches:
        for tensor in batch.values():
            digest.update(tensor.numpy().tobytes())
    return task.folder.parent / f"modelopt-{digest.hexdigest()[:12]}.pt"


def main() -> None:
    task = read_task()
    module = open_model(task)
    asked = task.setting
    search = kept_search(task)
    ledger = search.with_suffix(".json")
    before = json.loads(ledger.read_text(encoding="utf8")) if ledger.exists() else {}
    if not before:
        search.unlink(missing_ok=True)  # of a task that did not come to its end, its seconds unknown
    (module, _), spent = timed(
        lambda: mtq.auto_quantize(
            module,
            constraints={"effective_bits": asked["effective_bits"]},
            quantization_formats=formats(asked["formats"], asked.get("group")),
            data_loader=task.batches,
            forward_step=run_batch,
            loss_func=loss_of(task),
            disabled_layers=["*lm_head*"],
            num_calib_steps=len(task.batches),
            num_score_steps=len(task.batches),
            checkpoint=str(search),
        )
    )
    if not before:
        ledger.write_text(json.dumps(spent), encoding="utf8")
    spent = {key: seconds + before.get(key, 0.0) for key, seconds in spent.items()}
    dense, stored = {}, {}
    for name, layer in module.named_modules():
        quantizer = getattr(layer, "weight_quantizer", None)
        if quantizer is None or not quantizer.is_enabled:
            continue
        with torch.no_grad():
            weight = quantizer(layer.weight)
        scale = getattr(layer.input_quantizer, "pre_quant_scale", None)
        parts = [quantizer.amax] + ([scale] if scale is not None else [])
        dense[f"{name}.weight"] = weight if scale is None else weight * scale
        codes = -(-layer.weight.numel() * quantizer.num_bits // 8)
        stored[f"{name}.weight"] = codes + 2 * sum(part.numel() for part in parts)
        print(name, quantizer.num_bits, tuple(quantizer.amax.shape), scale is not None)
    if not dense:
        raise SystemExit("NothingDoneError: it quantised no layer of this model.")
    write_result(task, dense, stored, spent, ("nvidia-modelopt", "transformers"))


if __name__ == "__main__":
    main()
