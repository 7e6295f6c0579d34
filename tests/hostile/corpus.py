"""A corpus of damaged and hostile checkpoints, artifacts, runs and data files, each with the command that reads it.

    python tests/hostile/corpus.py FOLDER

writes one folder a case, made from a tiny random model. A case is a function that spoils a copy of what `make_base`
wrote; its docstring says what is wrong, and it returns the command to be given there and a word that its refusal names.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import random
import shutil
import sqlite3
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

Spoil = Callable[[Path], tuple[str, str]]
CASES: dict[str, Spoil] = {}
LETTERS = "abcdefgh "
WEIGHT, NORM = "model.layers.0.mlp.up_proj.weight", "model.norm.weight"
SITE = "model.layers.0.mlp.up_proj"
STUDY = "study model --data text.txt --run new.run"


def case(spoil: Spoil) -> Spoil:
    CASES[spoil.__name__] = spoil
    return spoil


# What is spoiled: a model, a study of it, two artifacts and a text.


def make_base(folder: Path) -> None:
    """`model`, `study.run`, the artifacts `coded` (judged on `text.txt`) and `trellis`, and `text.txt`."""
    from tersor.build.artifact import sha256  # noqa: F401 - fails early where tersor is not at hand
    from tersor.steps import build_plan, judge_artifact, open_study, study

    folder.mkdir(parents=True, exist_ok=True)
    model, run, text = folder / "model", folder / "study.run", folder / "text.txt"
    write_model(model)
    generator = random.Random(0)
    text.write_text("".join("".join(generator.choices(LETTERS, k=31)) + "\n" for _ in range(8)))
    ladders = {"coded": [{"step": 0.01}], "trellis": [{"bits": 3.0}]}
    damping = {"inputs": 0.03, "gradients": 0.3, "frequencies": 0.3}
    options: dict[str, Any] = {"settings": ladders, "damping": damping, "gains": False, "workers": 1}
    opened = study(model, text, run, forms=tuple(ladders), sequence_length=16, **options)
    for form in ladders:
        small = min(opened.planner((form,)).front())[0]
        plan = opened.plan(f"{small + 2000}B", forms=(form,))
        build_plan(opened, plan, folder / form, workers=1)
        opened = open_study(model, run)
    judge_artifact(opened.model, folder / "coded", text, sequence_length=16)
    opened.run.close()


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
        vocab_size=len(vocabulary), hidden_size=64, intermediate_size=96, num_hidden_layers=1,
        num_attention_heads=4, max_position_embeddings=32, bos_token_id=0,
    )  # fmt: skip
    module = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
    module.save_pretrained(folder)


# How files are spoiled.


class Runs:
    """Unpickled, it leaves a file that says so."""

    def __reduce__(self) -> Any:
        return (open, ("it-ran", "w"))


def parts_of(path: Path) -> tuple[dict[str, Any], bytes]:
    """The header and the data of a safetensors file."""
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    return json.loads(whole[8 : 8 + length]), whole[8 + length :]


def write_parts(path: Path, header: dict[str, Any] | bytes, data: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def change_header(folder: Path, change: Callable[[dict[str, Any]], Any]) -> tuple[str, str]:
    """Change the header of a model's weights; the command is one that opens the model."""
    path = folder / "model" / "model.safetensors"
    header, data = parts_of(path)
    change(header)
    write_parts(path, header, data)
    return STUDY, "model.safetensors"


def change_tensor(path: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> None:
    tensors = load_file(path)
    changed = change(tensors.pop(name).clone())
    save_file(tensors if changed is None else {**tensors, name: changed}, path, {"format": "pt"})


def change_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def change_both(out: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the sites of an artifact in `config.json` and `tersor.json`, as one who means harm would."""
    change_json(out / "config.json", lambda config: change(config["quantization_config"]["sites"]))
    change_json(out / "tersor.json", lambda record: change(record["sites"]))


def resealed(out: Path) -> None:
    """Make the hashes of an artifact right again."""
    from tersor.build.artifact import sha256

    def change(record: dict[str, Any]) -> None:
        record["files"] = {name: sha256(out / name) for name in record["files"]}
        record["weights_sha256"] = record["files"]["model.safetensors"]

    change_json(out / "tersor.json", change)


def change_fact(folder: Path, name: str, change: Callable[[Any], Any]) -> None:
    with contextlib.closing(sqlite3.connect(folder / "study.run" / "run.db")) as db, db:
        (text,) = db.execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()
        db.execute("UPDATE facts SET value = ? WHERE name = ?", (json.dumps(change(json.loads(text))), name))


def change_run(folder: Path, *queries: str) -> None:
    with contextlib.closing(sqlite3.connect(folder / "study.run" / "run.db")) as db, db:
        for query in queries:
            db.execute(query)


def link(path: Path, target: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(target)


def shards(folder: Path) -> dict[str, Any]:
    """The model in two files with an index."""
    model = folder / "model"
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    weights = {}
    for number, names in enumerate((list(tensors)[::2], list(tensors)[1::2]), 1):
        file = f"model-{number}.safetensors"
        save_file({name: tensors[name] for name in names}, model / file, {"format": "pt"})
        weights |= dict.fromkeys(names, file)
    return {"metadata": {}, "weight_map": weights}


def indexed(folder: Path, change: Callable[[dict[str, Any]], Any]) -> tuple[str, str]:
    index = shards(folder)
    change(index["weight_map"])
    (folder / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    return STUDY, "model.safetensors.index.json"


DEEP = "[" * 200_000


# Checkpoints: weights.


@case
def weights_cut_in_the_data(folder: Path) -> tuple[str, str]:
    """The file ends within the data."""
    path = folder / "model" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    return STUDY, "model.safetensors"


@case
def weights_cut_in_the_header(folder: Path) -> tuple[str, str]:
    """The file ends within the header."""
    path = folder / "model" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    return STUDY, "model.safetensors"


@case
def weights_empty(folder: Path) -> tuple[str, str]:
    """The file has no bytes."""
    (folder / "model" / "model.safetensors").write_bytes(b"")
    return STUDY, "model.safetensors"


@case
def header_of_an_exabyte(folder: Path) -> tuple[str, str]:
    """The length of the header is 2^63."""
    (folder / "model" / "model.safetensors").write_bytes((1 << 63).to_bytes(8, "little") + b"{}" * 50)
    return STUDY, "too few for its header"


@case
def header_no_json(folder: Path) -> tuple[str, str]:
    """The header is no JSON."""
    write_parts(folder / "model" / "model.safetensors", b"{'a': 1}", b"")
    return STUDY, "model.safetensors"


@case
def header_no_object(folder: Path) -> tuple[str, str]:
    """The header is a list."""
    write_parts(folder / "model" / "model.safetensors", b"[1, 2, 3]", b"")
    return STUDY, "no object"


@case
def header_nested_deeply(folder: Path) -> tuple[str, str]:
    """The header opens two hundred thousand lists."""
    write_parts(folder / "model" / "model.safetensors", DEEP.encode(), b"")
    return STUDY, "levels deep"


@case
def header_with_a_name_twice(folder: Path) -> tuple[str, str]:
    """A tensor stands in the header twice, so that two readers may see two models."""
    path = folder / "model" / "model.safetensors"
    header, data = parts_of(path)
    entry = json.dumps(header[NORM])
    text = json.dumps(header)[:-1] + f', "{NORM}": {entry}}}'
    write_parts(path, text.encode(), data)
    return STUDY, "twice"


@case
def metadata_no_utf8(folder: Path) -> tuple[str, str]:
    """The metadata are no UTF-8."""
    path = folder / "model" / "model.safetensors"
    header, data = parts_of(path)
    text = json.dumps({**header, "__metadata__": {"format": "XX"}}).encode().replace(b"XX", b"\xff\xfe")
    write_parts(path, text, data)
    return STUDY, "no UTF-8"


@case
def metadata_of_numbers(folder: Path) -> tuple[str, str]:
    """The metadata hold a number in the place of a text."""
    return change_header(folder, lambda h: h.update(__metadata__={"format": 7}))[0], "metadata"


@case
def offsets_overlap(folder: Path) -> tuple[str, str]:
    """Two tensors lie on the same bytes."""
    return change_header(folder, lambda h: h.update(twin=h[NORM]))[0], "overlap"


@case
def offsets_with_a_hole(folder: Path) -> tuple[str, str]:
    """Bytes lie between the tensors that no tensor names."""
    return change_header(folder, lambda h: h.pop(NORM))


@case
def offsets_beyond_the_file(folder: Path) -> tuple[str, str]:
    """A tensor of a terabyte is claimed."""
    huge = {"dtype": "U8", "shape": [1 << 40], "data_offsets": [0, 1 << 40]}
    write_parts(folder / "model" / "model.safetensors", {"a": huge}, b"\0" * 16)
    return STUDY, "model.safetensors"


@case
def offsets_reversed(folder: Path) -> tuple[str, str]:
    """A tensor ends before it begins."""
    return change_header(folder, lambda h: h[NORM]["data_offsets"].reverse())


@case
def offsets_negative(folder: Path) -> tuple[str, str]:
    """A tensor begins before the data."""
    return change_header(folder, lambda h: h[NORM].update(data_offsets=[-256, 0]))


@case
def shape_that_overflows(folder: Path) -> tuple[str, str]:
    """The entries of a shape multiply to 2^124, which is 0 in 64 bits."""
    return change_header(folder, lambda h: h[NORM].update(shape=[1 << 61, 1 << 61, 4]))


@case
def shape_negative(folder: Path) -> tuple[str, str]:
    """A shape has negative lengths, the product of which is right."""
    return change_header(folder, lambda h: h[WEIGHT].update(shape=[-96, -64]))


@case
def shape_of_fractions(folder: Path) -> tuple[str, str]:
    """A shape has a fraction."""
    return change_header(folder, lambda h: h[NORM].update(shape=[64.0]))


@case
def shape_of_too_many_dimensions(folder: Path) -> tuple[str, str]:
    """A shape has a thousand dimensions."""
    return change_header(folder, lambda h: h[NORM].update(shape=[64, *[1] * 1000]))


@case
def dtype_unknown(folder: Path) -> tuple[str, str]:
    """A dtype is none."""
    return change_header(folder, lambda h: h[NORM].update(dtype="F32; rm -rf"))


@case
def dtype_of_another_size(folder: Path) -> tuple[str, str]:
    """A dtype is twice as wide as the bytes that it has."""
    return change_header(folder, lambda h: h[NORM].update(dtype="F64"))


@case
def dtype_of_whole_numbers(folder: Path) -> tuple[str, str]:
    """A weight is kept as whole numbers of the right size."""
    return change_header(folder, lambda h: h[WEIGHT].update(dtype="I32"))[0], WEIGHT


@case
def name_that_steers_the_terminal(folder: Path) -> tuple[str, str]:
    """The name of a tensor clears the screen."""
    return change_header(folder, lambda h: h.update({"\x1b[2J": h.pop(NORM)}))


@case
def bytes_behind_the_data(folder: Path) -> tuple[str, str]:
    """Something follows the last tensor."""
    path = folder / "model" / "model.safetensors"
    path.write_bytes(path.read_bytes() + b"PK\x03\x04")
    return STUDY, "model.safetensors"


@case
def weight_without_entries(folder: Path) -> tuple[str, str]:
    """A weight has no rows."""
    change_tensor(folder / "model" / "model.safetensors", WEIGHT, lambda t: t[:0])
    return STUDY, "no entries"


@case
def weight_with_nan(folder: Path) -> tuple[str, str]:
    """An entry of a weight is NaN."""
    change_tensor(
        folder / "model" / "model.safetensors", WEIGHT, lambda t: t.index_fill(0, torch.tensor(3), float("nan"))
    )
    return STUDY, WEIGHT


@case
def norm_with_infinity(folder: Path) -> tuple[str, str]:
    """An entry of a small weight, which is no site, is infinite."""
    change_tensor(folder / "model" / "model.safetensors", NORM, lambda t: t.fill_(float("inf")))
    return STUDY, NORM


@case
def weight_missing(folder: Path) -> tuple[str, str]:
    """A weight is not there."""
    change_tensor(folder / "model" / "model.safetensors", WEIGHT, lambda _: None)
    return STUDY, WEIGHT


@case
def weight_of_another_shape(folder: Path) -> tuple[str, str]:
    """A weight has fewer rows than the config says."""
    change_tensor(folder / "model" / "model.safetensors", WEIGHT, lambda t: t[:-1].contiguous())
    return STUDY, "model"


@case
def pickle_alone(folder: Path) -> tuple[str, str]:
    """The weights are a pickle that runs code."""
    (folder / "model" / "model.safetensors").unlink()
    (folder / "model" / "pytorch_model.bin").write_bytes(pickle.dumps(Runs()))
    return STUDY, "pickles"


@case
def pickle_under_another_name(folder: Path) -> tuple[str, str]:
    """A pickle that runs code is called model.safetensors."""
    (folder / "model" / "model.safetensors").write_bytes(pickle.dumps(Runs()))
    return STUDY, "model.safetensors"


@case
def pickle_as_weights_of_a_factory(folder: Path) -> tuple[str, str]:
    """The weights given to a factory are a pickle that runs code."""
    (folder / "net.py").write_text("import torch\n\ndef net():\n    return torch.nn.Linear(64, 64)\n")
    (folder / "net.pt").write_bytes(pickle.dumps(Runs()))
    np.save(folder / "x.npy", np.zeros((4, 64), np.float32))
    return "study net.py:net --weights net.pt --data x.npy --run new.run", "net.pt"


@case
def weights_linked_from_elsewhere(folder: Path) -> tuple[str, str]:
    """The weights are a link that leads out of the folder."""
    shutil.move(folder / "model" / "model.safetensors", folder / "elsewhere.safetensors")
    link(folder / "model" / "model.safetensors", folder / "elsewhere.safetensors")
    return STUDY, "leads out of"


@case
def secret_linked_as_tokenizer(folder: Path) -> tuple[str, str]:
    """A file that would be copied into the artifact is a link to a secret."""
    (folder / "secret").write_text("{}")
    link(folder / "model" / "vocab.json", folder / "secret")
    return "compress model --data text.txt --budget 50% --out new", "vocab.json"


@case
def folder_linked_from_elsewhere(folder: Path) -> tuple[str, str]:
    """A folder that would be copied into the artifact is a link to another."""
    (folder / "home").mkdir()
    link(folder / "model" / "1_Pooling", folder / "home")
    return STUDY, "1_Pooling"


@case
def link_to_itself(folder: Path) -> tuple[str, str]:
    """A link leads to itself."""
    link(folder / "model" / "vocab.json", Path("vocab.json"))
    return STUDY, "model"


# Checkpoints: the index of several files.


@case
def index_that_leads_up(folder: Path) -> tuple[str, str]:
    """The index names a file beside the folder."""
    shutil.copy(folder / "model" / "model.safetensors", folder / "elsewhere.safetensors")
    return indexed(folder, lambda w: w.update({WEIGHT: "../elsewhere.safetensors"}))


@case
def index_of_an_absolute_path(folder: Path) -> tuple[str, str]:
    """The index names a file by its full path."""
    return indexed(folder, lambda w: w.update({WEIGHT: "/etc/passwd"}))


@case
def index_of_a_pickle(folder: Path) -> tuple[str, str]:
    """The index names a pickle."""
    (folder / "model" / "part.bin").write_bytes(pickle.dumps(Runs()))
    return indexed(folder, lambda w: w.update({WEIGHT: "part.bin"}))


@case
def index_of_a_missing_file(folder: Path) -> tuple[str, str]:
    """The index names a file that is not there."""
    return indexed(folder, lambda w: w.update({WEIGHT: "model-3.safetensors"}))


@case
def index_of_numbers(folder: Path) -> tuple[str, str]:
    """The index has a number in the place of a file."""
    return indexed(folder, lambda w: w.update({WEIGHT: 3}))


@case
def index_of_nothing(folder: Path) -> tuple[str, str]:
    """The index names no file."""
    return indexed(folder, lambda w: w.clear())


@case
def index_that_misplaces_a_tensor(folder: Path) -> tuple[str, str]:
    """The index names a tensor that the file has not."""
    return indexed(folder, lambda w: w.update(another=w[WEIGHT]))


@case
def two_files_with_one_tensor(folder: Path) -> tuple[str, str]:
    """Two files of an index hold a tensor of the same name."""
    found = indexed(folder, lambda w: None)
    twin = load_file(folder / "model" / "model-1.safetensors")
    twin |= load_file(folder / "model" / "model-2.safetensors")
    save_file(twin, folder / "model" / "model-2.safetensors", {"format": "pt"})
    return found[0], "already"


@case
def index_beside_a_single_file(folder: Path) -> tuple[str, str]:
    """There is an index and a single file: which of them counts?"""
    (folder / "model" / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    return STUDY, "both"


# Checkpoints: config and tokenizer.


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


# Artifacts.


def record(folder: Path, change: Callable[[dict[str, Any]], Any], command: str = "show coded") -> tuple[str, str]:
    change_json(folder / "coded" / "tersor.json", change)
    return command, "tersor.json"


@case
def record_nested_deeply(folder: Path) -> tuple[str, str]:
    """The record opens two hundred thousand lists."""
    (folder / "coded" / "tersor.json").write_text('{"version": ' + DEEP)
    return "show coded", "tersor.json"


@case
def record_no_utf8(folder: Path) -> tuple[str, str]:
    """The record is no UTF-8."""
    (folder / "coded" / "tersor.json").write_bytes(b'\xfe\xff{"version": 1}')
    return "show coded", "tersor.json"


@case
def record_of_another_version(folder: Path) -> tuple[str, str]:
    """The record is of a version that is to come."""
    return record(folder, lambda r: r.update(version=2))


@case
def record_without_a_plan(folder: Path) -> tuple[str, str]:
    """The record has no plan."""
    return record(folder, lambda r: r.pop("plan"))


@case
def record_of_negative_bytes(folder: Path) -> tuple[str, str]:
    """A choice of the plan takes fewer bytes than none."""
    return record(folder, lambda r: r["plan"]["choices"][0].update(stored=-5))


@case
def record_of_a_divergence_that_is_none(folder: Path) -> tuple[str, str]:
    """The divergence of the plan is NaN."""
    return record(folder, lambda r: r["plan"].update(divergence=float("nan")))


@case
def record_of_an_original_without_bytes(folder: Path) -> tuple[str, str]:
    """The original takes no bytes, by which shares are divided."""
    return record(folder, lambda r: r["model"].update(stored_bytes=0))


@case
def record_of_an_unknown_site(folder: Path) -> tuple[str, str]:
    """The plan has a site of which the record does not know the size."""
    return record(folder, lambda r: r["site_weights"].pop(SITE))


@case
def record_that_steers_the_terminal(folder: Path) -> tuple[str, str]:
    """The name of the model rings the bell."""
    return record(folder, lambda r: r["model"].update(source="\x07\x1b]0;title\x07"))


@case
def record_of_a_judgement_without_numbers(folder: Path) -> tuple[str, str]:
    """The judgement has a text in the place of a divergence."""
    return record(folder, lambda r: r["judgement"]["divergence"].update(value="small"))


@case
def record_linked_from_elsewhere(folder: Path) -> tuple[str, str]:
    """The record is a link that leads out of the folder."""
    shutil.move(folder / "coded" / "tersor.json", folder / "elsewhere.json")
    link(folder / "coded" / "tersor.json", folder / "elsewhere.json")
    return "show coded", "tersor.json"


@case
def record_of_a_file_elsewhere(folder: Path) -> tuple[str, str]:
    """The record names a file out of the folder, whose hash it would test."""
    return record(folder, lambda r: r["files"].update({"../text.txt": "0" * 64}), "verify coded")


@case
def record_of_another_plan(folder: Path) -> tuple[str, str]:
    """The plan of the record has other settings than its sites."""
    return record(folder, lambda r: r["plan"]["choices"][0]["setting"].update(step=9.0), "verify coded")


@case
def record_of_a_better_divergence(folder: Path) -> tuple[str, str]:
    """The record claims a divergence that the artifact does not reach."""
    claim = {"value": 1e-9, "low": 1e-10, "high": 1e-8}
    command = "verify coded --model model --data text.txt"
    return record(folder, lambda r: r["judgement"]["divergence"].update(claim), command)[0], "interval"


@case
def site_of_an_unknown_form(folder: Path) -> tuple[str, str]:
    """A site has a form that is none."""
    change_both(folder / "coded", lambda sites: sites[SITE].update(form="__import__"))
    return "export coded new --to dense", "__import__"


@case
def site_of_an_absurd_setting(folder: Path) -> tuple[str, str]:
    """A site asks for factors of a petabyte."""
    change_both(folder / "coded", lambda sites: sites[SITE].update(form="lowrank", setting={"rank": 1 << 50}))
    return "export coded new --to dense", SITE


@case
def site_of_a_setting_of_texts(folder: Path) -> tuple[str, str]:
    """A setting has a text in the place of a number."""
    change_both(folder / "coded", lambda sites: sites[SITE]["setting"].update(stored="all"))
    return "export coded new --to dense", "stored"


@case
def site_of_an_unknown_setting(folder: Path) -> tuple[str, str]:
    """A setting has a field that its form does not know."""
    change_both(folder / "coded", lambda sites: sites[SITE]["setting"].update(callback="os.system"))
    return "export coded new --to dense", "coded"


@case
def site_of_a_stack_of_settings(folder: Path) -> tuple[str, str]:
    """A site of one matrix has the settings of three."""
    change_both(folder / "coded", lambda sites: sites[SITE].update(setting={"stack": [sites[SITE]["setting"]] * 3}))
    return "export coded new --to dense", SITE


@case
def site_that_the_model_lacks(folder: Path) -> tuple[str, str]:
    """A site is none of the model."""
    change_both(folder / "coded", lambda sites: sites.update(another=sites.pop(SITE)))
    change_json(folder / "coded" / "tersor.json", lambda r: r["site_weights"].update(another=10))
    return "export coded new --to dense", "another"


@case
def site_in_the_place_of_another(folder: Path) -> tuple[str, str]:
    """A site would be put into modules of other shapes."""
    change_both(
        folder / "coded", lambda sites: sites[SITE].update(places=[["model", "training"], ["lm_head", "weight"]])
    )
    return "export coded new --to dense", SITE


@case
def site_in_a_place_of_three_names(folder: Path) -> tuple[str, str]:
    """A place is no module and parameter."""
    change_both(folder / "coded", lambda sites: sites[SITE].update(places=[["a", "b", "c"]]))
    return "export coded new --to dense", "places"


@case
def layout_of_a_list(folder: Path) -> tuple[str, str]:
    """The sites in the config are a list."""
    change_json(folder / "coded" / "config.json", lambda c: c["quantization_config"].update(sites=[1, 2]))
    return "export coded new --to dense", "artifact"


@case
def artifact_of_other_weights(folder: Path) -> tuple[str, str]:
    """A weight was changed after the artifact was written."""
    change_tensor(folder / "coded" / "model.safetensors", NORM, lambda t: t + 1)
    return "verify coded", "model.safetensors"


@case
def artifact_of_another_config(folder: Path) -> tuple[str, str]:
    """The config was changed after the artifact was written."""
    change_json(folder / "coded" / "config.json", lambda c: c.update(rms_norm_eps=0.5))
    return "verify coded", "config.json"


@case
def artifact_with_nan(folder: Path) -> tuple[str, str]:
    """A weight that was left as it was is NaN."""
    change_tensor(folder / "coded" / "model.safetensors", NORM, lambda t: t.fill_(float("nan")))
    resealed(folder / "coded")
    return "export coded new --to dense", NORM


@case
def artifact_without_a_tensor(folder: Path) -> tuple[str, str]:
    """The stream of a site is not there."""
    change_tensor(folder / "coded" / "model.safetensors", f"{SITE}.operator.stream", lambda _: None)
    return "judge coded --model model --data text.txt", f"{SITE}.operator.stream"


@case
def artifact_with_a_strange_tensor(folder: Path) -> tuple[str, str]:
    """There is a tensor that the model does not know."""
    path = folder / "coded" / "model.safetensors"
    save_file({**load_file(path), "strange": torch.zeros(4)}, path, {"format": "pt"})
    return "export coded new --to dense", "strange"


@case
def stream_of_another_dtype(folder: Path) -> tuple[str, str]:
    """A stream is kept as floating-point numbers."""
    change_tensor(folder / "coded" / "model.safetensors", f"{SITE}.operator.stream", lambda t: t.float())
    return "export coded new --to dense", f"{SITE}.operator.stream"


@case
def stream_cut_short(folder: Path) -> tuple[str, str]:
    """A stream is shorter than its setting says."""
    change_tensor(folder / "coded" / "model.safetensors", f"{SITE}.operator.stream", lambda t: t[:-9].contiguous())
    return "export coded new --to dense", f"{SITE}.operator.stream"


def spoiled_stream(folder: Path, form: str, at: int, value: int) -> tuple[str, str]:
    def change(stream: torch.Tensor) -> torch.Tensor:
        stream[at] = value
        return stream

    change_tensor(folder / form / "model.safetensors", f"{SITE}.operator.stream", change)
    resealed(folder / form)
    return f"verify {form}", "model.safetensors"


@case
def coded_stream_of_noise(folder: Path) -> tuple[str, str]:
    """A byte in the middle of a coded stream is another, and the hashes were made right again."""
    return spoiled_stream(folder, "coded", 1000, 7)


@case
def coded_stream_of_another_shape(folder: Path) -> tuple[str, str]:
    """The header of a coded stream claims more rows."""
    return spoiled_stream(folder, "coded", 4, 0xFF)


@case
def trellis_stream_of_noise(folder: Path) -> tuple[str, str]:
    """A byte in the middle of a trellis stream is another, and the hashes were made right again."""
    return spoiled_stream(folder, "trellis", 900, 7)[0], SITE


@case
def trellis_stream_of_another_kind(folder: Path) -> tuple[str, str]:
    """A trellis stream does not begin as one."""
    return spoiled_stream(folder, "trellis", 0, 0)[0], SITE


@case
def artifact_with_an_index(folder: Path) -> tuple[str, str]:
    """The weights of an artifact lie in a file that an index names."""
    shutil.move(folder / "coded" / "model.safetensors", folder / "coded" / "other.safetensors")
    (folder / "coded" / "model.safetensors.index.json").write_text('{"weight_map": {"a": "other.safetensors"}}')
    return "export coded new --to dense", "model.safetensors"


@case
def artifact_judged_against_another_model(folder: Path) -> tuple[str, str]:
    """The original is another model."""
    change_tensor(folder / "model" / "model.safetensors", NORM, lambda t: t * 2)
    return "judge coded --model model --data text.txt", "another model"


@case
def artifact_verified_on_other_data(folder: Path) -> tuple[str, str]:
    """The data are not those that the artifact was judged on."""
    (folder / "other.txt").write_text("abc abc abc\n" * 20)
    return "verify coded --model model --data other.txt", "other.txt"


@case
def artifact_compressed_again(folder: Path) -> tuple[str, str]:
    """An artifact is given in the place of a model."""
    return "compress coded --data text.txt --budget 50% --out new", "quantised already"


# Runs.


@case
def run_no_database(folder: Path) -> tuple[str, str]:
    """The database of a run is text."""
    (folder / "study.run" / "run.db").write_text("no database" * 500)
    return "show study.run", "run.db"


@case
def run_cut_short(folder: Path) -> tuple[str, str]:
    """The database of a run ends in the middle."""
    path = folder / "study.run" / "run.db"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return "show study.run", "run.db"


@case
def run_of_another_program(folder: Path) -> tuple[str, str]:
    """The database is that of another program, which must stay as it is."""
    (folder / "study.run" / "run.db").unlink()
    change_run(folder, "CREATE TABLE moz_places (id INTEGER)", "INSERT INTO moz_places VALUES (1)")
    return "front study.run", "moz_places"


@case
def run_of_another_program_with_a_log(folder: Path) -> tuple[str, str]:
    """The database keeps a log, which even reading would write."""
    with contextlib.closing(sqlite3.connect(folder / "study.run" / "run.db")) as db:
        db.execute("PRAGMA journal_mode = WAL")
    return "front study.run", "run.db"


@case
def run_linked_from_elsewhere(folder: Path) -> tuple[str, str]:
    """The database is a link to another one, which would be written to."""
    shutil.move(folder / "study.run" / "run.db", folder / "elsewhere.db")
    link(folder / "study.run" / "run.db", folder / "elsewhere.db")
    return "plan study.run --budget 50%", "run.db"


@case
def run_with_a_trigger(folder: Path) -> tuple[str, str]:
    """Making a plan would set off what a stranger wrote."""
    change_run(folder, "CREATE TRIGGER t AFTER INSERT ON plans BEGIN DELETE FROM facts; END")
    return "plan study.run --budget 50%", "trigger"


@case
def run_with_a_view(folder: Path) -> tuple[str, str]:
    """A table is a view that never ends."""
    endless = "WITH RECURSIVE c(plan) AS (SELECT 1 UNION ALL SELECT plan + 1 FROM c) SELECT plan, 1, 1, 1, 1, 1 FROM c"
    change_run(folder, "DROP TABLE ledger", f"CREATE VIEW ledger AS {endless}")
    return "show study.run", "view"


@case
def run_without_a_layout(folder: Path) -> tuple[str, str]:
    """The layout of the model is not there."""
    change_run(folder, "DELETE FROM facts WHERE name = 'layout'")
    return "front study.run", "layout"


@case
def run_of_a_strange_layout(folder: Path) -> tuple[str, str]:
    """A site of the layout has a negative shape."""
    change_fact(folder, "layout", lambda v: v["sites"][0].update(shape=[-1, -1]) or v)
    return "front study.run", "layout.sites.0.shape.0"


@case
def run_of_an_unknown_dtype(folder: Path) -> tuple[str, str]:
    """A site of the layout has a dtype that is none."""
    change_fact(folder, "layout", lambda v: v["sites"][0].update(dtype="F7") or v)
    return "front study.run", "layout"


@case
def run_of_facts_nested_deeply(folder: Path) -> tuple[str, str]:
    """A fact opens two hundred thousand lists."""
    change_run(folder, f"UPDATE facts SET value = '{DEEP}' WHERE name = 'untouched'")
    return "show study.run", "untouched"


@case
def run_of_negative_candidates(folder: Path) -> tuple[str, str]:
    """Candidates take fewer bytes than none."""
    change_run(folder, "UPDATE candidates SET stored = -1000000")
    return "plan study.run --budget 50%", "run.db"


@case
def run_of_candidates_of_texts(folder: Path) -> tuple[str, str]:
    """The predicted damage of a candidate is a text."""
    change_run(folder, "UPDATE candidates SET predicted = 'none'")
    return "plan study.run --budget 50%", "run.db"


@case
def run_of_an_unknown_form(folder: Path) -> tuple[str, str]:
    """A candidate is of a form that is none."""
    change_run(folder, "UPDATE candidates SET form = 'magic'")
    return "plan study.run --budget 50%", "magic"


@case
def run_of_an_empty_plan(folder: Path) -> tuple[str, str]:
    """A plan is an object without anything."""
    change_run(folder, "UPDATE plans SET value = '{}'")
    return "show study.run", "run.db"


@case
def run_of_a_ledger_of_texts(folder: Path) -> tuple[str, str]:
    """The ledger has texts in the place of numbers."""
    change_run(folder, "INSERT INTO ledger VALUES ('a', '*', 'x', x'00ff', 'y', 'z')")
    return "report study.run --out new.html", "ledger"


@case
def run_that_leads_out_of_its_folder(folder: Path) -> tuple[str, str]:
    """A site is named so that its spectra lie out of the run."""
    change_fact(folder, "layout", lambda v: v["sites"][0].update(name="../../../elsewhere") or v)
    return "front study.run", "elsewhere"


@case
def run_with_a_spoiled_fit(folder: Path) -> tuple[str, str]:
    """A fit is cut short."""
    for path in (folder / "study.run" / "fits").iterdir():
        path.write_bytes(path.read_bytes()[:-100])
    name = next(iter(plans_of(folder)))
    return f"build study.run --plan {name} --out new", "fits"


@case
def run_with_an_empty_fit(folder: Path) -> tuple[str, str]:
    """A fit holds none of the tensors that it should."""
    for path in (folder / "study.run" / "fits").iterdir():
        save_file({"x": torch.zeros(3)}, path)
    name = next(iter(plans_of(folder)))
    return f"build study.run --plan {name} --out new", "fits"


@case
def run_with_spoiled_spectra(folder: Path) -> tuple[str, str]:
    """The energies of a site are NaN."""
    for path in (folder / "study.run" / "spectra").iterdir():
        change_tensor(path, "energies", lambda t: t.fill_(float("nan")))
    return "front study.run", "spectra"


@case
def run_that_brings_code(folder: Path) -> tuple[str, str]:
    """The run names a factory that lies in itself as its model."""
    (folder / "study.run" / "net.py").write_text("open('it-ran', 'w')\n\ndef net():\n    pass\n")
    model = f"{folder / 'study.run' / 'net.py'}:net"
    change_fact(folder, "opening", lambda v: {**v, "model": model})
    name = next(iter(plans_of(folder)))
    return f"build study.run --plan {name} --out new", "net.py"


def plans_of(folder: Path) -> list[str]:
    with contextlib.closing(sqlite3.connect(folder / "study.run" / "run.db")) as db:
        return [name for (name,) in db.execute("SELECT name FROM plans ORDER BY made")]


# Data.


def data(folder: Path, name: str, content: str | bytes, column: str = "") -> tuple[str, str]:
    (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return f"study model --data {name}{column} --run new.run", name


@case
def text_no_utf8(folder: Path) -> tuple[str, str]:
    """A text is no UTF-8."""
    return data(folder, "bad.txt", b"abc\n\xff\xfe\n")


@case
def text_empty(folder: Path) -> tuple[str, str]:
    """A text has no line."""
    return data(folder, "bad.txt", "\n\n")


@case
def text_that_is_a_pipe(folder: Path) -> tuple[str, str]:
    """A text is a pipe, which nobody writes to."""
    os.mkfifo(folder / "bad.txt")
    return "study model --data bad.txt --run new.run", "bad.txt"


@case
def table_without_the_column(folder: Path) -> tuple[str, str]:
    """A table has not the column that is asked for."""
    return data(folder, "bad.csv", "a,b\nx,y\n", ":c")


@case
def table_with_a_short_row(folder: Path) -> tuple[str, str]:
    """A row of a table ends too early."""
    return data(folder, "bad.csv", "text,label\nx,1\ny\n", ":text")


@case
def lines_nested_deeply(folder: Path) -> tuple[str, str]:
    """A line of JSON opens two hundred thousand lists."""
    return data(folder, "bad.jsonl", '{"text": "a"}\n' + DEEP + "\n")


@case
def lines_of_numbers(folder: Path) -> tuple[str, str]:
    """A line of JSON is a number among objects."""
    return data(folder, "bad.jsonl", '{"text": "a"}\n7\n')


@case
def lines_of_half_a_character(folder: Path) -> tuple[str, str]:
    """A line of JSON holds half of a surrogate pair, which no text can."""
    return data(folder, "bad.jsonl", '{"text": "\\ud800"}\n')


@case
def arrays_of_pickles(folder: Path) -> tuple[str, str]:
    """Arrays hold an object that runs code when it is loaded."""
    np.savez(folder / "bad.npz", x=np.array([Runs()], dtype=object))
    return "study model --data bad.npz --run new.run", "bad.npz"


@case
def arrays_that_unpack_to_a_gigabyte(folder: Path) -> tuple[str, str]:
    """A small archive claims a gigabyte."""
    np.savez_compressed(folder / "bad.npz", x=np.zeros(1000))
    archive = bytearray((folder / "bad.npz").read_bytes())
    size = archive.index(b"PK\x01\x02") + 24  # in the directory at the end
    archive[size : size + 4] = (1 << 30).to_bytes(4, "little")
    (folder / "bad.npz").write_bytes(archive)
    return "study model --data bad.npz --run new.run", "unpack"


@case
def arrays_of_a_petabyte(folder: Path) -> tuple[str, str]:
    """The header of an array claims a petabyte."""
    with (folder / "bad.npy").open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (1 << 48,)})
    return "study model --data bad.npy --run new.run", "bad.npy"


@case
def arrays_with_nan(folder: Path) -> tuple[str, str]:
    """An array has NaN."""
    np.savez(folder / "bad.npz", x=np.full((4, 3), np.nan))
    return "study model --data bad.npz --run new.run", "bad.npz"


@case
def tensors_that_overlap(folder: Path) -> tuple[str, str]:
    """Data as safetensors lie on the same bytes."""
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    write_parts(folder / "bad.safetensors", {"a": entry, "b": entry}, bytes(8))
    return "study model --data bad.safetensors --run new.run", "bad.safetensors"


@case
def parquet_of_noise(folder: Path) -> tuple[str, str]:
    """A Parquet file begins and ends as one and holds noise."""
    noise = random.Random(0).randbytes(400)
    return data(folder, "bad.parquet", b"PAR1" + noise + (200).to_bytes(4, "little") + b"PAR1")


@case
def folder_of_nothing(folder: Path) -> tuple[str, str]:
    """A folder of data is empty."""
    (folder / "bad").mkdir()
    return "study model --data bad --run new.run", "bad"


@case
def images_of_text(folder: Path) -> tuple[str, str]:
    """An image is text."""
    (folder / "bad").mkdir()
    (folder / "bad" / "a.png").write_text("no image")
    return "study model --data bad --run new.run", "bad"


@case
def saved_dataset_linked_from_elsewhere(folder: Path) -> tuple[str, str]:
    """A saved dataset links to a file that lies elsewhere."""
    (folder / "bad").mkdir()
    (folder / "bad" / "state.json").write_text("{}")
    (folder / "bad" / "dataset_info.json").write_text("{}")
    link(folder / "bad" / "data-00000-of-00001.arrow", folder / "text.txt")
    return "study model --data bad --run new.run", "bad"


@case
def pairs_without_scores(folder: Path) -> tuple[str, str]:
    """A file of pairs lacks the scores."""
    (folder / "pairs.csv").write_text("a,b\nc,d\ne,f\n")
    return "compress model --data text.txt --budget 50% --out new --pairs pairs.csv", "pairs.csv"


@case
def pairs_with_nan(folder: Path) -> tuple[str, str]:
    """A file of pairs has a score that is NaN."""
    (folder / "pairs.csv").write_text("a,b,1\nc,d,nan\ne,f,3\n")
    return "compress model --data text.txt --budget 50% --out new --pairs pairs.csv", "pairs.csv"


def make(base: Path, folder: Path, name: str) -> tuple[str, str]:
    """A copy of the base in `folder`, spoiled as the case of this name has it; its command and what it names."""
    shutil.copytree(base, folder, symlinks=True)
    return CASES[name](folder)


if __name__ == "__main__":
    target = Path(sys.argv[1])
    make_base(target / "base")
    for case_name in CASES:
        line, _ = make(target / "base", target / case_name, case_name)
        print(f"{case_name}: tersor {line}")
