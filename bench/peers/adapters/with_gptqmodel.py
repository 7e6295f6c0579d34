"""GPTQModel: GPTQ, alone and with an EoRA correction of low rank, read back from the folder that it saves."""

from __future__ import annotations

import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from gptqmodel.adapter.adapter import Lora
from safetensors.torch import load_file
from task import nbytes, read_task, timed, write_result


def main() -> None:
    task = read_task()
    if task.model["kind"] != "huggingface":
        raise SystemExit("UnsupportedError: it takes Hugging Face models only.")
    asked, saved, lora = task.setting, task.folder / "saved", task.folder / "lora"
    config = QuantizeConfig(bits=asked["bits"], group_size=asked["group"], device="cpu")
    dtype = torch.bfloat16 if "rank" in asked else torch.float32  # EoRA takes no other
    model = GPTQModel.load(task.model["folder"], config, dtype=dtype)
    samples = [{k: v[0].tolist() for k, v in sample.items()} for sample in task.samples()]
    options = {"calibration_sort": None, "batch_size": task.batches[0]["input_ids"].shape[0]}
    if "rank" in asked:
        options["adapter"] = Lora(rank=asked["rank"], path=str(lora))
    _, spent = timed(lambda: model.quantize(samples, **options))
    model.save(str(saved))

    kept = {k: v for path in saved.glob("*.safetensors") for k, v in load_file(path).items()}
    corrections = {k: v for path in lora.rglob("*.safetensors") for k, v in load_file(path).items()}
    module = GPTQModel.load(str(saved), device="cpu", backend=BACKEND.TORCH).model
    dense, stored = {}, {}
    for name, layer in module.named_modules():
        if f"{name}.qweight" not in kept:
            continue
        weight = layer.dequantize_weight().T.float()[: layer.out_features, : layer.in_features]
        coded = {
            part: t
            for part in ("qweight", "qzeros", "scales", "g_idx")
            if (t := kept.get(f"{name}.{part}")) is not None
        }
        extra = {k: v for k, v in corrections.items() if f"{name}." in f".{k}"}
        if extra:
            a, b = (next(v for k, v in extra.items() if f"lora_{side}" in k).float() for side in "AB")
            weight = weight + b @ a
        dense[f"{name}.weight"], stored[f"{name}.weight"] = weight, nbytes(coded) + nbytes(extra)
    write_result(task, dense, stored, spent, ("gptqmodel", "transformers"))


if __name__ == "__main__":
    main()
