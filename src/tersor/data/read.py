"""Data files of the usual kinds as one small value: texts or arrays, with labels where the file has them.

Text: `.txt` (a text a line), `.jsonl`, `.csv`, `.parquet` with a column, a `datasets` folder saved on disk. Arrays:
`.npz`, `.safetensors`, a folder of images. A path may be given with its column as `file.csv:column`.
"""

from __future__ import annotations

import csv
import math
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from tersor.errors import TersorError
from tersor.foreign import listed, parse_json, read_header, reason_of, refuse_links

LARGE, RATIO = 1 << 28, 100  # bytes from which a file may not hold more than so many times what it takes
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")


@dataclass(frozen=True)
class Data:
    """Either `texts` or `arrays` (n, ...), and `labels` (n,) where known; `batches` are used as they are."""

    source: str
    texts: list[str] | None = None
    arrays: np.ndarray | None = None
    labels: np.ndarray | None = None
    batches: list[Any] | None = None

    def __len__(self) -> int:
        for values in (self.texts, self.arrays, self.batches):
            if values is not None:
                return len(values)
        return 0

    def sampled(self, count: int, seed: int, stretch: int = 0) -> Data:
        """`count` rows from anywhere: the first ones of a sorted file stand only for themselves; batches stay.

        With `stretch` all texts are kept, in any order, but those that follow each other stay together until they have
        that many characters, and those of more than four times as many are cut.
        """
        generator = np.random.default_rng(seed)
        if self.arrays is not None:
            order = generator.permutation(len(self.arrays))[:count]
            return replace(self, arrays=self.arrays[order], labels=None if self.labels is None else self.labels[order])
        if self.texts is None:
            return self
        if stretch:
            runs = _stretches(self.texts, stretch)
            return replace(self, texts=[t for i in generator.permutation(len(runs)) for t in runs[i]], labels=None)
        order = generator.permutation(len(self.texts))[:count]
        labels = None if self.labels is None else self.labels[order]
        return replace(self, texts=[self.texts[i] for i in order], labels=labels)


def read_data(source: str | Path | Data | Sequence[Any], column: str | None = None) -> Data:
    """Read `source`; raises TersorError, naming the file, where it is missing, empty or of an unknown kind."""
    if isinstance(source, Data):
        return source
    if isinstance(source, np.ndarray):
        return Data("arrays", arrays=source)
    if not isinstance(source, str | Path):
        if isinstance(source, Mapping) or not isinstance(source, Iterable):
            raise TersorError(f"The data is a {type(source).__name__}; give a file, or an iterable of batches.")
        items = list(source)
        if not items:
            raise TersorError("The data is empty: the iterable of batches yielded nothing.")
        if all(isinstance(item, str) for item in items):
            return Data("texts", texts=items)
        return Data("batches", batches=items)
    path, named = _split_column(str(source))
    column = column or named
    if not path.exists():
        raise TersorError(f"The data file {path} does not exist.")
    try:
        data = _read(path, column)
    except TersorError:
        raise
    except Exception as error:
        raise TersorError(f"The data file {path} could not be read: {reason_of(error)}.") from error
    if not len(data):
        raise TersorError(f"The data file {path} is empty.")
    return data


def read_pairs(source: str | Path) -> tuple[list[str], list[str], np.ndarray]:
    """Pairs of texts with a score: a `.csv` without header, or a `.jsonl` of [text, text, score]."""
    path = Path(source)
    if not path.exists():
        raise TersorError(f"The file of pairs {path} does not exist.")
    try:
        rows = list(_rows(path)) if path.suffix == ".jsonl" else list(_csv(path))
        first, second, scores = [str(r[0]) for r in rows], [str(r[1]) for r in rows], [float(r[2]) for r in rows]
    except (ValueError, IndexError, KeyError, TypeError, OSError, csv.Error) as error:
        reason = reason_of(error)
        raise TersorError(f"The file of pairs {path} must hold text, text, score on every line: {reason}.") from error
    if not all(map(math.isfinite, scores)):
        raise TersorError(f"The file of pairs {path} has a score that is NaN or infinite.")
    if len(rows) < 3:
        raise TersorError(f"The file of pairs {path} has {len(rows)} lines; a rank correlation needs at least 3.")
    return first, second, np.array(scores)


def _stretches(texts: list[str], size: int) -> list[list[str]]:
    """Texts in runs of at least `size` characters, none of them longer than four times that."""
    runs: list[list[str]] = [[]]
    held = 0
    for text in texts:
        for start in range(0, len(text), 4 * size):
            if held >= size:
                runs.append([])
                held = 0
            runs[-1].append(text[start : start + 4 * size])
            held += len(runs[-1][-1])
    return runs


def _split_column(source: str) -> tuple[Path, str | None]:
    path = Path(source)
    if path.exists() or ":" not in source:
        return path, None
    head, column = source.rsplit(":", 1)
    return Path(head), column


def _read(path: Path, column: str | None) -> Data:
    name = str(path)
    if path.is_dir():
        return _read_folder(path, column)
    if not path.is_file():
        raise TersorError(f"The data file {path} is no regular file.")
    suffix = path.suffix.lower()
    if suffix in (".npz", ".npy", ".safetensors"):
        return _read_arrays(path)
    if suffix == ".txt":
        return Data(name, texts=list(_lines(path)))
    if suffix in (".jsonl", ".json"):
        rows = list(_rows(path))
        if all(isinstance(row, str) for row in rows):
            return Data(name, texts=rows)
        strange = next((k for k, row in enumerate(rows, 1) if not isinstance(row, dict)), None)
        if strange is not None:
            raise TersorError(
                f"The data file {path} must hold a text or an object on every line, unlike line {strange}."
            )
        return _from_columns(name, {k: [row.get(k) for row in rows] for k in (rows[0] if rows else {})}, column)
    if suffix == ".csv":
        rows = list(_csv(path))
        number = int(column) if column is not None and column.isdigit() else None
        least = (len(rows[0]) if rows else 0) if number is None else number + 1
        short = next((k for k, row in enumerate(rows, 1) if len(row) < least), None)
        if short is not None:
            raise TersorError(f"The data file {path} has {len(rows[short - 1])} columns in row {short}, not {least}.")
        if number is not None:
            return Data(name, texts=[row[number] for row in rows])
        header, *body = rows or [[]]
        return _from_columns(name, {k: [row[i] for row in body] for i, k in enumerate(header)}, column)
    if suffix == ".parquet":
        import pyarrow.parquet as parquet

        claimed = parquet.read_metadata(path)
        parts = [claimed.row_group(k).total_byte_size for k in range(claimed.num_row_groups)]
        _refuse_bomb(path, max(sum(parts), claimed.num_rows))
        return _from_columns(name, parquet.read_table(path).to_pydict(), column)
    raise TersorError(
        f"The data file {path} is of an unknown kind; Tersor reads .txt, .jsonl, .csv, .parquet, .npz, .safetensors, "
        "a folder of images and a saved `datasets` folder."
    )


def _read_folder(path: Path, column: str | None) -> Data:
    if (path / "dataset_info.json").exists() or (path / "state.json").exists():
        import datasets

        refuse_links(path)
        loaded = datasets.load_from_disk(str(path))
        return _from_columns(str(path), {k: list(loaded[k]) for k in loaded.column_names}, column)
    images = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
    if not images:
        raise TersorError(f"The data folder {path} holds neither images nor a saved dataset.")
    from PIL import Image

    arrays = np.stack([np.asarray(Image.open(p).convert("RGB")) for p in images])
    classes = sorted({p.parent.name for p in images})
    labels = np.array([classes.index(p.parent.name) for p in images]) if len(classes) > 1 else None
    return Data(str(path), arrays=arrays, labels=labels)


def _read_arrays(path: Path) -> Data:
    if path.suffix == ".safetensors":
        from safetensors.numpy import load_file

        read_header(path)
        arrays = dict(load_file(path))
    else:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                _refuse_bomb(path, sum(entry.file_size for entry in archive.infolist()))
        loaded = np.load(path, allow_pickle=False)
        arrays = {"x": loaded} if isinstance(loaded, np.ndarray) else {k: loaded[k] for k in loaded.files}
    labels = next((v for k, v in arrays.items() if k.lower() in ("labels", "label", "y", "targets")), None)
    inputs = [v for v in arrays.values() if v is not labels and v.ndim >= 1]
    if not inputs:
        raise TersorError(f"The data file {path} has no array of inputs.")
    values = max(inputs, key=lambda v: v.size)
    if values.dtype.kind not in "biuf":
        raise TersorError(
            f"The data file {path} has inputs of the kind {listed([str(values.dtype)])}, which are no numbers."
        )
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise TersorError(f"The data file {path} has NaN or infinite entries.")
    return Data(str(path), arrays=values, labels=labels if labels is not None and len(labels) == len(values) else None)


def _from_columns(name: str, columns: dict[str, list[Any]], column: str | None) -> Data:
    if column is None:
        textual = [k for k, v in columns.items() if v and isinstance(v[0], str)]
        if len(textual) != 1:
            raise TersorError(f"{name} has the columns {listed(columns)}; name one as FILE:COLUMN.")
        column = textual[0]
    if column not in columns:
        raise TersorError(f"{name} has no column {column!r}; its columns are {listed(columns)}.")
    label = next((k for k in ("label", "labels") if k in columns and k != column), None)
    kept = [i for i, text in enumerate(columns[column]) if text is not None]
    labels = _numbers([columns[label][i] for i in kept]) if label else None
    return Data(name, texts=[str(columns[column][i]) for i in kept], labels=labels)


def _numbers(values: list[Any]) -> np.ndarray:
    """Labels as numbers where all of them are, as names where not."""
    try:
        numbers = np.array([float(v) for v in values])
    except (TypeError, ValueError):
        return np.array([str(v) for v in values])
    whole = numbers.astype(np.int64)
    return whole if (whole == numbers).all() else numbers


def _refuse_bomb(path: Path, claimed: int) -> None:
    """Raise TersorError for a file that claims to hold far more than it takes, before it is unpacked."""
    if claimed > max(LARGE, RATIO * path.stat().st_size):
        raise TersorError(f"The data file {path} would unpack to {claimed:,} bytes, over {RATIO} times what it takes.")


def _rows(path: Path) -> Iterator[Any]:
    """The values of a file of JSON, a line each."""
    for number, line in enumerate(_lines(path), 1):
        yield parse_json(line, f"Line {number} of {path}")


def _lines(path: Path) -> Iterator[str]:
    with path.open(encoding="utf8") as file:
        for line in file:
            if line.strip():
                yield line.rstrip("\n")


def _csv(path: Path) -> Iterator[list[str]]:
    with path.open(encoding="utf8", newline="") as file:
        yield from (row for row in csv.reader(file) if row)
