"""Texts as batches: windows without padding for language models, padded texts with labels for the others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tersor.data import Data
from tersor.errors import TersorError
from tersor.models import open_model

transformers = pytest.importorskip("transformers")
WORDS = ["[PAD]", "[UNK]", "[BOS]", *"abcdefghijklmnopqrstuvwxyz"]
Maker = Callable[..., Path]


@pytest.fixture
def with_tokenizer(make_checkpoint: Maker) -> Maker:
    """A checkpoint with a tokenizer of single letters."""
    tokenizers = pytest.importorskip("tokenizers")

    def make(name: str, padding: bool = True) -> Path:
        folder = make_checkpoint(name)
        raw = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: k for k, w in enumerate(WORDS)}, unk_token="[UNK]"))
        raw.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
        special = {"bos_token": "[BOS]", "unk_token": "[UNK]"} | ({"pad_token": "[PAD]"} if padding else {})
        fast = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, **special)
        fast.save_pretrained(folder)
        return folder

    return make


def batches(folder: Path, data: Data, **sizes: int) -> tuple[Any, list[Any]]:
    model: Any = open_model(folder)
    given = {"samples": None, "sequence_length": 6, "batch_size": 2, **sizes}
    return model, list(model.batches(data, **given))


def test_windows_are_cut_from_texts_joined(with_tokenizer: Maker) -> None:
    _, found = batches(with_tokenizer("llama-tied"), Data("x", texts=["abcd", "efg", "hijklmnop"]))
    rows = torch.cat([b["input_ids"] for b in found]).tolist()
    letters = [[WORDS[i] for i in row] for row in rows]
    assert letters == [["[BOS]", *"abcd", "[BOS]"], [*"efg", "[BOS]", *"hi"], [*"jklmno"]]
    assert [len(b["input_ids"]) for b in found] == [2, 1] and all(b.keys() == {"input_ids"} for b in found)
    _, one = batches(with_tokenizer("llama-tied"), Data("x", texts=["abcd", "efghijk"]), samples=1, batch_size=9)
    assert one[0]["input_ids"].shape == (1, 6)


def test_a_window_is_no_longer_than_the_model_reads(with_tokenizer: Maker) -> None:
    _, found = batches(with_tokenizer("llama-tied"), Data("x", texts=["abc" * 60]), sequence_length=500)
    assert found[0]["input_ids"].shape == (2, 64)


def test_too_little_text_is_an_error(with_tokenizer: Maker) -> None:
    folder = with_tokenizer("gpt-neox")
    with pytest.raises(TersorError, match="notes holds fewer than two tokens"):
        batches(folder, Data("notes", texts=[""]))


def test_an_encoder_decoder_predicts_the_end_of_each_window(with_tokenizer: Maker) -> None:
    model, found = batches(with_tokenizer("t5"), Data("x", texts=["abcdefghijk"]))
    first = found[0]
    assert [WORDS[i] for i in first["input_ids"][0]] == ["[BOS]", *"abc"]
    assert [WORDS[i] for i in first["labels"][0]] == [*"de"]
    assert first["decoder_input_ids"][0].tolist() == [0, WORDS.index("d")]
    assert len(model.outputs(first)) == len(model.labels(first)) == len(model.units(first)) == 4


def test_padded_texts_are_predictions_one_each(with_tokenizer: Maker) -> None:
    model, found = batches(with_tokenizer("bert"), Data("x", texts=["ab", "abcdefghij", "c"]))
    assert found[0]["attention_mask"].tolist() == [[1, 1, 0, 0, 0, 0], [1] * 6]
    ((numbers, alone),) = model.encode_texts(["ab"], 6, 1)
    assert numbers == [0]
    with torch.no_grad():
        assert torch.allclose(model.outputs(found[0])[0], model.outputs(alone)[0], atol=1e-5)
    assert model.units(found[0]).tolist() == [0, 1]


def test_compact_batches_hold_the_same_texts_with_less_padding(with_tokenizer: Maker) -> None:
    texts = ["ab", "abcde", "c", "fghij", "ba", "ghijk"]
    model, loose = batches(with_tokenizer("bert"), Data("x", texts=texts))
    tight = model.compact(loose)
    assert [b["input_ids"].shape[1] for b in loose] == [5, 5, 5]
    assert [b["attention_mask"].sum(1).tolist() for b in tight] == [[1, 2], [2, 5], [5, 5]]
    with torch.no_grad():
        before, after = (torch.cat([model.outputs(b) for b in some]) for some in (loose, tight))
    assert torch.allclose(before[[2, 0, 4, 1, 3, 5]], after, atol=1e-5)


def test_compact_batches_keep_labels_and_leave_those_given_alone(with_tokenizer: Maker) -> None:
    folder = with_tokenizer("bert-classifier")
    model, loose = batches(folder, Data("x", texts=["abc", "a", "ab"], labels=np.array([2, 0, 1])))
    assert [model.labels(b).tolist() for b in model.compact(loose)] == [[0, 1], [2]]
    given = [{"input_ids": torch.zeros(1, 3, dtype=torch.long), "position_ids": torch.zeros(1, 3, dtype=torch.long)}]
    assert model.compact(given) is given


def test_texts_in_batches_of_like_length_come_with_their_numbers(with_tokenizer: Maker) -> None:
    model: Any = open_model(with_tokenizer("bert"))
    found = list(model.encode_texts(["abcde", "a", "abc"], 6, 2))
    assert [numbers for numbers, _ in found] == [[1, 2], [0]]
    assert [b["attention_mask"].sum(1).tolist() for _, b in found] == [[1, 3], [5]]


def test_names_of_classes_become_their_numbers(with_tokenizer: Maker) -> None:
    folder = with_tokenizer("bert-classifier")
    labels = np.array(["LABEL_2", "label_0", "LABEL_1"])
    model, found = batches(folder, Data("x", texts=["a", "b", "c"], labels=labels))
    assert [model.labels(b).tolist() for b in found] == [[2, 0], [1]]
    with pytest.raises(TersorError, match="the label 'spam', but the model knows label_0"):
        batches(folder, Data("x", texts=["a"], labels=np.array(["spam"])))
    numbers = batches(folder, Data("x", texts=["a", "b"], labels=np.array([1, 0])))[1]
    assert numbers[0]["labels"].tolist() == [1, 0]


def test_a_tokenizer_without_padding_is_an_error_where_padding_is_needed(with_tokenizer: Maker) -> None:
    folder = with_tokenizer("bert", padding=False)
    with pytest.raises(TersorError, match="has no padding token"):
        batches(folder, Data("x", texts=["a", "bc"]))


@pytest.mark.parametrize("name", ["llama-tied", "bert-masked"])
def test_only_real_tokens_are_predictions(name: str, make_checkpoint: Maker) -> None:
    model: Any = open_model(make_checkpoint(name))
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    labels = torch.tensor([[5, 6, 7, -100], [8, -100, 9, 10]])
    (batch,) = model.batches(
        Data("x", batches=[{"input_ids": torch.full((2, 4), 9), "attention_mask": mask, "labels": labels}]), None, 0, 0
    )
    outputs, units, known = model.outputs(batch), model.units(batch), model.labels(batch)
    assert len(outputs) == len(units) == len(known) == 7
    assert units.tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert known.tolist() == ([9, 9, -100, 9, 9, 9, -100] if name == "llama-tied" else [5, 6, 7, 8, -100, 9, 10])
