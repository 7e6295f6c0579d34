"""Long runs of fuzzing one reader by coverage, with Atheris: `python long_fuzz.py READER [options of libFuzzer]`.

The readers are json, safetensors, record, coded, trellis, and the kinds of data files by their endings. Whatever is no
TersorError ends the run, and the input that did it is kept in the current folder.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import atheris

with atheris.instrument_imports(include=["tersor"]):
    from tersor.build.artifact import read_record
    from tersor.coding import decode
    from tersor.coding.trellis import Trellis
    from tersor.data import read_data
    from tersor.errors import TersorError
    from tersor.foreign import parse_json
    from tersor.models.files import read_tensors

FOLDER = Path(tempfile.mkdtemp())


def of_file(name: str, read: Callable[[Path], Any]) -> Callable[[bytes], Any]:
    """A reader of a file of this name."""

    def run(content: bytes) -> None:
        (FOLDER / name).write_bytes(content)
        read(FOLDER / name)

    return run


READERS: dict[str, Callable[[bytes], Any]] = {
    "json": lambda content: parse_json(content, "it"),
    "safetensors": of_file("a.safetensors", read_tensors),
    "record": of_file("tersor.json", lambda path: read_record(path.parent)),
    "coded": lambda content: decode(content, (9, 20)),
    "trellis": lambda content: Trellis.from_bytes(content, (6, 6)),
    **{kind: of_file(f"a.{kind}", read_data) for kind in ("txt", "csv", "jsonl", "npz", "npy", "parquet")},
}


def main() -> None:
    reader = READERS[sys.argv.pop(1)]

    def one(content: bytes) -> None:
        with contextlib.suppress(TersorError):
            reader(content)

    atheris.Setup(sys.argv, one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
