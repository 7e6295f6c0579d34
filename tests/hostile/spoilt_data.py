"""Data files that are damaged or hostile."""

from __future__ import annotations

import os
import random
from pathlib import Path

import numpy as np
from spoiling import (
    DEEP,
    Runs,
    case,
    link,
    write_parts,
)


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
