"""Safetensors checkpoints on disk: their headers, their exact sizes, and writing them safely.

A header is read and checked before any tensor is: truncated, foreign and overlapping files are refused in a sentence
that names them. Files are written under a temporary name and renamed when whole.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from tersor.errors import TersorError
from tersor.foreign import check, read_header, read_json, refuse_links

DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_BY_NAME = {name: dtype for dtype, name in DTYPES.items()}
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD = "model-{:05}-of-{:05}.safetensors"
_SHARDED = r"model-\d{5}-of-\d{5}\.safetensors"
SHARD_BYTES = 64  # at most what a file takes beside its tensors and their names
METADATA = {"format": "pt"}
Entry = tuple[str, tuple[int, ...], torch.dtype]  # of a safetensors file: name, shape, dtype
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


@dataclass(frozen=True)
class Checkpoint:
    """The weight files of a folder: where each tensor lies, with its shape and dtype, and their bytes on disk."""

    files: tuple[Path, ...]
    entries: dict[str, tuple[Path, tuple[int, ...], torch.dtype | None]]
    file_bytes: int
    fingerprint: str

    def refuse_empty(self) -> None:
        """Raise TersorError for the first weight without entries; buffers of integers may be so."""
        for name, (path, shape, dtype) in self.entries.items():
            if 0 in shape and (dtype is None or dtype.is_floating_point):
                raise TersorError(f"{path}: {name} has shape {shape}, which has no entries.")

    def dtype_of(self, name: str, default: torch.dtype) -> torch.dtype:
        entry = self.entries.get(name)
        return entry[2] if entry is not None and entry[2] is not None else default


def open_checkpoint(source: Path) -> Checkpoint:
    """Read the headers of `source`: a safetensors file, or a folder with one or an index of several.

    Raises TersorError for a missing, truncated or foreign file, naming it.
    """
    if not source.exists():
        raise TersorError(f"{source} does not exist.")
    if source.suffix in PICKLES:
        raise TersorError(f"{source} is a pickle, which can run code; convert it to safetensors first.")
    paths, places = ([source], {}) if source.is_file() else _files_of(source)
    entries: dict[str, tuple[Path, tuple[int, ...], torch.dtype | None]] = {}
    digest = hashlib.sha256()
    for path in paths:
        for name, part in read_header(path).items():
            if name in entries:
                raise TersorError(f"{path} holds {name}, which {entries[name][0]} holds already.")
            entries[name] = path, part.shape, _BY_NAME.get(part.dtype)
        digest.update(_fingerprint(path))
    for name, file in places.items():
        if name not in entries or entries[name][0].name != file:
            raise TersorError(f"{source / INDEX} has {name} in {file}, which lacks it.")
    return Checkpoint(tuple(paths), entries, sum(p.stat().st_size for p in paths), digest.hexdigest()[:16])


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; raises TersorError where it is damaged."""
    read_header(path)
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (SafetensorError, OSError) as error:
        raise TersorError(f"{path} is damaged or no safetensors file: {error}.") from error
    return tensors


def read_tensor(path: Path, name: str) -> Tensor:
    """One tensor of a safetensors file whose header was checked; raises TersorError where it is gone or damaged."""
    try:
        with safe_open(path, "pt") as file:
            tensor: Tensor = file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise TersorError(f"{path} changed since it was opened: {name} cannot be read: {error}.") from error
    return tensor


def _files_of(folder: Path) -> tuple[list[Path], dict[str, str]]:
    """The weight files of a folder, and where its index has each tensor; of a single file it has none."""
    refuse_links(folder)
    index, single = folder / INDEX, folder / WEIGHTS
    if index.exists() and single.exists():
        raise TersorError(f"{folder} has both {single.name} and {index.name}, so which of them counts is open.")
    if index.exists():
        weights = check(read_json(index), {"weight_map": {str: str}}, index)["weight_map"]
        names = sorted(set(weights.values()))
        for name in names:
            if Path(name).name != name:
                raise TersorError(f"{index} names {name}, which lies outside of the folder.")
            if Path(name).suffix != ".safetensors":
                raise TersorError(f"{index} names {name}, which is no safetensors file.")
            if not (folder / name).exists():
                raise TersorError(f"{index} names {name}, which is missing.")
        if not names:
            raise TersorError(f"{index} names no file.")
        return [folder / name for name in names], weights
    if single.exists():
        return [single], {}
    if any(path.suffix in PICKLES for path in folder.iterdir()):
        raise TersorError(f"{folder} has weights as pickles only; convert them to safetensors first.")
    raise TersorError(f"{folder} has no {WEIGHTS}.")


def _fingerprint(path: Path) -> bytes:
    """A hash of the size, the header and a sample of the data of a file; cheap for files of any size."""
    digest = hashlib.sha256(str(path.stat().st_size).encode())
    with path.open("rb") as file:
        size = path.stat().st_size
        for position in range(0, size, max(1, size // 64)):
            file.seek(position)
            digest.update(file.read(4096))
    return digest.digest()


def file_bytes(tensors: Iterable[Entry]) -> int:
    """The exact size of the safetensors file of these tensors."""
    entries = list(tensors)
    return len(_header_of(entries)) + sum(_size(shape, dtype) for _, shape, dtype in entries)


def _header_of(entries: Iterable[Entry]) -> bytes:
    """The header of a safetensors file, with its length before it."""
    header: dict[str, Any] = {"__metadata__": METADATA}
    offset = 0
    for name, shape, dtype in _laid_out(entries):
        size = _size(shape, dtype)
        header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _laid_out(entries: Iterable[Entry]) -> list[Entry]:
    """Tensors in the order in which a safetensors file has them."""
    return sorted(entries, key=lambda e: (-_ORDER.index(e[2]), e[0]))


def write_tensors(path: Path, entries: Iterable[Entry], tensor_of: Callable[[str], Tensor]) -> None:
    """Write a safetensors file of these tensors, one at a time, and rename it when it is whole.

    `tensor_of(name)` is cast to its dtype. Raises TersorError for one of another shape, and where the disk is full.
    """
    entries = list(entries)

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            file.write(_header_of(entries))
            for name, shape, dtype in _laid_out(entries):
                tensor = tensor_of(name).detach().to("cpu", dtype).contiguous()
                if tuple(tensor.shape) != shape:
                    raise TersorError(f"{name} has shape {tuple(tensor.shape)}, not {shape}; please report this.")
                file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)

    written(path, write)


def weights_of(folder: Path) -> Path:
    """The weights file of a folder, or the index of several."""
    return folder / INDEX if (folder / INDEX).exists() else folder / WEIGHTS


def shards_of(entries: Iterable[Entry], most: int | None) -> list[list[Entry]]:
    """The tensors of every weights file: of one, or of several of `most` bytes, unless a tensor alone takes more."""
    if most is None:
        return [list(entries)]
    shards: list[list[Entry]] = [[]]
    size = SHARD_BYTES
    for entry in _laid_out(entries):
        taken = _size(*entry[1:]) + len(_header_of([entry]))
        if shards[-1] and size + taken > most:
            shards.append([])
            size = SHARD_BYTES
        shards[-1].append(entry)
        size += taken
    return shards


def write_weights(
    folder: Path, entries: Iterable[Entry], tensor_of: Callable[[str], Tensor], most: int | None = None
) -> int:
    """Write tensors to `model.safetensors`, or to shards of at most `most` bytes with an index, one tensor at a time.

    Returns the bytes of these files without the index. Raises TersorError as `write_tensors` does.
    """
    shards = shards_of(entries, most)
    names = [SHARD.format(n, len(shards)) for n in range(1, len(shards) + 1)] if len(shards) > 1 else [WEIGHTS]
    for name, shard in zip(names, shards, strict=True):
        write_tensors(folder / name, shard, tensor_of)
    size = sum((folder / name).stat().st_size for name in names)
    if len(shards) > 1:
        places = {entry[0]: name for name, shard in zip(names, shards, strict=True) for entry in shard}
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
        write_text(folder / INDEX, json.dumps(index, indent=2))
    return size


# safetensors lays tensors out by dtype, this order from its end, then by name.
_ORDER = (
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.float16, torch.bfloat16, torch.int32, torch.float32,
    torch.float64, torch.int64,
)  # fmt: skip


def _size(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    size = torch.empty(0, dtype=dtype).element_size()
    for length in shape:
        size *= length
    return size


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors under a temporary name and rename the file when it is whole."""
    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    written(path, lambda temporary: save_file(ready, temporary, {**METADATA, **(metadata or {})}))


def write_text(path: Path, text: str) -> None:
    """Write a text file under a temporary name and rename it when it is whole."""
    written(path, lambda temporary: temporary.write_text(text, encoding="utf8"))


def written(path: Path, write: Callable[[Path], Any]) -> None:
    """Call `write` on a temporary path beside `path` and rename; a failure leaves nothing behind."""
    temporary = temporary_of(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise TersorError(f"{path} could not be written: {error}.") from error
    finally:
        temporary.unlink(missing_ok=True)


def temporary_of(path: Path) -> Path:
    """Where this process writes what is to become `path`, beside it."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


@contextmanager
def staged(folder: Path, last: str) -> Iterator[Path]:
    """A temporary folder beside `folder`, which takes its name when all of its files are whole.

    Where there is such a folder already, the files move there, `last` at the end; weight files that were there before
    and have other names are removed. A failure leaves nothing behind, one between two of those moves the rest of the
    old files with their `last`; one of the disk is raised as a TersorError.
    """
    folder = folder.resolve()
    temporary = temporary_of(folder)
    try:
        _remove_abandoned(folder)
        temporary.mkdir(parents=True)
        yield temporary
        if folder.is_dir() and any(folder.iterdir()):
            _merge(temporary, folder, last)
        else:  # at once, so that no failure leaves some of the files, which would be no artifact to write over
            if folder.is_dir():
                folder.rmdir()
            os.replace(temporary, folder)
    except OSError as error:
        raise TersorError(f"{folder} could not be written: {error}.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _merge(temporary: Path, folder: Path, last: str) -> None:
    """Move the files of one folder to another; the old file of the name `last` stands until all others are there."""
    files = [path for path in temporary.rglob("*") if path.is_file()]
    known = {path.name for path in files}
    stale = [path for path in _weights_in(folder) if path.name not in known]
    for path in sorted(files, key=lambda p: (p.name == last, p)):
        if path.name == last:
            for old in stale:
                old.unlink()
        target = folder / path.relative_to(temporary)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, target)


def _weights_in(folder: Path) -> list[Path]:
    """The weight files in a folder, and their index."""
    return [p for p in folder.glob("model*") if p.name in (WEIGHTS, INDEX) or re.fullmatch(_SHARDED, p.name)]


def _remove_abandoned(folder: Path) -> None:
    """Remove the temporary folders beside `folder` whose processes were killed."""
    for path in folder.parent.glob(f".{glob.escape(folder.name)}.*.tmp"):
        pid = path.name.split(".")[-2]
        if pid.isdigit() and (int(pid) == os.getpid() or not is_alive(int(pid))):
            shutil.rmtree(path, ignore_errors=True)


def is_alive(pid: int) -> bool:
    """Whether a process of this machine runs."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


def copy_beside(source: Path, target: Path) -> None:
    """Copy what goes with a model (tokenizer, pooling, generation config), but no weights and no config."""
    not_copied = ("config.json", "tersor.json", "README.md")
    for path in sorted(source.iterdir()):
        if path.is_dir() and re.fullmatch(r"\d+_\w+", path.name) and (path / "config.json").exists():
            shutil.copytree(path, target / path.name, ignore=_links, dirs_exist_ok=True)
        kept = path.suffix in (".json", ".txt", ".model", ".jinja", ".md") or path.name == "LICENSE"
        if path.is_file() and kept and path.name not in not_copied and not path.name.endswith(".index.json"):
            shutil.copy2(path, target / path.name)


def _links(folder: str, names: list[str]) -> list[str]:
    return [name for name in names if (Path(folder) / name).is_symlink()]
