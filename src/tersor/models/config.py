"""The config of a Hugging Face folder: the class that it names, and what that class would take, before it takes it.

A config is a stranger's: it may ask for code, kernels or sizes beyond what its weights can fill. All of that is refused
in a sentence, from the config and the headers of the files alone.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tersor.errors import TersorError
from tersor.foreign import check, read_json
from tersor.models.files import Checkpoint

_HEADS = (
    ("ForCausalLM", "causal-lm"),
    ("LMHeadModel", "causal-lm"),
    ("ForConditionalGeneration", "seq2seq"),
    ("ForMaskedLM", "masked-lm"),
    ("ForSequenceClassification", "classifier"),
    ("ForTokenClassification", "token-classifier"),
)
SAFELY = {"local_files_only": True, "trust_remote_code": False}  # None instead of False would ask at the terminal
FEW_LAYERS = 256  # may stand in a config whatever the files hold, for layers that share their weights
MOST = 1 << 20  # of anything that a config counts
SPARE_WEIGHTS, SPARE_BYTES = 1 << 22, 1 << 30  # that a model may have beyond four times those in its files
CONFIG = {
    "architectures?": ([str], None),
    "model_type?": (str, None),
    "quantization_config?": ({str: object}, None),
    "problem_type?": (str, None),
    "id2label?": ({str: object}, None),
}


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` of a folder; raises TersorError where it is missing or no JSON object."""
    path = folder / "config.json"
    try:
        config = read_json(path)
    except FileNotFoundError as error:
        raise TersorError(f"{folder} has no config.json, so it is not a Hugging Face model folder.") from error
    if not isinstance(config, dict):
        raise TersorError(f"{path} must hold a JSON object.")
    check(config, CONFIG, path)
    _refuse_absurd(config, path)
    return config


def _refuse_absurd(config: dict[str, Any], path: Path) -> None:
    """Raise TersorError for counts beyond all reason, and for kernels that would be fetched from elsewhere."""
    for key, value in config.items():
        if isinstance(value, dict):
            _refuse_absurd(value, path)
        if type(value) is int and abs(value) > (MOST if key.startswith("num_") or _counts_layers(key) else 1 << 62):
            raise TersorError(f"{path} asks for {value:,} as {key}, which no model has.")
        if key.endswith(("attn_implementation", "experts_implementation")):
            for name in value.values() if isinstance(value, dict) else [value]:
                if name is not None and not re.fullmatch(r"\w*", str(name)):
                    raise TersorError(f"{path} asks for the kernel {name!r}, which is code from elsewhere.")


def _counts_layers(key: str) -> bool:
    return key == "n_layer" or key.endswith("layers")


def model_class(folder: Path, config: dict[str, Any]) -> tuple[Any, str]:
    """The transformers class that the config of a folder names, and the kind of its head."""
    import transformers

    architecture = (config.get("architectures") or ["?"])[0]
    head = next((kind for suffix, kind in _HEADS if architecture.endswith(suffix)), "encoder")
    of_one = len(config.get("id2label") or "xx") == 1
    if head == "classifier" and (config.get("problem_type") == "regression" or of_one):
        head = "regressor"
    found = getattr(transformers, architecture, None)
    if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
        return found, head
    if "auto_map" in config and config.get("model_type") not in transformers.CONFIG_MAPPING:
        raise TersorError(f"{folder / 'config.json'} asks for code of its own (auto_map), which Tersor never runs.")
    if config.get("model_type") is None:
        raise TersorError(
            f"{folder / 'config.json'} names neither an architecture nor a model_type that transformers knows."
        )
    return transformers.AutoModel, "encoder"


def laid_out(
    folder: Path,
    cls: Any,
    config: dict[str, Any],
    checkpoint: Checkpoint,
    within: Callable[[], AbstractContextManager[Any]] = lambda: torch.device("meta"),
) -> nn.Module:
    """The module of a folder without memory for its weights, to see what it will take before it takes it.

    It is made `within` a context that keeps them from it: that of the meta device, or one that leaves buffers alone.
    Raises TersorError where the config asks for far more than the files hold, or for weights that are none there.
    """
    for key, value in config.items():
        if type(value) is int and _counts_layers(key) and value > max(FEW_LAYERS, len(checkpoint.entries)):
            tensors = len(checkpoint.entries)
            raise TersorError(f"{folder / 'config.json'} asks for {value:,} as {key}, but has {tensors} tensors.")
    import transformers

    with quiet_transformers(), opened_as(folder, cls):
        if cls is transformers.AutoModel:
            settings = transformers.AutoConfig.from_pretrained(folder, **SAFELY)
            with within():
                module: nn.Module = cls.from_config(settings, trust_remote_code=False)
        else:
            settings = cls.config_class.from_pretrained(folder, **SAFELY)
            with within():
                module = cls(settings)
    return module


def refuse_too_large(folder: Path, module: nn.Module, checkpoint: Checkpoint) -> None:
    """Raise TersorError where a module without memory would take far more of it than its files can fill."""
    held = sum(math.prod(shape) for _, shape, _ in checkpoint.entries.values())
    asked = sum(parameter.numel() for parameter in module.parameters())
    if asked > 4 * held + SPARE_WEIGHTS:
        raise TersorError(f"{folder / 'config.json'} asks for {asked:,} weights, but the files hold {held:,}.")
    buffers = sum(b.numel() * b.element_size() for b in module.buffers())
    if buffers > 4 * checkpoint.file_bytes + SPARE_BYTES:
        raise TersorError(f"{folder / 'config.json'} asks for {buffers:,} bytes of tables beside the weights.")


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers from printing load reports and progress bars of its own."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def opened_as(folder: Path, cls: Any) -> Iterator[None]:
    """Whatever transformers says goes wrong is a TersorError that names the folder."""
    try:
        yield
    except TersorError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:300].rstrip(".!")
        raise TersorError(f"{folder} could not be opened as {cls.__name__}: {reason}.") from error


def refuse_mismatched(folder: Path, info: dict[str, Any]) -> None:
    """Raise TersorError for the first weight whose shape in the file is not that of the model."""
    for name, found, expected in sorted(info["mismatched_keys"]):
        raise TersorError(f"{folder}: {name} has shape {tuple(found)}, but config.json asks for {tuple(expected)}.")
