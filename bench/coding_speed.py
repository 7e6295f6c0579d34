"""How fast integers are coded and rounded, on one core: weights a second, and seconds of a fit.

    python bench/coding_speed.py [--shapes 2048x2048,4096x4096,11008x4096] [--run DIR]

Codes are those of a Gaussian matrix at whole bits a weight, of all sites of BabyLlama's blocks, and of all sites of
every model rounded plainly; each time is the median of five, and every stream must decode to its codes. Fits are of
Gaussian matrices under full moments of correlated features, one thread, one run each.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models import NAMES, reference
from tersor.coding import Coded, code_costs, decode, encode
from tersor.curves.draw import site_metrics
from tersor.forms import CodedForm, CodedSetting
from tersor.forms.lattice import RESOLUTION
from tersor.forms.rounding import Grid, Prices, round_with_feedback
from tersor.metrics import Metric, Side
from tersor.models import walk

RESULTS = Path(__file__).parent / "results"
REPEATS = 5
SIZE = 2048
BITS = (1, 2, 3, 4)
ROUNDED_AT = 3  # bits a weight, about, of the fits
SMALL_STEP = 2.0**-10  # of the sites of BabyLlama: about 2.6 bits a weight


def seconds_of(work: Callable[[], Any], repeats: int) -> tuple[float, Any]:
    """The median seconds of a call and what the last one returned."""
    taken, made = [], None
    for _ in range(repeats):
        start = time.perf_counter()
        made = work()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken), made


def coding_row(name: str, matrices: list[Coded]) -> dict[str, Any]:
    """Weights a second of encoding and of decoding some matrices, one after the other."""
    count = sum(m.codes.size for m in matrices)
    encoding, streams = seconds_of(lambda: [encode(m) for m in matrices], REPEATS)
    decoding, back = seconds_of(lambda: [decode(s) for s in streams], REPEATS)
    assert all(np.array_equal(a.codes, b.codes) for a, b in zip(matrices, back, strict=True))
    bits = 8 * sum(len(s) for s in streams) / count
    return {"name": name, "bits": bits, "encoded_a_second": count / encoding, "decoded_a_second": count / decoding}


def gaussian_codes(bits: int, generator: np.random.Generator) -> Coded:
    """Codes of a Gaussian matrix whose steps lie a factor of 8 apart on either side, at about `bits` a weight."""
    rows, columns = (generator.integers(-6, 7, SIZE) for _ in range(2))
    weight = generator.standard_normal((SIZE, SIZE), dtype=np.float32)
    low, high = -8.0, 4.0  # of the binary logarithm of a step over the deviation of the weights
    for _ in range(16):
        coded = _coded(weight / 2 ** ((low + high) / 2), rows, columns)
        price, classes = code_costs(coded)
        found = price[classes, np.minimum(np.abs(coded.codes), price.shape[1] - 1)].mean()
        low, high = ((low + high) / 2, high) if found > bits else (low, (low + high) / 2)
    return coded


def _coded(weight: np.ndarray[Any, Any], rows: np.ndarray[Any, Any], columns: np.ndarray[Any, Any]) -> Coded:
    step = np.exp2((rows[:, None] + columns) / RESOLUTION)
    return Coded(np.rint(weight / step).astype(np.int32), rows, columns, RESOLUTION)


def site_codes(run: Path) -> list[Coded]:
    """The codes of all sites of BabyLlama's blocks."""
    opened = reference("babyllama").study(run, include=("model.layers.*",), forms=("coded",))
    out = []
    for site in opened.sites:
        (weight,), (metric,) = site.matrices(opened.model.module), site_metrics(opened.run, site)
        operator = CodedForm().fit(weight, metric, CodedSetting(SMALL_STEP))
        out.append(decode(operator.stream.numpy().tobytes()))
    return out


def plain_codes(name: str) -> list[Coded]:
    """The codes of all sites of a model, each rounded to steps of half its root mean square: about three bits."""
    module = reference(name).open().module
    matrices = [m.numpy() for site in walk(module).sites for m in site.matrices(module)]
    still = [(np.zeros(len(m), int), np.zeros(m.shape[1], int)) for m in matrices]
    return [_coded(m / (0.5 * np.sqrt(np.square(m).mean())), *logs) for m, logs in zip(matrices, still, strict=True)]


def moment(size: int, generator: torch.Generator) -> Tensor:
    """A full moment of unit mean diagonal: features of very unlike size, mixed, and a share of noise of their own."""
    mixed = torch.randn(size, size // 4, generator=generator) * torch.logspace(0, -2, size // 4)
    out = mixed @ mixed.T
    out /= out.diagonal().mean()
    out.diagonal().add_(0.1)
    return out


def rounding_row(rows: int, columns: int) -> dict[str, Any]:
    """Seconds of two-sided rounding alone, with prices, and of the whole fit."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator)
    metric = Metric("kronecker", Side(moment(rows, generator)), Side(moment(columns, generator)), 0.5)
    (lower_rows, d_rows), (lower_columns, d_columns) = metric.rows.unit_lower, metric.columns.unit_lower
    factors = (d_rows[:, None] * d_columns * 2 * metric.scale).float()
    step = 12**0.5 * 2.0**-ROUNDED_AT * float(factors.log().mean().div(2).exp())  # a mean rate of about so many bits
    scale = step / factors.sqrt()
    free, classes = torch.zeros(1, 64), torch.zeros(1, 1, dtype=torch.uint8).expand(rows, columns)
    grid = Grid(scale, torch.zeros(()).expand(rows, columns), 2.0**20, -(2.0**20), Prices(free, classes))
    rounding, _ = seconds_of(lambda: round_with_feedback(weight, grid, lower_rows, lower_columns), 1)
    fresh = Metric(metric.kind, Side(metric.rows.moment), Side(metric.columns.moment), metric.scale)
    whole, operator = seconds_of(lambda: CodedForm().fit(weight, fresh, CodedSetting(step)), 1)
    bits = 8 * operator.nbytes / weight.numel()
    return {"name": f"{rows} x {columns}", "bits": bits, "rounding_seconds": rounding, "fit_seconds": whole}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", default="2048x2048,4096x4096,11008x4096")
    parser.add_argument("--run", type=Path, default=None)
    given = parser.parse_args()
    torch.set_num_threads(1)
    generator = np.random.default_rng(0)
    coding, fits = [], []
    encode(_coded(np.ones((2, 2)), np.zeros(2, int), np.zeros(2, int)))  # the tables are made once
    for bits in BITS:
        coding.append(coding_row(f"Gaussian {SIZE} x {SIZE}", [gaussian_codes(bits, generator)]))
        show_coding(coding[-1])
    coding.append(coding_row("all sites of BabyLlama", site_codes(given.run or Path(tempfile.mkdtemp()))))
    show_coding(coding[-1])
    for name in NAMES:
        coding.append(coding_row(f"{name}, plainly", plain_codes(name)))
        show_coding(coding[-1])
    rounding_row(128, 128)  # compiles
    for shape in given.shapes.split(","):
        rows, columns = (int(side) for side in shape.split("x"))
        fits.append(rounding_row(rows, columns))
        row = fits[-1]
        print(
            f"  {row['name']:24} {row['bits']:.2f} bits: rounding {row['rounding_seconds']:.1f} s, "
            f"fit {row['fit_seconds']:.1f} s, {rows * columns / row['fit_seconds']:,.0f} weights a second",
            flush=True,
        )
        RESULTS.mkdir(exist_ok=True)
        target = RESULTS / "coding-speed.json"
        target.write_text(json.dumps({"coding": coding, "fits": fits}, indent=1), encoding="utf8")


def show_coding(row: dict[str, Any]) -> None:
    print(
        f"  {row['name']:24} {row['bits']:.2f} bits: encodes {row['encoded_a_second']:,.0f}, "
        f"decodes {row['decoded_a_second']:,.0f} weights a second",
        flush=True,
    )


if __name__ == "__main__":
    main()
