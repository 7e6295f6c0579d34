"""Loading artifacts: `tersor.load(out)`, and the transformers quantiser behind `from_pretrained`.

Operators are laid out empty, then filled from the file; entropy-coded ones are decoded into packed integers. Nothing is
fitted, and no dense weight is made unless the model is asked for in mode `dense`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tersor.build.artifact import (
    RECORD,
    check_fit,
    install_empty,
    load_weights,
    read_record,
    refuse_not_finite,
)
from tersor.build.expand import plain
from tersor.build.layers import operators_of
from tersor.coding import StreamError
from tersor.engine import map_units
from tersor.errors import TersorError
from tersor.foreign import understood
from tersor.forms import Operator
from tersor.models.files import Checkpoint, open_checkpoint, weights_of
from tersor.models.ondemand import take_from_file, without_weights

MANY_WEIGHTS = 200_000_000  # fewer are decoded here: starting workers would take longer
MODES = ("small", "dense")
Progress = Callable[[str, int, int], Any]


def load(
    folder: str | Path,
    model: nn.Module | Callable[[], nn.Module] | str | None = None,
    *,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    mode: str = "small",
    budget: str | None = None,
    on_demand: bool = False,
    progress: Progress = lambda *_: None,
) -> nn.Module:
    """Load the built model of an artifact.

    With a `budget`, `20%` of the original or `5MB`, its low-rank weights are cut until its file would take no more.
    `mode` is `small`, or `dense` for plain weights: the memory and the speed of the original, and no need of Tersor to
    save it again. `on_demand`, a block of the model is in memory at a time, read from the file as it runs.

    For a Hugging Face artifact nothing else is needed. For a module of your own give the module as it was before, its
    factory, or `file.py:factory`: an artifact never names code to be run; `progress(name, done, total)` then hears of
    every weight that is decoded (transformers decodes as it loads, under a bar of its own). Raises TersorError for a
    damaged artifact, and for one that cannot be cut to the budget.
    """
    if mode not in MODES:
        raise TersorError(f"A model is loaded in mode {' or '.join(MODES)}, not {mode!r}.")
    folder = Path(folder)
    record = read_record(folder)
    if on_demand and (budget is not None or mode == "dense" or dtype not in (None, torch.float32)):
        raise TersorError("Weights that are read on demand stay as they are: in float32, neither cut nor made dense.")
    try:
        if on_demand:
            return _load_on_demand(folder, record, model, device)
        module = _load(folder, record, model, device, dtype, progress)
        refuse_not_finite(module, folder)
        if budget is not None:
            from tersor.build.cut import cut_to

            with understood(folder / RECORD):
                cut_to(module, folder, record, budget)
        if mode == "small":
            return module
        with understood(weights_of(folder)):
            return plain(module, dtype)
    except StreamError as error:
        raise TersorError(f"{weights_of(folder)} is damaged: {error}") from error


def _load(
    folder: Path,
    record: dict[str, Any],
    model: nn.Module | Callable[[], nn.Module] | str | None,
    device: str,
    dtype: torch.dtype | None,
    progress: Progress,
) -> nn.Module:
    if record["model"]["kind"] == "huggingface" and model is None:
        return prepare(_load_huggingface(folder, device, dtype), progress)
    module = _made(folder, record, model)
    install_empty(module, record["sites"])
    load_weights(module, folder)
    module.to(device=device, dtype=dtype)
    prepare(module, progress)
    return module.eval()


def _made(folder: Path, record: dict[str, Any], model: nn.Module | Callable[[], nn.Module] | str | None) -> nn.Module:
    """The module of one's own that an artifact was made from; raises TersorError where it is not given."""
    if model is None:
        raise TersorError(
            f"{folder} was made from a module of your own; give it as tersor.load(folder, model=...), "
            f"for instance {record['model']['source']!r}."
        )
    if isinstance(model, str):
        from tersor.models.module import find_factory

        model = find_factory(model)[1]
    return model if isinstance(model, nn.Module) else model()


def _load_on_demand(
    folder: Path, record: dict[str, Any], model: nn.Module | Callable[[], nn.Module] | str | None, device: str
) -> nn.Module:
    checkpoint = open_checkpoint(folder)
    if record["model"]["kind"] == "huggingface" and model is None:
        from tersor.models import config as c

        config = c.read_config(folder)
        cls = _class_checked(folder, config, checkpoint)
        module = c.laid_out(folder, cls, config, checkpoint, without_weights)
    else:
        with without_weights():
            module = _made(folder, record, model)
    install_empty(module, record["sites"], device)
    check_fit(module.state_dict(), checkpoint)
    take_from_file(module, checkpoint, weights_of(folder), device)
    refuse_not_finite(module, folder)
    return module.eval()


def prepare(module: nn.Module, progress: Progress = lambda *_: None) -> nn.Module:
    """Make all operators of a module ready to run: entropy-coded weights are decoded, many of them in processes."""
    operators = {name: child for name, child in module.named_modules() if isinstance(child, Operator)}
    waiting = {name: operator for name, operator in operators.items() if operator.unready() is not None}
    many = sum(op.shape[0] * op.shape[1] for op in waiting.values()) > MANY_WEIGHTS

    def units() -> Iterator[tuple[str, Callable[[], tuple[Any, ...]]]]:
        for name, operator in waiting.items():
            yield name, partial(_work_of, name, operator)

    for done, (name, made) in enumerate(map_units(_call, units(), None if many else 1), 1):
        waiting[name].adopt(made)
        progress(name, done, len(waiting))
    return module


def _work_of(name: str, operator: Operator) -> tuple[Any, ...]:
    work = operator.unready()
    assert work is not None
    return name, *work


def _call(name: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    try:
        return function(*arguments)
    except StreamError as error:
        raise StreamError(f"{name}: {error}") from error


def _load_huggingface(folder: Path, device: str, dtype: torch.dtype | None) -> nn.Module:
    from tersor.models import config as c

    config, checkpoint = c.read_config(folder), open_checkpoint(folder)
    register()
    cls = _class_checked(folder, config, checkpoint)
    with c.quiet_transformers(), c.opened_as(folder, cls):
        module, info = cls.from_pretrained(
            folder,
            dtype=dtype or "auto",
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
            **c.SAFELY,
        )
    c.refuse_mismatched(weights_of(folder), info)
    wrong = sorted({*info["missing_keys"], *info["unexpected_keys"]})
    if wrong:
        raise TersorError(f"{weights_of(folder)} does not fit its config.json: {wrong[0]} is on one side only.")
    loaded: nn.Module = module.to(device)
    return loaded.eval()


def _class_checked(folder: Path, config: dict[str, Any], checkpoint: Checkpoint) -> Any:
    """The class of a Hugging Face artifact, once its model, laid out without memory, is seen to fit its files."""
    from tersor.models import config as c

    cls, _ = c.model_class(folder, config)
    empty = c.laid_out(folder, cls, config, checkpoint)
    install_empty(empty, (config.get("quantization_config") or {}).get("sites", {}))
    c.refuse_too_large(folder, empty, checkpoint)
    check_fit(empty.state_dict(), checkpoint)
    for name, operator in operators_of(empty).items():
        lacking = [key for key in operator.state_dict() if f"{name}.{key}" not in checkpoint.entries]
        if lacking:
            raise TersorError(f"{weights_of(folder)} does not fit its config.json: it lacks {name}.{lacking[0]}.")
    return cls


def register() -> None:
    """Teach transformers to load artifacts; does nothing where it is not installed or knows already."""
    try:
        from transformers.quantizers import auto
    except ImportError:
        return
    if "tersor" in auto.AUTO_QUANTIZER_MAPPING:
        return
    from tersor.build.quantizer import TersorConfig, TersorQuantizer

    auto.register_quantization_config("tersor")(TersorConfig)
    auto.register_quantizer("tersor")(TersorQuantizer)
