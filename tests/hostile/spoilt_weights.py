"""Checkpoints whose weights, or the index of several files, are damaged or hostile."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from spoiling import (
    DEEP,
    NORM,
    STUDY,
    WEIGHT,
    Runs,
    case,
    change_header,
    change_tensor,
    indexed,
    link,
    parts_of,
    write_parts,
)


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
