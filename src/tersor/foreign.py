"""Files of strangers: JSON, the headers of safetensors files, and links, checked before anything in them is believed.

Every reader of such a file goes through here. What a header claims is held against the size of its file before any
memory is asked for, and what is refused is a TersorError of one sentence that names the file.
"""

from __future__ import annotations

import json
import math
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tersor.errors import TersorError

LARGEST_JSON = 1 << 26  # bytes of a JSON file or of a header; an index of a million tensors takes as many
DEEPEST = 32  # lists and objects within each other
MOST_DIMENSIONS = 16
SHOWN = 80  # characters of a wrong value that a sentence shows
LISTED = 8  # names that a sentence shows
BITS = {
    "F64": 64, "I64": 64, "U64": 64, "C64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16, "I16": 16,
    "U16": 16, "I8": 8, "U8": 8, "BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip
COUNT, POSITIVE = "a count", "a count above 0"  # patterns of whole numbers below 2^62
NUMBER = "a number"  # a pattern: perhaps infinite, or none
NAMES = {int: "a whole number", float: "a finite number", str: "printable text", bool: "true or false"}
WRONG = (AttributeError, KeyError, IndexError, TypeError, ValueError, ArithmeticError, RuntimeError)


@dataclass(frozen=True)
class Part:
    """A tensor as a header has it: its dtype by name, its shape, and where its bytes begin and end in the data."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class Row(tuple[Any, ...]):
    """A pattern: a list with one value for each of these patterns."""


class _Bad(ValueError):
    """What is wrong with a file, without its name."""


def parse_json(text: str | bytes, what: str) -> Any:
    """The value of a JSON text that is small, shallow, and has no key twice; `what` names it in the error."""
    try:
        return _parsed(text)
    except _Bad as error:
        raise TersorError(f"{what} is not valid JSON: {error}.") from error


def read_json(path: Path) -> Any:
    """The value of a JSON file; raises TersorError, and FileNotFoundError where there is none."""
    try:
        size = _regular(path)
        if size > LARGEST_JSON:
            raise _Bad(f"it takes {size:,} bytes, of {LARGEST_JSON:,} at most")
        return parse_json(path.read_bytes(), str(path))
    except FileNotFoundError:
        raise
    except (_Bad, OSError) as error:
        raise TersorError(f"{path} cannot be read as JSON: {reason_of(error)}.") from error


def _parsed(text: str | bytes) -> Any:
    if len(text) > LARGEST_JSON:
        raise _Bad(f"it takes {len(text):,} bytes, of {LARGEST_JSON:,} at most")
    try:
        text = text.decode("utf8") if isinstance(text, bytes) else text
        value = json.loads(text, object_pairs_hook=_object)
    except RecursionError as error:
        raise _Bad(f"it is more than {DEEPEST} levels deep") from error
    except UnicodeDecodeError as error:
        raise _Bad(f"byte {error.start} is no UTF-8") from error
    except ValueError as error:
        raise _Bad(reason_of(error)) from error
    _check_depth(value)
    if "\\ud" in text or "\\uD" in text:
        try:
            json.dumps(value, ensure_ascii=False).encode("utf8")
        except UnicodeEncodeError as error:
            raise _Bad("it has half of a surrogate pair") from error
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(k for k, _ in pairs if k in seen or seen.add(k))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {_shown(twice)} stands in it twice")
    return found


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(DEEPEST + 1):
        level = [child for parent in level if isinstance(parent, dict | list) for child in _children(parent)]
        if not level:
            return
    raise _Bad(f"it is more than {DEEPEST} levels deep")


def _children(value: dict[str, Any] | list[Any]) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value


def check(value: Any, pattern: Any, file: Path | str, where: str = "") -> Any:
    """`value` itself, if it has the form of `pattern`; raises TersorError, naming the file and the place, where not.

    A pattern is a type (`int`, `float`: finite; `str`: printable), `COUNT`, `POSITIVE`, `NUMBER`, None, `object` for
    anything, a tuple of such, a list of one for lists, a `Row` for lists of so many, `{str: p}` for objects of any
    keys, or an object of patterns by key, of which those that end with `?` may be missing.
    """
    wrong = _mismatch(value, pattern, where)
    if wrong is not None:
        raise TersorError(f"{file} is damaged: {wrong}.")
    return value


def _mismatch(value: Any, pattern: Any, where: str) -> str | None:
    """What is wrong with a value, or None."""
    if isinstance(pattern, Row):
        if not isinstance(value, list | tuple) or len(value) != len(pattern):
            return _is_not(where, value, f"a list of {len(pattern)}")
        parts = enumerate(zip(value, pattern, strict=True))
        return next(filter(None, (_mismatch(v, p, f"{where}.{k}") for k, (v, p) in parts)), None)
    if isinstance(pattern, tuple):
        wrong = [_mismatch(value, one, where) for one in pattern]
        return None if None in wrong else wrong[0]
    if isinstance(pattern, list):
        if not isinstance(value, list | tuple):
            return _is_not(where, value, "a list")
        return next(filter(None, (_mismatch(v, pattern[0], f"{where}.{k}") for k, v in enumerate(value))), None)
    if isinstance(pattern, dict):
        if not isinstance(value, Mapping):
            return _is_not(where, value, "an object")
        return next(filter(None, _mismatches(value, pattern, where)), None)
    return None if _is(value, pattern) else _is_not(where, value, NAMES.get(pattern, str(pattern)))


def _mismatches(value: Mapping[str, Any], pattern: Mapping[Any, Any], where: str) -> Iterator[str | None]:
    if str in pattern:
        for key, one in value.items():
            yield _mismatch(key, str, f"a key of {where or 'it'}") or _mismatch(one, pattern[str], f"{where}.{key}")
        return
    for name, one in pattern.items():
        key = name.removesuffix("?")
        if key in value:
            yield _mismatch(value[key], one, f"{where}.{key}")
        elif key == name:
            yield f"it has no {f'{where}.{key}'.lstrip('.')!r}"


def _is(value: Any, pattern: Any) -> bool:
    if pattern is object or pattern is None:
        return pattern is object or value is None
    if pattern in (COUNT, POSITIVE):
        return type(value) is int and (pattern == POSITIVE) <= value < 1 << 62
    if pattern == NUMBER:
        return type(value) in (int, float)
    if pattern is float:
        return type(value) in (int, float) and abs(value) < 1 << 1000 and math.isfinite(value)
    if pattern is str:
        return isinstance(value, str) and value.isprintable()
    return type(value) is pattern


def _is_not(where: str, value: Any, due: str) -> str:
    return f"{where.lstrip('.') or 'it'} is {_shown(value)}, not {due}"


def _shown(value: Any) -> str:
    text = ascii(value) if not isinstance(value, list | dict) else "an object" if isinstance(value, dict) else "a list"
    return text if len(text) <= SHOWN else text[:SHOWN] + "..."


def read_header(path: Path) -> dict[str, Part]:
    """The tensors of a safetensors file by name, all of which its header and its size bear out.

    Raises TersorError for a file that is truncated, foreign, or claims what it does not hold.
    """
    try:
        size = _regular(path)
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > min(size - 8, LARGEST_JSON):
                raise _Bad(f"it takes {size:,} bytes, which is too few for its header")
            text = file.read(length)
        return _parts(_parsed(text), size - 8 - length)
    except (_Bad, OSError) as error:
        raise TersorError(f"{path} is damaged or no safetensors file: {reason_of(error)}.") from error


def _parts(header: Any, data: int) -> dict[str, Part]:
    """The entries of a header over `data` bytes: in known dtypes, each of the size of its shape, one after another."""
    if not isinstance(header, dict):
        raise _Bad("its header is no object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _Bad("its metadata are no texts by name")
    found = {name: _part(name, entry) for name, entry in header.items()}
    end = 0
    for name, part in sorted(found.items(), key=lambda item: (item[1].start, item[1].stop)):
        if part.start != end:
            how = "overlap with those of another" if part.start < end else "do not follow those of another"
            raise _Bad(f"the bytes of {name} {how}")
        end = part.stop
    if end != data:
        raise _Bad(f"its tensors take {end:,} bytes, but {data:,} follow its header")
    return found


def _part(name: str, entry: Any) -> Part:
    pattern = {"dtype": str, "shape": [COUNT], "data_offsets": [COUNT]}
    wrong = _mismatch(name, str, "the name of a tensor") or _mismatch(entry, pattern, name)
    if wrong is not None:
        raise _Bad(wrong)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if dtype not in BITS:
        raise _Bad(f"{name} has the dtype {_shown(dtype)}, which is none")
    if len(shape) > MOST_DIMENSIONS or len(offsets) != 2 or len(entry) != 3:
        raise _Bad(f"the entry of {name} is none of a tensor")
    bits = BITS[dtype] * math.prod(shape)
    taken = offsets[1] - offsets[0]
    if bits % 8 or taken != bits // 8:
        raise _Bad(f"{name} has {taken:,} bytes, which is not {dtype} of shape {_shown(tuple(shape))}")
    return Part(dtype, tuple(shape), *offsets)


def refuse_links(folder: Path) -> None:
    """Raise TersorError for the first link in a folder, or right below it, that leads out of it.

    Those of a snapshot in the cache of Hugging Face may lead to the blobs beside it.
    """
    try:
        home = folder.resolve()
        allowed = [home, *([home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [])]
        for path in _entries(folder):
            if path.is_symlink() and not any(path.resolve().is_relative_to(place) for place in allowed):
                raise TersorError(f"{path} is a link that leads out of {folder}; put the file itself in its place.")
    except (OSError, RuntimeError) as error:  # a loop of links is a RuntimeError
        raise TersorError(f"{folder} cannot be read: {reason_of(error)}.") from error


def _entries(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        yield path
        if path.is_dir():
            yield from sorted(path.iterdir())


@contextmanager
def understood(file: Path | str, advice: str = "") -> Iterator[None]:
    """What goes wrong inside with values of a file is a TersorError that names it; that memory ran out is not."""
    try:
        yield
    except TersorError:
        raise
    except WRONG as error:
        if "memory" in str(error):
            raise
        raise TersorError(f"{file} is damaged: {reason_of(error)}{advice}.") from error


def _regular(path: Path) -> int:
    """The bytes of a file; a device or a pipe, which might never end, is refused."""
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise _Bad("it is no regular file")
    return found.st_size


def reason_of(error: BaseException) -> str:
    """The first line of an error as part of a sentence."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines: Sequence[str] = str(error).splitlines() or [type(error).__name__]
    text = f"there is no {lines[0]}" if isinstance(error, KeyError) else lines[0]
    return _printable(text[:300]).rstrip(".")


def listed(names: Iterable[str]) -> str:
    """The first few names of a file as part of a sentence."""
    found = [_printable(name[: SHOWN // 2]) for name in names]
    return ", ".join([*found[:LISTED], *(["..."] if len(found) > LISTED else [])]) or "none"


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text)
