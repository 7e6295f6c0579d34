"""A folder as `script/demo` leaves it, with a tiny model: the examples of the help run in it as written."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from tersor.cli import app
from tersor.cli.compress import EXAMPLE

LETTERS = "abcdefgh "


@contextmanager
def inside(folder: Path) -> Iterator[None]:
    """The folder as the current one."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def write_model(folder: Path) -> None:
    """A small Llama over letters, with its tokenizer."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {letter: number for number, letter in enumerate(["<s>", *LETTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>").save_pretrained(folder)
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=64, intermediate_size=256, num_hidden_layers=1,
        num_attention_heads=4, max_position_embeddings=32, bos_token_id=0,
    )  # fmt: skip
    module = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
    module.save_pretrained(folder)


def write_texts(path: Path, count: int, seed: int) -> None:
    generator = random.Random(seed)
    path.write_text("".join("".join(generator.choices(LETTERS, k=31)) + "\n" for _ in range(count)))


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which `demo/` lies, after the example of `compress` has run."""
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("clone")
    (folder / "demo").mkdir()
    write_model(folder / "demo" / "model")
    write_texts(folder / "demo" / "calibration.txt", 24, 0)
    write_texts(folder / "demo" / "held-out.txt", 8, 1)
    with inside(folder):
        result = CliRunner().invoke(app, [*EXAMPLE.replace("\\\n", " ").split()[1:], "--workers", "1"])
    assert result.exit_code == 0, result.stderr
    (folder / "compress.txt").write_text(result.stdout)
    return folder


@pytest.fixture
def tersor(demo: Path) -> Callable[..., Any]:
    """Run `tersor` with some arguments in the folder of the demo."""

    def run(*arguments: str) -> Any:
        with inside(demo):
            return CliRunner().invoke(app, list(arguments))

    return run
