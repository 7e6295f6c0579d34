"""Loading artifacts: `tersor.load(out)`, and the transformers quantiser behind `from_pretrained`.

Operators are laid out empty, then filled from the file; nothing is fitted and no dense weight is made.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from tersor.build.artifact import WEIGHTS, install_empty, load_weights, read_record
from tersor.errors import TersorError
from tersor.models.files import open_checkpoint


def load(
    folder: str | Path,
    model: nn.Module | Callable[[], nn.Module] | str | None = None,
    *,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """Load the built model of an artifact.

    For a Hugging Face artifact nothing else is needed. For a module of your own give the module as it was before, its
    factory, or `file.py:factory`: an artifact never names code to be run. Raises TersorError for a damaged artifact.
    """
    folder = Path(folder)
    record = read_record(folder)
    if record["model"]["kind"] == "huggingface" and model is None:
        return _load_huggingface(folder, device, dtype)
    if model is None:
        raise TersorError(
            f"{folder} was made from a module of your own; give it as tersor.load(folder, model=...), "
            f"for instance {record['model']['source']!r}."
        )
    if isinstance(model, str):
        from tersor.models.module import find_factory

        model = find_factory(model)[1]
    module = model if isinstance(model, nn.Module) else model()
    install_empty(module, record["sites"])
    load_weights(module, folder)
    module.to(device=device, dtype=dtype)
    return module.eval()


def _load_huggingface(folder: Path, device: str, dtype: torch.dtype | None) -> nn.Module:
    from tersor.models.huggingface import model_class, quiet_transformers, read_config, refuse_mismatched

    config = read_config(folder)
    open_checkpoint(folder)
    cls, _ = model_class(config)
    register()
    with quiet_transformers():
        try:
            module, info = cls.from_pretrained(
                folder,
                dtype=dtype or "auto",
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are refused below, by name
            )
        except TersorError:
            raise
        except Exception as error:
            reason = " ".join(str(error).split())[:300].rstrip(".!")
            raise TersorError(f"{folder} could not be loaded: {reason}.") from error
    refuse_mismatched(folder / WEIGHTS, info)
    wrong = sorted({*info["missing_keys"], *info["unexpected_keys"]})
    if wrong:
        raise TersorError(f"{folder / WEIGHTS} does not fit its config.json: {wrong[0]} is on one side only.")
    loaded: nn.Module = module.to(device)
    return loaded.eval()


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
