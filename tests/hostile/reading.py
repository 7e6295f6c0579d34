"""What a reader of files is, for those who spoil what it reads, and the table of all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Reader:
    """What reads the bytes of a file, sound ones, and what they are: `json`, `safetensors`, or `bytes`."""

    read: Callable[[bytes], Any]
    seeds: tuple[bytes, ...]
    kind: str = "bytes"


Make = Callable[[Path], Reader]
READERS: dict[str, Make] = {}


def reader(make: Make) -> Make:
    READERS[make.__name__] = make
    return make


def of_file(path: Path, read: Callable[[], Any], seeds: tuple[bytes, ...], kind: str = "bytes") -> Reader:
    """A reader of one file; what lies beside it stays."""

    def run(content: bytes) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        read()

    return Reader(run, seeds, kind)


def encoded(*values: Any) -> tuple[bytes, ...]:
    return tuple(json.dumps(value).encode() for value in values)


def made(name: str, folder: Path) -> Reader:
    """A reader with its files in an empty folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return READERS[name](folder)
