"""Tiny random models of every architecture that must work, and batches for them."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


class ConvNet(nn.Module):
    """Strided, padded, grouped and 1 x 1 convolutions with norms between, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 32, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(32)
        self.grouped = nn.Conv2d(32, 64, 3, padding="same", groups=4, bias=False)
        self.circular = nn.Conv2d(64, 32, 3, padding=1, padding_mode="circular")
        self.point = nn.Conv2d(32, 128, 1)
        self.head = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x)).relu()
        x = self.circular(self.grouped(x).relu()).relu()
        return self.head(self.point(x).relu().mean((2, 3)))


def image_batches(count: int = 5, size: int = 6, labels: bool = False) -> list[Any]:
    generator = torch.Generator().manual_seed(7)
    images = [torch.randn(size, 3, 8, 8, generator=generator) for _ in range(count)]
    if not labels:
        return images
    return [(x, torch.randint(0, 10, (size,), generator=generator)) for x in images]


def small_net() -> nn.Module:
    """Three linear layers, the same at every call."""
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64))


def vector_batches(count: int = 5) -> list[Tensor]:
    generator = torch.Generator().manual_seed(9)
    return [torch.randn(16, 64, generator=generator) for _ in range(count)]


VOCABULARY = 128
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
}


def configurations(layers: int = 1) -> dict[str, Callable[[], nn.Module]]:
    """Tiny models of the architectures that must work, by name; each call draws new weights from the seed."""
    import transformers as t

    def of(architecture: str, configuration: str, **values: Any) -> Callable[[], nn.Module]:
        return lambda: getattr(t, architecture)(getattr(t, configuration)(**values))

    sizes = {**SIZES, "num_hidden_layers": layers}
    decoder = {**sizes, "num_key_value_heads": 2}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    return {
        "llama-tied": of("LlamaForCausalLM", "LlamaConfig", **decoder, tie_word_embeddings=True),
        "mistral": of("MistralForCausalLM", "MistralConfig", **decoder),
        "gpt2": of(
            "GPT2LMHeadModel", "GPT2Config", n_embd=64, n_layer=layers, n_head=4, vocab_size=128, n_positions=64
        ),
        "qwen2": of("Qwen2ForCausalLM", "Qwen2Config", **decoder),
        "qwen3": of("Qwen3ForCausalLM", "Qwen3Config", **decoder, head_dim=16, tie_word_embeddings=True),
        "gpt-neox": of("GPTNeoXForCausalLM", "GPTNeoXConfig", **sizes),
        "opt": of(
            "OPTForCausalLM", "OPTConfig", hidden_size=64, ffn_dim=64, num_hidden_layers=layers, num_attention_heads=4,
            vocab_size=128, max_position_embeddings=64, word_embed_proj_dim=64,
        ),
        "gemma": of("GemmaForCausalLM", "GemmaConfig", **{**sizes, "num_key_value_heads": 1}, head_dim=16),
        "t5": of(
            "T5ForConditionalGeneration", "T5Config", d_model=64, d_ff=64, d_kv=16, num_layers=layers, num_heads=4,
            vocab_size=128, decoder_start_token_id=0,
        ),
        "bert": of("BertModel", "BertConfig", **sizes),
        "bert-masked": of("BertForMaskedLM", "BertConfig", **sizes),
        "bert-classifier": of("BertForSequenceClassification", "BertConfig", **sizes, num_labels=3),
        "roberta": of("RobertaModel", "RobertaConfig", **sizes),
        "distilbert": of(
            "DistilBertModel", "DistilBertConfig", dim=64, hidden_dim=64, n_layers=layers, n_heads=4, vocab_size=128,
            max_position_embeddings=64,
        ),
        "mixtral": of(
            "MixtralForCausalLM", "MixtralConfig", **decoder, num_local_experts=4, num_experts_per_tok=2
        ),
        "qwen2-moe": of(
            "Qwen2MoeForCausalLM", "Qwen2MoeConfig", **decoder, **experts, shared_expert_intermediate_size=32
        ),
        "qwen3-moe": of("Qwen3MoeForCausalLM", "Qwen3MoeConfig", **decoder, **experts, head_dim=16),
    }  # fmt: skip


def draw_model(name: str, dtype: torch.dtype = torch.float32, layers: int = 1) -> nn.Module:
    """One of `configurations` with weights large enough that its outputs differ between tokens."""
    module = configurations(layers)[name]().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.12)
    return module.to(dtype)


def token_batches(name: str = "", count: int = 3, rows: int = 3, length: int = 8) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(3)

    def tokens(n: int) -> Tensor:
        return torch.randint(3, VOCABULARY, (rows, n), generator=generator)

    if name == "t5":
        return [{"input_ids": tokens(length), "decoder_input_ids": tokens(5)} for _ in range(count)]
    return [{"input_ids": tokens(length)} for _ in range(count)]


LETTERS = "abcdefgh "


def write_model(folder: Path, intermediate_size: int = 256) -> None:
    """A small Llama over letters, with its tokenizer."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {letter: number for number, letter in enumerate(["<s>", *LETTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>").save_pretrained(folder)
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=64, intermediate_size=intermediate_size, num_hidden_layers=1,
        num_attention_heads=4, max_position_embeddings=32, bos_token_id=0,
    )  # fmt: skip
    module = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
    module.save_pretrained(folder)


def write_texts(path: Path, count: int, seed: int) -> None:
    """Lines of random letters."""
    generator = random.Random(seed)
    path.write_text("".join("".join(generator.choices(LETTERS, k=31)) + "\n" for _ in range(count)))
