"""torchao: int8 weights by channel, and int4 weights in groups, without data."""

from __future__ import annotations

import torch
from task import linear_layers, nbytes, open_model, read_task, timed, write_result
from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
from torchao.quantization import Int8WeightOnlyConfig, quantize_


def main() -> None:
    task = read_task()
    module = open_model(task)
    names = set(linear_layers(module))
    bits = task.setting["bits"]
    if bits == 8:
        config = Int8WeightOnlyConfig()
    else:
        module = module.bfloat16()  # its int4 kernels take nothing else
        config = PrototypeInt4WeightOnlyConfig(group_size=task.setting["group"])
    _, spent = timed(lambda: quantize_(module, config, filter_fn=lambda layer, name: name in names))
    dense, stored = {}, {}
    for name in sorted(names):
        weight = module.get_submodule(name).weight
        if type(weight) is torch.nn.Parameter:
            continue
        parts, _ = weight.__tensor_flatten__()
        kept = [getattr(weight, part) for part in parts]
        kept = [t.half() if t.dtype == torch.float32 else t for t in kept]  # scales as of a model in 16 bits
        stored[f"{name}.weight"] = nbytes(kept)
        dense[f"{name}.weight"] = dense_of(module.get_submodule(name))
    if not dense:
        raise SystemExit("NothingDoneError: it quantised no layer of this model.")
    write_result(task, dense, stored, spent, ("torchao", "transformers"))


def dense_of(layer: torch.nn.Module) -> torch.Tensor:
    """The weight as the layer computes with it: what it makes of the unit vectors, its bias taken off."""
    weight = layer.weight
    if hasattr(weight, "dequantize"):
        try:
            return weight.dequantize()
        except NotImplementedError:
            pass
    units = torch.eye(weight.shape[1], dtype=torch.bfloat16)
    with torch.no_grad():
        return torch.nn.functional.linear(units, weight).float().T


if __name__ == "__main__":
    main()
