"""optimum-quanto: weights at 8, 4 or 2 bits without data, of linear layers and convolutions, in its own groups."""

from __future__ import annotations

import torch
from optimum.quanto import freeze, qint2, qint4, qint8, quantize
from task import nbytes, open_model, read_task, timed, write_result


def main() -> None:
    task = read_task()
    module = open_model(task)

    def quantise() -> None:
        quantize(module, weights={8: qint8, 4: qint4, 2: qint2}[task.setting["bits"]], exclude="lm_head")
        freeze(module)

    _, spent = timed(quantise)
    dense, stored = {}, {}
    for name, layer in module.named_modules():
        weight = getattr(layer, "weight", None)
        if not hasattr(weight, "dequantize") or not hasattr(weight, "qtype"):
            continue
        kept = {}
        weight.save_to_state_dict(kept, "", False)
        halves = {k: t.half() if t.dtype == torch.float32 else t for k, t in kept.items()}  # as of a model in 16 bits
        dense[f"{name}.weight"] = weight.dequantize()
        stored[f"{name}.weight"] = nbytes(halves)
    write_result(task, dense, stored, spent, ("optimum-quanto", "transformers"))


if __name__ == "__main__":
    main()
