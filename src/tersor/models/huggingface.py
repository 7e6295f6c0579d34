"""Opening a Hugging Face folder: the class its config names, its tokenizer, and what its outputs are.

Weights are read from safetensors only and computed with in float32; missing or misshapen weights are errors, never
silently drawn anew. Code that a folder brings along is never run.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tersor.data import Data
from tersor.errors import TersorError
from tersor.foreign import check, read_json
from tersor.models.config import (
    SAFELY,
    laid_out,
    model_class,
    opened_as,
    quiet_transformers,
    read_config,
    refuse_mismatched,
    refuse_too_large,
)
from tersor.models.divergence import Divergence, divergence_named
from tersor.models.files import Checkpoint, open_checkpoint
from tersor.models.model import Batch, Identity, device_of
from tersor.models.ondemand import take_from_file, without_weights

IGNORED = -100
CHARACTERS = 4  # that make a token, roughly
OF_TEXTS = ("encoder", "classifier", "regressor")  # heads with one prediction a text
_DEFAULT_DIVERGENCE = {"encoder": "cosine", "regressor": "mse"}


class HuggingFaceModel:
    """A transformers model read from `folder`; `head` says what its outputs are."""

    def __init__(
        self,
        folder: Path,
        divergence: str | Divergence | None = None,
        device: str = "cpu",
        on_demand: bool = False,
    ) -> None:
        self.folder = folder
        self.checkpoint = open_checkpoint(folder)
        self.module, self.head = _load(folder, self.checkpoint, device, on_demand)
        self.module.eval()
        if divergence is None:
            divergence = _DEFAULT_DIVERGENCE.get(self.head, "kl")
        self.divergence = divergence_named(divergence) if isinstance(divergence, str) else divergence
        self.identity = Identity(
            "huggingface",
            str(folder),
            self.checkpoint.fingerprint,
            self.checkpoint.file_bytes,
            {"head": self.head, "pooling": _pooling(folder)},
        )
        self._tokenizer: Any = None

    def maker(self) -> Callable[[], HuggingFaceModel]:
        other = copy.copy(self)
        other._tokenizer = None
        return partial(copy.copy, other)

    @property
    def device(self) -> torch.device:
        return device_of(self.module)

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of the folder; raises TersorError where there is none."""
        if self._tokenizer is None:
            from transformers import AutoTokenizer

            try:
                self._tokenizer = AutoTokenizer.from_pretrained(self.folder, **SAFELY)
            except Exception as error:
                raise TersorError(
                    f"{self.folder} has no tokenizer that transformers can read, so text cannot be used."
                ) from error
        return self._tokenizer

    def batches(
        self, data: Data, samples: int | None, sequence_length: int, batch_size: int, seed: int | None = None
    ) -> Sequence[Batch]:
        """Batches as dictionaries of tensors: packed windows for language models, padded texts for the others."""
        if data.batches is not None:
            return [self._given(batch) for batch in data.batches]
        if data.texts is None:
            raise TersorError(f"{data.source} holds arrays, but this {self.head} model reads text.")
        windows = self.head in ("causal-lm", "seq2seq")
        samples = samples or (128 if windows else 512)
        if seed is not None:
            data = data.sampled(samples, seed, stretch=CHARACTERS * sequence_length if windows else 0)
        if windows:
            return self._windows(data, samples, sequence_length, batch_size)
        return self._padded(data, samples, sequence_length, batch_size)

    def compact(self, batches: Sequence[Batch]) -> Sequence[Batch]:
        """Texts that were padded, in batches of like length; others, and batches of the user's, as they are."""
        known = {"input_ids", "attention_mask", "token_type_ids", "labels"}
        if self._tokenizer is None or self.head not in OF_TEXTS or any(not known.issuperset(b) for b in batches):
            return batches
        size = max(len(batch["input_ids"]) for batch in batches)
        rows = [
            {key: batch[key][i][mask] for key in batch if key != "labels"}
            for batch in batches
            for i, mask in enumerate(batch["attention_mask"].bool())
        ]
        labels = torch.cat([b["labels"] for b in batches]) if "labels" in batches[0] else None
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
        out = []
        for some in (order[start : start + size] for start in range(0, len(order), size)):
            batch = dict(self.tokenizer.pad([rows[i] for i in some], return_tensors="pt"))
            out.append(self._moved(batch if labels is None else {**batch, "labels": labels[some]}))
        return out

    def encode_texts(
        self, texts: list[str], sequence_length: int, batch_size: int
    ) -> Iterator[tuple[list[int], Batch]]:
        """All texts as padded batches of like length, each with the numbers of its texts."""
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        sorted_texts = Data("texts", texts=[texts[i] for i in order])
        for number, batch in enumerate(self._padded(sorted_texts, len(texts), sequence_length, batch_size)):
            yield order[number * batch_size : (number + 1) * batch_size], batch

    def masks(self, batch: Batch) -> list[Tensor]:
        return [v for k, v in batch.items() if k in ("attention_mask", "decoder_attention_mask")]

    def outputs(self, batch: Batch) -> Tensor:
        inputs = {k: v for k, v in batch.items() if k != "labels"}
        result = self.module(**inputs)
        if self.head == "encoder":
            return self._pooled(result, batch)
        logits: Tensor = result.logits
        if self.head in ("classifier", "regressor"):
            return logits
        return self._predictions(logits, batch)

    def labels(self, batch: Batch) -> Tensor | None:
        if self.head == "causal-lm":
            following = torch.full_like(batch["input_ids"], IGNORED)
            following[:, :-1] = batch["input_ids"][:, 1:]
            if "attention_mask" in batch:
                following[:, :-1][batch["attention_mask"][:, 1:] == 0] = IGNORED
            return self._predictions(following, batch)
        labels: Tensor | None = batch.get("labels")
        if labels is None or self.head in OF_TEXTS:
            return labels
        return self._predictions(labels, batch)

    def units(self, batch: Batch) -> Tensor:
        if self.head in OF_TEXTS:
            return torch.arange(len(batch["input_ids"]))
        key = "decoder_input_ids" if self.head == "seq2seq" else "input_ids"
        count, length = batch[key].shape
        return self._predictions(torch.arange(count)[:, None].expand(count, length), batch)

    def _predictions(self, values: Tensor, batch: Batch) -> Tensor:
        """Those of values (batch, length, ...) that belong to real tokens, as (predictions, ...)."""
        mask = batch.get("decoder_attention_mask" if self.head == "seq2seq" else "attention_mask")
        return values.flatten(0, 1) if mask is None else values[mask.bool().to(values.device)]

    def _pooled(self, result: Any, batch: Batch) -> Tensor:
        hidden: Tensor = result.last_hidden_state
        if self.identity.details["pooling"] == "cls":
            return hidden[:, 0]
        mask: Tensor = batch.get("attention_mask", torch.ones(hidden.shape[:2], device=hidden.device))
        weights = mask[..., None].to(hidden)
        return (hidden * weights).sum(1) / weights.sum(1)

    def _windows(self, data: Data, samples: int, length: int, batch_size: int) -> list[Batch]:
        """Texts joined, each opened by the tokenizer's first token, cut into windows without padding."""
        limit = getattr(self.module.config, "max_position_embeddings", None) or length
        length = min(length, limit)
        first = self.tokenizer.bos_token_id
        ids: list[int] = []
        for text in data.texts or []:
            ids += ([first] if first is not None else []) + self.tokenizer(text, add_special_tokens=False)["input_ids"]
            if len(ids) >= samples * length:
                break
        if len(ids) < 2:
            raise TersorError(f"{data.source} holds fewer than two tokens.")
        length = min(length, len(ids))
        count = min(samples, len(ids) // length)
        windows = torch.tensor(ids[: count * length]).view(count, length)
        parts = torch.split(windows, batch_size)
        if self.head == "causal-lm":
            return [self._moved({"input_ids": part}) for part in parts]
        return [self._moved(self._halved(part)) for part in parts]

    def _given(self, batch: Any) -> Batch:
        """A batch of the user's: a dictionary of tensors, or token numbers alone."""
        try:
            if not isinstance(batch, Mapping):
                batch = {"input_ids": batch}
            batch = {k: v if isinstance(v, Tensor) else torch.as_tensor(v) for k, v in batch.items()}
        except (TypeError, ValueError, RuntimeError) as error:
            raise TersorError(f"A batch is no dictionary of tensors for this {self.head} model: {error}.") from error
        if "input_ids" not in batch or batch["input_ids"].dim() != 2 or batch["input_ids"].is_floating_point():
            raise TersorError(f"A batch for this {self.head} model needs `input_ids`, whole numbers (batch, length).")
        if self.head == "seq2seq":
            batch = self._with_decoder(batch)
        return self._moved(batch)

    def _with_decoder(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The batch of an encoder-decoder with what its decoder reads, and with masks of two different shapes."""
        if "decoder_input_ids" not in batch:
            if "labels" not in batch:
                if "attention_mask" in batch:
                    raise TersorError("A padded batch of an encoder-decoder needs `decoder_input_ids` or `labels`.")
                return self._halved(batch["input_ids"])
            batch = {**batch, "decoder_input_ids": self._shifted(batch["labels"])}
        mask, of_decoder = batch.get("attention_mask"), batch.get("decoder_attention_mask")
        if mask is not None and mask.shape == batch["decoder_input_ids"].shape:  # tell them apart by their lengths
            of_decoder = torch.ones_like(mask) if of_decoder is None else of_decoder
            batch = {**batch, "decoder_attention_mask": of_decoder}
            for name, filler in (("decoder_input_ids", 0), ("decoder_attention_mask", 0), ("labels", IGNORED)):
                if name in batch:
                    batch[name] = nn.functional.pad(batch[name], (0, 1), value=filler)
        return batch

    def _halved(self, windows: Tensor) -> dict[str, Tensor]:
        """For encoder-decoders: the first part of a window is read, the rest is predicted."""
        cut = max(1, 2 * windows.shape[1] // 3)
        target = windows[:, cut:] if cut < windows.shape[1] else windows[:, -1:]
        return {"input_ids": windows[:, :cut], "decoder_input_ids": self._shifted(target), "labels": target}

    def _shifted(self, target: Tensor) -> Tensor:
        """What a decoder reads to predict `target`: its start token, then all but the last, fillers as zeros."""
        start = getattr(self.module.config, "decoder_start_token_id", None) or 0
        return torch.cat([torch.full_like(target[:, :1], start), target[:, :-1].clamp_min(0)], 1)

    def _padded(self, data: Data, samples: int, length: int, batch_size: int) -> list[Batch]:
        assert data.texts is not None
        limit = getattr(self.module.config, "max_position_embeddings", None) or length
        limit = min(limit, self.tokenizer.model_max_length)
        if self.tokenizer.pad_token is None:
            raise TersorError(f"The tokenizer of {self.folder} has no padding token, which batches of texts need.")
        labels = None if data.labels is None else self._class_numbers(data)
        batches = []
        for start in range(0, min(samples, len(data.texts)), batch_size):
            stop = min(start + batch_size, samples)
            encoded = self.tokenizer(
                data.texts[start:stop],
                padding=True,
                truncation=True,
                max_length=min(length, limit),
                return_tensors="pt",
            )
            batch = dict(encoded)
            if labels is not None and self.head in ("classifier", "regressor"):
                batch["labels"] = labels[start:stop]
            batches.append(self._moved(batch))
        return batches

    def _class_numbers(self, data: Data) -> Tensor | None:
        """The labels as numbers; names of classes are looked up in the config."""
        assert data.labels is not None
        if data.labels.dtype.kind in "biuf":
            return torch.as_tensor(data.labels)
        known = {str(k).lower(): v for k, v in (getattr(self.module.config, "label2id", None) or {}).items()}
        names = [str(label).lower() for label in data.labels]
        if self.head != "classifier" or not known:
            return None
        unknown = next((n for n in names if n not in known), None)
        if unknown is not None:
            raise TersorError(f"{data.source} has the label {unknown!r}, but the model knows {', '.join(known)}.")
        return torch.tensor([known[n] for n in names])

    def _moved(self, batch: dict[str, Any]) -> Batch:
        return {k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in batch.items()}


def _load(folder: Path, checkpoint: Checkpoint, device: str, on_demand: bool) -> tuple[nn.Module, str]:
    """The module of a folder and the kind of its head; `on_demand`, its weights stay in its files."""
    config = read_config(folder)
    if "quantization_config" in config:
        method = (config["quantization_config"] or {}).get("quant_method", "unknown")
        raise TersorError(f"{folder} is quantised already ({method}); compress the model that it was made from.")
    if (folder / "adapter_config.json").exists():
        raise TersorError(f"{folder} is an adapter of another model (adapter_config.json); merge the two first.")
    checkpoint.refuse_empty()
    cls, head = model_class(folder, config)
    empty = laid_out(folder, cls, config, checkpoint)
    refuse_too_large(folder, empty, checkpoint)
    _refuse_whole_numbers(empty, checkpoint)
    if on_demand:
        module = laid_out(folder, cls, config, checkpoint, without_weights)
        take_from_file(module, checkpoint, folder, device, str(module.base_model_prefix))
    else:
        module = _read(folder, cls).to(device)
    if hasattr(module.config, "_experts_implementation"):
        module.config._experts_implementation = "eager"
    return module, head


def _read(folder: Path, cls: Any) -> Any:
    """The module of a folder with all of its weights, as transformers reads them."""
    with quiet_transformers(), opened_as(folder, cls):
        module, info = cls.from_pretrained(
            folder,
            dtype=torch.float32,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
            **SAFELY,
        )
    refuse_mismatched(folder, info)
    missing = sorted(info["missing_keys"])
    if missing:
        raise TersorError(f"{folder}: the checkpoint lacks {missing[0]} ({len(missing)} weights are missing).")
    return module


def _refuse_whole_numbers(module: nn.Module, checkpoint: Checkpoint) -> None:
    """Raise TersorError for a weight that is kept as whole numbers."""
    for name, parameter in module.named_parameters():
        path, _, dtype = checkpoint.entries.get(name, (None, None, None))
        if dtype is not None and parameter.is_floating_point() and not dtype.is_floating_point:
            raise TersorError(f"{path}: {name} is kept as {str(dtype).removeprefix('torch.')}, which no weight can be.")


def _pooling(folder: Path) -> str:
    path = folder / "1_Pooling" / "config.json"
    if not path.exists():
        return "mean"
    return "cls" if check(read_json(path), {str: object}, path).get("pooling_mode_cls_token") else "mean"
