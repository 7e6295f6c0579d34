"""GPTQModel: GPTQ, read back from the folder that it saves, alone or with the low-rank correction of EoRA."""

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
    asked, saved = task.setting, task.folder / "saved"
    adapter = Lora(rank=asked["eora"], path=str(task.folder / "adapter")) if "eora" in asked else None
    config = QuantizeConfig(bits=asked["bits"], group_size=asked["group"], device="cpu", adapter=adapter)
    dtype = torch.float32 if adapter is None else torch.float16  # EoRA takes 16 bits alone
    model = GPTQModel.load(task.model["folder"], config, dtype=dtype)
    samples = [{k: v[0].tolist() for k, v in sample.items()} for sample in task.samples()]
    options = {"calibration_sort": None, "batch_size": task.batches[0]["input_ids"].shape[0]}
    _, spent = timed(lambda: model.quantize(samples, **options))
    model.save(str(saved))

    folders = (saved, task.folder / "adapter")
    kept = {k: v for folder in folders for path in folder.rglob("*.safetensors") for k, v in load_file(path).items()}
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
        factors = [v for part in "BA" for k, v in kept.items() if k.endswith(f".{name}.lora_{part}.weight")]
        if factors:
            weight = weight + factors[0].float() @ factors[1].float()
        dense[f"{name}.weight"], stored[f"{name}.weight"] = weight, nbytes(coded) + nbytes(factors)
        assert bool(factors) == (adapter is not None), f"{name} has no low-rank correction"
    write_result(task, dense, stored, spent, ("gptqmodel", "transformers"))


if __name__ == "__main__":
    main()
