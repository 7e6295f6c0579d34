"""Reading every kind of data file, and the sentence for every kind of bad one."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from tersor.data import Data, read_data, read_pairs
from tersor.errors import TersorError

TEXTS = ["one line", "another, with a comma", "ünïcode"]


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf8")
    return path


def test_text_files(tmp_path: Path) -> None:
    rows = "".join(json.dumps({"body": t, "label": k, "extra": "x"}) + "\n" for k, t in enumerate(TEXTS))
    csv = 'body,label\n"one line",a\n"another, with a comma",b\nünïcode,a\n'
    assert read_data(write(tmp_path / "a.txt", "\n".join(["", *TEXTS, ""]))).texts == TEXTS
    assert read_data(write(tmp_path / "b.jsonl", "\n".join(map(json.dumps, TEXTS)))).texts == TEXTS
    named = read_data(f"{write(tmp_path / 'c.jsonl', rows)}:body")
    assert named.texts == TEXTS and named.labels is not None and named.labels.tolist() == [0, 1, 2]
    found = read_data(f"{write(tmp_path / 'd.csv', csv)}:body")
    assert found.texts == TEXTS and found.labels is not None and found.labels.tolist() == ["a", "b", "a"]
    assert read_data(f"{tmp_path / 'd.csv'}:1").texts == ["label", "a", "b", "a"]


def test_labels_of_a_csv_are_numbers_where_they_can_be(tmp_path: Path) -> None:
    for values, kind in (("0 2 1", "i"), ("0.5 1 2", "f"), ("0 x 1", "U")):
        rows = "".join(f"t,{v}\n" for v in values.split())
        labels = read_data(f"{write(tmp_path / 'a.csv', 'text,label' + chr(10) + rows)}:text").labels
        assert labels is not None and labels.dtype.kind == kind
        expected = values.split() if kind == "U" else [float(v) for v in values.split()]
        assert labels.tolist() == expected


def test_parquet_and_saved_datasets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    made = datasets.Dataset.from_dict({"text": TEXTS, "label": [1, 0, 1]})
    made.save_to_disk(str(tmp_path / "saved"))
    made.to_parquet(str(tmp_path / "a.parquet"))
    for source in (tmp_path / "saved", tmp_path / "a.parquet"):
        found = read_data(source)
        assert found.texts == TEXTS and found.labels is not None and found.labels.tolist() == [1, 0, 1]


def test_arrays(tmp_path: Path) -> None:
    images, labels = np.random.default_rng(0).integers(0, 255, (4, 8, 8, 3), dtype=np.uint8), np.arange(4)
    np.savez(tmp_path / "a.npz", x=images, y=labels)
    save_file({"images": images, "labels": labels}, tmp_path / "a.safetensors")
    np.save(tmp_path / "a.npy", images)
    for name, labelled in (("a.npz", True), ("a.safetensors", True), ("a.npy", False)):
        found = read_data(tmp_path / name)
        assert found.arrays is not None and np.array_equal(found.arrays, images)
        assert (found.labels is not None) == labelled


def test_a_folder_of_images(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    for kind in ("cat", "dog"):
        (tmp_path / kind).mkdir()
        for number in range(2):
            image.new("RGB", (5, 4), (number, 0, 255)).save(tmp_path / kind / f"{number}.png")
    found = read_data(tmp_path)
    assert found.arrays is not None and found.arrays.shape == (4, 4, 5, 3)
    assert found.labels is not None and found.labels.tolist() == [0, 0, 1, 1]


def test_iterables() -> None:
    assert read_data(iter(TEXTS)).texts == TEXTS  # type: ignore[arg-type]
    batches = [torch.ones(2), torch.zeros(2)]
    assert read_data(batches).batches == batches
    assert read_data(np.ones((3, 2))).arrays is not None  # type: ignore[arg-type]


BAD: dict[str, tuple[Any, str]] = {
    "missing": (None, "does not exist"),
    "empty.txt": ("\n\n", "is empty"),
    "broken.jsonl": ('{"text": "a"}\n{"text": ', "Line 2 of .* is not valid JSON"),
    "two.csv": ("a,b\nx,y\n", "has the columns a, b; name one"),
    "lines.csv": ('"a\nb",c\nx,y\n', r"has the columns a\?b, c; name one"),
    "many.csv": (2 * (",".join("x" * 99 + str(k) for k in range(99)) + "\n"), r"x, \.\.\.; name one"),
    "strange.xyz": ("?", "unknown kind"),
    "broken.npz": ("no archive", "could not be read"),
    "broken.safetensors": ("no tensors", "damaged or no safetensors file"),
    "broken.parquet": ("no table", "could not be read"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_named(name: str, tmp_path: Path) -> None:
    text, named = BAD[name]
    if text is not None:
        write(tmp_path / name, text)
    with pytest.raises(TersorError, match=named) as caught:
        read_data(tmp_path / name)
    assert name in str(caught.value) and str(caught.value).isprintable() and len(str(caught.value)) < 700


def test_an_unknown_column_lists_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(TersorError, match="no column 'c'; its columns are a, b"):
        read_data(f"{write(tmp_path / 'a.csv', 'a,b' + chr(10) + 'x,y')}:c")


@pytest.mark.parametrize("data", [[], iter(()), {"input_ids": [1]}, 7, None])
def test_bad_iterables(data: Any) -> None:
    with pytest.raises(TersorError, match="The data is"):
        read_data(data)


def test_pickled_arrays_are_not_loaded(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.array([{"a": 1}], dtype=object))
    with pytest.raises(TersorError, match=r"a\.npz could not be read"):
        read_data(tmp_path / "a.npz")


def test_what_is_said_of_a_damaged_archive_is_short(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.ones(500))
    content = bytearray((tmp_path / "a.npz").read_bytes())
    content[26:28] = (900).to_bytes(2, "little")  # the length of the name of a file in it
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(TersorError, match=r"a\.npz could not be read") as caught:
        read_data(tmp_path / "a.npz")
    assert str(caught.value).isprintable() and len(str(caught.value)) < 700


def test_pairs(tmp_path: Path) -> None:
    rows = [["a", "b", 1], ["c", "d, e", 2.5], ["f", "g", 0]]
    write(tmp_path / "p.jsonl", "\n".join(map(json.dumps, rows)))
    write(tmp_path / "p.csv", 'a,b,1\nc,"d, e",2.5\nf,g,0\n')
    for name in ("p.jsonl", "p.csv"):
        first, second, scores = read_pairs(tmp_path / name)
        assert (first, second, scores.tolist()) == (["a", "c", "f"], ["b", "d, e", "g"], [1, 2.5, 0])
    for text, named in (("a,b\n", "must hold text, text, score"), ("a,b,1\n", "at least 3")):
        with pytest.raises(TersorError, match=named):
            read_pairs(write(tmp_path / "q.csv", text))
    with pytest.raises(TersorError, match="does not exist"):
        read_pairs(tmp_path / "none.csv")


def test_samples_come_from_anywhere_in_a_sorted_file() -> None:
    data = Data("x", arrays=np.arange(1000), labels=np.arange(1000) // 10)
    few = data.sampled(100, seed=1)
    assert few.arrays is not None and few.labels is not None and len(few) == 100 == len(set(few.arrays.tolist()))
    assert (few.arrays // 10 == few.labels).all() and 300 < few.arrays.mean() < 700
    again, other = data.sampled(100, seed=1), data.sampled(100, seed=2)
    assert np.array_equal(few.arrays, again.arrays) and not np.array_equal(few.arrays, other.arrays)
    texts = Data("x", texts=[str(n) for n in range(1000)], labels=np.arange(1000)).sampled(50, seed=0)
    assert texts.texts is not None and texts.labels is not None and [int(t) for t in texts.texts] == list(texts.labels)
    assert Data("x", batches=[1, 2]).sampled(1, seed=0).batches == [1, 2]


def test_texts_that_follow_each_other_stay_together() -> None:
    words = [f"{n:03d}" for n in range(200)]
    found = Data("x", texts=[*words, "y" * 100]).sampled(1, seed=3, stretch=9).texts
    assert found is not None and sorted("".join(found)) == sorted("".join(words) + "y" * 100)
    assert max(map(len, found)) == 36
    numbers = [int(t) for t in found if t.isdigit()]
    assert numbers != sorted(numbers) and sorted(numbers) == list(range(200))
    follows = [b == a + 1 for a, b in pairwise(numbers)]
    assert 0.6 < sum(follows) / len(follows) < 0.75  # in threes
