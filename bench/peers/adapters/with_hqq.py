"""hqq, native: half-quadratic quantisation of weights without data, at 8 to 1 bits, 16-bit scales and zeros."""

from __future__ import annotations

import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
from task import linear_layers, nbytes, open_model, read_task, timed, write_result


def main() -> None:
    task = read_task()
    layers = linear_layers(open_model(task))
    config = BaseQuantizeConfig(nbits=task.setting["bits"], group_size=task.setting["group"], axis=1)

    def quantise() -> dict[str, HQQLinear]:
        return {
            name: HQQLinear(layer, config, compute_dtype=torch.float16, device="cpu", del_orig=False)
            for name, layer in layers.items()
        }

    coded, spent = timed(quantise)
    dense = {f"{name}.weight": layer.dequantize() for name, layer in coded.items()}
    stored = {f"{name}.weight": nbytes([layer.W_q, *layer.meta.values()]) for name, layer in coded.items()}
    write_result(task, dense, stored, spent, ("hqq", "transformers"))


if __name__ == "__main__":
    main()
