"""llmcompressor: GPTQ, and AWQ with its rounding to nearest, in the packed format of compressed-tensors.

The model is in float32, so it would store 32-bit scales; they are rounded to 16 bits, as in half-precision checkpoints.
"""

from __future__ import annotations

import torch
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.utils import get_direct_state_dict
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from task import linear_layers, nbytes, open_model, read_task, timed, write_result
from torch.utils.data import DataLoader


def main() -> None:
    task = read_task()
    module = open_model(task)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    asked = task.setting
    weights = {
        "num_bits": asked["bits"], "type": "int", "symmetric": asked["symmetric"], "strategy": "group",
        "group_size": asked["group"],
    }  # fmt: skip
    plan = {"config_groups": {"all": {"targets": ["Linear"], "weights": weights}}, "ignore": ["lm_head"]}
    IntermediatesCache.pin_memory = lambda *args, **kwargs: None  # fails where there is no accelerator, and serves none
    recipe = {
        "gptq": lambda: [GPTQModifier(**plan)],
        "awq": lambda: [AWQModifier(), QuantizationModifier(**plan)],
    }[asked["method"]]()
    loader = DataLoader(task.batches, batch_size=None)
    samples = sum(len(batch["input_ids"]) for batch in task.batches)
    _, spent = timed(lambda: oneshot(model=module, dataset=loader, recipe=recipe, num_calibration_samples=samples))

    dense, stored = {}, {}
    for name, layer in linear_layers(module).items():
        if getattr(layer, "quantization_scheme", None) is None:
            continue
        state = {k: v for k, v in get_direct_state_dict(layer).items() if k != "bias"}
        state["weight_scale"] = state["weight_scale"].half()
        coded = PackedQuantizationCompressor.compress(state, layer.quantization_scheme)
        dense[f"{name}.weight"] = PackedQuantizationCompressor.decompress(coded, layer.quantization_scheme)["weight"]
        stored[f"{name}.weight"] = nbytes(coded)
    for name, parameter in module.named_parameters():  # norms that AWQ's scales were folded into
        if name in before and name not in dense and not torch.equal(parameter, before[name]):
            dense[name], stored[name] = parameter, nbytes([parameter])
    write_result(task, dense, stored, spent, ("llmcompressor", "compressed-tensors", "transformers"))


if __name__ == "__main__":
    main()
