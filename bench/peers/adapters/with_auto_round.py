"""auto-round: rounding and ranges learned by signed gradient descent block by block, saved in its own packed format."""

from __future__ import annotations

import json

from auto_round import AutoRound
from safetensors.torch import load_file
from task import linear_layers, nbytes, open_model, read_task, timed, write_result
from torch.nn.functional import pad
from transformers import AutoTokenizer

BATCH = 8  # its default, above which it refuses batches


def main() -> None:
    task = read_task()
    module, saved = open_model(task), task.folder / "saved"
    names = list(linear_layers(module))
    asked = task.setting
    length = max(batch["input_ids"].shape[1] for batch in task.batches)  # it drops shorter ones, so texts are padded
    padded = [{k: pad(v, (0, length - v.shape[1])) for k, v in batch.items()} for batch in task.batches]
    split = [{k: list(v.split(BATCH)) for k, v in batch.items()} for batch in padded]
    batches = [dict(zip(parts, part, strict=True)) for parts in split for part in zip(*parts.values(), strict=True)]
    rounder = AutoRound(
        module, tokenizer=AutoTokenizer.from_pretrained(task.model["folder"]), bits=asked["bits"],
        group_size=asked["group"], sym=asked["symmetric"], dataset=batches, seqlen=length,
        nsamples=sum(len(batch["input_ids"]) for batch in task.batches), seed=task.seed, device_map="cpu",
    )  # fmt: skip
    (quantised, _), spent = timed(rounder.quantize)
    layers = {f"{name}.weight": quantised.get_submodule(name) for name in names}
    dense = {name: layer.weight.detach().clone() for name, layer in layers.items() if hasattr(layer, "scale")}
    rounder.save_quantized(str(saved), format="auto_round", inplace=True)
    kept = {k: v for path in saved.rglob("*.safetensors") for k, v in load_file(path).items()}
    stored = {}
    for name in dense:
        stem = name.removesuffix("weight")
        stored[name] = nbytes({k: v for k, v in kept.items() if k.startswith(stem) and not k.endswith("bias")})
    if not dense:
        raise SystemExit("NothingDoneError: it quantised no layer of this model.")
    print(json.dumps({k: [str(v.dtype), list(v.shape)] for k, v in list(kept.items())[:8]}))
    write_result(task, dense, stored, spent, ("auto-round", "transformers"))


if __name__ == "__main__":
    main()
