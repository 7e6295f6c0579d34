"""nncf: weights at 8 bits, or at 4 in a share `ratio` of them, the least sensitive by its own measure, with data."""

from __future__ import annotations

import nncf
import torch
from nncf import CompressWeightsMode, Dataset, IgnoredScope
from nncf.torch.function_hook.wrapper import get_hook_storage
from task import nbytes, open_model, read_task, timed, write_result


def main() -> None:
    task = read_task()
    module = open_model(task)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    asked = dict(task.setting)
    inputs = [batch.get("images", batch) for batch in task.batches]
    options = {"mode": CompressWeightsMode(asked.pop("mode")), "group_size": asked.pop("group", None)}
    if "ratio" in asked:
        options |= {**asked, "subset_size": len(inputs)}
    ignored = IgnoredScope(patterns=[".*lm_head.*", ".*embed.*"], validate=False)
    data = Dataset(inputs)
    model, spent = timed(lambda: nncf.compress_weights(module, dataset=data, ignored_scope=ignored, **options))

    hooks = get_hook_storage(model)
    if len(hooks.pre_hooks):
        raise SystemExit(f"UnreadableError: it scales activations at {next(iter(hooks.pre_hooks))}.")
    dense, stored = {}, {}
    for key, chain in hooks.post_hooks.items():
        name = key.rpartition("__")[0].replace(":", ".")
        parameter, (decompressor,) = model.get_parameter(name), chain.values()
        with torch.no_grad():
            dense[name] = decompressor(parameter).reshape(before[name].shape)
        stored[name] = nbytes([parameter, *decompressor.state_dict().values()])
    for name, parameter in model.named_parameters():  # norms that its scales were folded into
        if name in before and name not in dense and not torch.equal(parameter, before[name]):
            dense[name], stored[name] = parameter, nbytes([parameter])
    if not dense:
        raise SystemExit("NothingDoneError: it quantised no layer of this model.")
    write_result(task, dense, stored, spent, ("nncf", "transformers"))


if __name__ == "__main__":
    main()
