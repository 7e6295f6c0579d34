"""Checkpoints whose config or tokenizer is damaged or hostile."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from spoiling import (
    DEEP,
    STUDY,
    case,
    change_json,
)


def config(folder: Path, **values: Any) -> tuple[str, str]:
    change_json(folder / "model" / "config.json", lambda c: c.update(values))
    return STUDY, "config.json"


@case
def config_missing(folder: Path) -> tuple[str, str]:
    """There is no config."""
    (folder / "model" / "config.json").unlink()
    return STUDY, "config.json"


@case
def config_nested_deeply(folder: Path) -> tuple[str, str]:
    """The config opens two hundred thousand lists."""
    (folder / "model" / "config.json").write_text(DEEP)
    return STUDY, "config.json"


@case
def config_of_a_gigabyte(folder: Path) -> tuple[str, str]:
    """The config takes a gigabyte, of which the disk holds nothing."""
    os.truncate(folder / "model" / "config.json", 1 << 30)
    return STUDY, "config.json"


@case
def config_no_utf8(folder: Path) -> tuple[str, str]:
    """The config is no UTF-8."""
    (folder / "model" / "config.json").write_bytes(b'{"model_type": "\xff"}')
    return STUDY, "config.json"


@case
def config_with_a_key_twice(folder: Path) -> tuple[str, str]:
    """A key stands in the config twice."""
    path = folder / "model" / "config.json"
    path.write_text(path.read_text().rstrip()[:-1] + ', "hidden_size": 64}')
    return STUDY, "twice"


@case
def config_with_a_number_of_five_thousand_digits(folder: Path) -> tuple[str, str]:
    """A number of the config takes longer to read than the model."""
    path = folder / "model" / "config.json"
    path.write_text(path.read_text().rstrip()[:-1] + f', "x": {"9" * 5000}}}')
    return STUDY, "config.json"


@case
def config_that_is_a_pipe(folder: Path) -> tuple[str, str]:
    """The config is a pipe, which nobody writes to."""
    (folder / "model" / "config.json").unlink()
    os.mkfifo(folder / "model" / "config.json")
    return STUDY, "config.json"


@case
def config_of_wide_layers(folder: Path) -> tuple[str, str]:
    """The config asks for layers of a billion units."""
    return config(folder, hidden_size=1 << 30, head_dim=1 << 28)


@case
def config_of_a_huge_vocabulary(folder: Path) -> tuple[str, str]:
    """The config asks for a table of 2^40 rows."""
    return config(folder, vocab_size=1 << 40)


@case
def config_of_many_layers(folder: Path) -> tuple[str, str]:
    """The config asks for a million layers."""
    return config(folder, num_hidden_layers=1_000_000)


@case
def config_of_many_labels(folder: Path) -> tuple[str, str]:
    """The config asks for names of a billion labels."""
    return config(folder, num_labels=1_000_000_000)


@case
def config_of_texts(folder: Path) -> tuple[str, str]:
    """The config has a text in the place of a number."""
    return config(folder, hidden_size="64 or so")[0], "model"


@case
def config_of_a_function(folder: Path) -> tuple[str, str]:
    """The architecture is something of transformers that is no model."""
    return config(folder, architectures=["pipeline"], model_type=None)


@case
def config_of_a_number_as_architecture(folder: Path) -> tuple[str, str]:
    """The architecture is a number."""
    return config(folder, architectures=[7])


@case
def config_with_code(folder: Path) -> tuple[str, str]:
    """The config asks for code that lies in the folder."""
    (folder / "model" / "modeling_new.py").write_text("open('it-ran', 'w')\n")
    named = {"AutoConfig": "modeling_new.NewConfig", "AutoModel": "modeling_new.NewModel"}
    return config(folder, architectures=["NewModel"], model_type="new", auto_map=named)[0], "auto_map"


@case
def config_with_a_kernel(folder: Path) -> tuple[str, str]:
    """The config asks for an attention kernel from a stranger's repository."""
    return config(folder, attn_implementation="stranger/kernel")[0], "stranger/kernel"


@case
def tokenizer_with_code(folder: Path) -> tuple[str, str]:
    """The tokenizer asks for code that lies in the folder."""
    (folder / "model" / "tokenization_new.py").write_text("open('it-ran', 'w')\n")
    named = {"tokenizer_class": "NewTokenizer", "auto_map": {"AutoTokenizer": ["tokenization_new.NewTokenizer", None]}}
    change_json(folder / "model" / "tokenizer_config.json", lambda c: c.update(named))
    (folder / "model" / "tokenizer.json").unlink()
    return STUDY, "tokenizer"


@case
def adapter_of_another_model(folder: Path) -> tuple[str, str]:
    """The folder says that it is an adapter of a model elsewhere, which would be opened in its place."""
    (folder / "model" / "adapter_config.json").write_text('{"base_model_name_or_path": "/elsewhere"}')
    return STUDY, "adapter"


@case
def model_quantised_already(folder: Path) -> tuple[str, str]:
    """The weights are codes of another quantiser."""
    return config(folder, quantization_config={"quant_method": "gptq"})[0], "gptq"


@case
def pooling_of_a_list(folder: Path) -> tuple[str, str]:
    """The config of the pooling is a list."""
    (folder / "model" / "1_Pooling").mkdir()
    (folder / "model" / "1_Pooling" / "config.json").write_text("[]")
    return STUDY, "1_Pooling"
