"""The form `codebook`: vectors of a few neighbouring weights of a row, each the sum of entries of small codebooks.

Weights are divided by a scale a row and a column; codebooks are learned by k-means under the metric, perhaps in fewer
dimensions with a projection (P152 LR2VQ), or are the shells of the lattice E8, which need not be stored. Codes are
chosen with two-sided feedback; entries and codes are then improved in turn (the V and P steps of P424 PV-Tuning, here
on the distance of one weight).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from tersor.errors import TersorError
from tersor.forms import e8
from tersor.forms.base import Candidate, RowOperator, Shape, bits_of, cost_of, fitted_candidate, from_bits
from tersor.forms.codebook_fit import Book, Scaled, lattice_codes, learned_codes
from tersor.forms.packing import PLANES, pack, packed_width, unpack
from tersor.metrics import Metric

CODE_BITS = (*(b for b in PLANES if b > 1), 9, 10, 11, 12)
OCTAVES = 16.0  # codes of scales to an octave


@dataclass(frozen=True)
class CodebookSetting:
    """`bits` of the code of every stage, for vectors of `length`; `dims` fewer dimensions in which entries are kept.

    With `rounds` above 0 entries are refitted to the codes that were chosen, and both are improved so many times more.
    With `lattice` the codebooks are points of E8, for vectors of eight.
    """

    bits: tuple[int, ...]
    length: int = 8
    dims: int | None = None
    lattice: bool = False
    rounds: int = 2

    def __post_init__(self) -> None:
        allowed = tuple(e8.RADII) if self.lattice else CODE_BITS
        if not self.bits or any(b not in allowed for b in self.bits):
            raise TersorError(f"codebook: bits is {list(self.bits)!r}, but must be a list of any of {allowed}.")
        if self.length < 1 or (self.lattice and self.length != e8.DIMENSIONS):
            raise TersorError(f"codebook: length is {self.length}, but must be at least 1, and 8 with lattice.")
        if self.dims is not None and (self.lattice or not 1 <= self.dims < self.length):
            raise TersorError(f"codebook: dims is {self.dims}, but must be below the length, and null with lattice.")
        if self.rounds < 0:
            raise TersorError(f"codebook: rounds is {self.rounds}, but must be at least 0.")

    @property
    def label(self) -> str:
        name = "e8" if self.lattice else f"codebook {self.length}" + ("" if self.dims is None else f" in {self.dims}")
        return f"{name} " + "+".join(map(str, self.bits))


class CodebookOperator(RowOperator):
    """Packed codes (rows, bytes), logarithms of scales, and either entries with their projection or steps."""

    setting: CodebookSetting
    codes: Tensor
    row_logs: Tensor
    column_logs: Tensor
    tops: Tensor
    positions: Tensor
    exact: Tensor
    entries: Tensor
    projection: Tensor
    steps: Tensor

    def __init__(self, shape: Shape, setting: CodebookSetting) -> None:
        super().__init__(shape, setting)
        width = sum(packed_width(self.vectors, part) for b in setting.bits for part in _parts(b))
        self.register_buffer("codes", torch.zeros(shape[0], width, dtype=torch.uint8))
        self.register_buffer("row_logs", torch.zeros(shape[0], dtype=torch.uint8))
        self.register_buffer("column_logs", torch.zeros(shape[1], dtype=torch.uint8))
        self.register_buffer("tops", torch.zeros(2, dtype=torch.int32))
        self.register_buffer("positions", torch.arange(exact_entries(shape), dtype=torch.int32))
        self.register_buffer("exact", torch.zeros(exact_entries(shape), dtype=torch.int16))
        if setting.lattice:
            self.register_buffer("steps", torch.zeros(len(setting.bits), dtype=torch.int32))
            return
        dims = setting.dims or setting.length
        self.register_buffer("entries", torch.zeros(sum(2**b for b in setting.bits), dims, dtype=torch.int16))
        if setting.dims is not None:
            self.register_buffer("projection", torch.zeros(dims, setting.length, dtype=torch.int16))

    @property
    def vectors(self) -> int:
        """Vectors in a row; the last may reach beyond it."""
        return -(-self.shape[1] // self.setting.length)

    def keep_exact(self, weight: Tensor, metric: Metric) -> Tensor:
        """Store the entries that matter most in 16 bits; returns the weight with zeros in their places."""
        matters = torch.outer(metric.rows.diagonal, metric.columns.diagonal).to(weight) * weight.square()
        positions = matters.flatten().topk(len(self.positions)).indices.sort().values
        self.positions, self.exact = positions.int(), bits_of(weight.flatten()[positions])
        return weight.flatten().index_fill(0, positions, 0.0).view_as(weight)

    def set_scales(self, rows: Tensor, columns: Tensor) -> None:
        """Store scales (rows,) and (columns,) as eight-bit logarithms below the largest."""
        logs = [side.double().clamp_min(1e-30).log2() for side in (rows, columns)]
        tops = torch.stack([side.max() for side in logs]).float()
        self.tops = tops.view(torch.int32)
        self.row_logs, self.column_logs = (
            ((top - side) * OCTAVES).round().clamp(0, 255).to(torch.uint8) for top, side in zip(tops, logs, strict=True)
        )

    def scales(self) -> tuple[Tensor, Tensor]:
        """The scales of rows and of columns, float32."""
        tops = self.tops.view(torch.float32)
        rows, columns = (
            torch.exp2(top - side.float() / OCTAVES)
            for top, side in zip(tops, (self.row_logs, self.column_logs), strict=True)
        )
        return rows, columns

    def set_codes(self, numbers: Tensor) -> None:
        """Pack the numbers (rows, vectors, stages) of entries."""
        parts = []
        for stage, bits in enumerate(self.setting.bits):
            rest = numbers[..., stage].int()
            for part in _parts(bits):
                parts.append(pack(rest & (2**part - 1), part))
                rest = rest >> part
        self.codes = torch.cat(parts, 1)

    def numbers(self, index: Tensor | None) -> list[Tensor]:
        """The numbers (rows, vectors) of the entries of every stage, of all rows or those at `index`."""
        codes = self.codes if index is None else self.codes[index]
        found, start = [], 0
        for bits in self.setting.bits:
            total, shift = torch.zeros(len(codes), self.vectors, dtype=torch.int32, device=codes.device), 0
            for part in _parts(bits):
                width = packed_width(self.vectors, part)
                total |= unpack(codes[:, start : start + width], part, self.vectors).int() << shift
                start, shift = start + width, shift + part
            found.append(total)
        return found

    def books(self) -> list[Tensor]:
        """The entries (2^bits, length) of every stage, float32."""
        if self.setting.lattice:
            steps = self.steps.view(torch.float32)
            return [
                step * lattice(bits, self.codes.device) for step, bits in zip(steps, self.setting.bits, strict=True)
            ]
        entries = from_bits(self.entries)
        if self.setting.dims is not None:
            entries = entries @ from_bits(self.projection)
        return list(entries.split([2**b for b in self.setting.bits]))

    def decode_rows(self, index: Tensor | None) -> Tensor:
        stages = zip(self.numbers(index), self.books(), strict=True)
        values = sum(functional.embedding(numbers, book) for numbers, book in stages)
        assert isinstance(values, Tensor)
        rows, columns = self.scales()
        rows = rows if index is None else rows[index]
        found = values.flatten(1)[:, : self.shape[1]] * columns * rows[:, None]
        at, of = self.positions // self.shape[1], torch.arange(len(self.positions), device=found.device)
        if index is not None:
            at, of = (index[:, None] == at).nonzero().unbind(1)
        found[at, self.positions[of] % self.shape[1]] = from_bits(self.exact)[of]
        return found


LATTICES = ((12,), (14,), (16,), (16, 8), (16, 12), (16, 16))
LEARNED = (*(CodebookSetting((8,) * stages) for stages in (1, 2, 3, 4)), CodebookSetting((10,), 4))


class CodebookForm:
    """Vector quantisation, learned or by a lattice."""

    name = "codebook"
    stores = "numbers of vectors in small tables, or of points of E8"
    wins = "resident, below three bits; decoded by a look-up"

    def settings(self, shape: Shape) -> Iterable[CodebookSetting]:
        """The lattice from 1.5 bits, and learned codes where their entries are few beside the weights."""
        for bits in LATTICES:
            yield CodebookSetting(bits, lattice=True)
        for setting in LEARNED:
            entries = 16 * setting.length * sum(2**b for b in setting.bits)
            if entries < 0.15 * shape[0] * shape[1] * sum(setting.bits) / setting.length:
                yield setting

    def setting(self, values: Mapping[str, Any]) -> CodebookSetting:
        return CodebookSetting(**{**values, "bits": tuple(values["bits"])})

    def probe(self, shape: Shape, curve: Sequence[Candidate]) -> CodebookSetting:
        return CodebookSetting((16, 8), lattice=True)

    def empty(self, shape: Shape, setting: CodebookSetting) -> CodebookOperator:
        return CodebookOperator(shape, setting)

    def curve(
        self, weight: Tensor, metric: Metric, settings: Iterable[CodebookSetting] | None = None
    ) -> list[Candidate]:
        """Tables are drawn from some of their rows."""
        shape: Shape = (weight.shape[0], weight.shape[1])
        rows = metric.sampled_rows()
        if rows is not None:
            weight, metric = weight[rows[0]], metric.of_rows(*rows)
        return [
            replace(fitted_candidate(self, weight, metric, setting)[1], cost=cost_of(self, shape, setting))
            for setting in (self.settings(shape) if settings is None else settings)
        ]

    def fit(self, weight: Tensor, metric: Metric, setting: CodebookSetting) -> CodebookOperator:
        """The best iterate of codes chosen with feedback and entries refitted to them."""
        weight = weight.detach().float().cpu()
        operator = CodebookOperator((weight.shape[0], weight.shape[1]), setting)
        rest = operator.keep_exact(weight, metric)
        operator.set_scales(*_even(rest))
        scaled = Scaled.of(rest, metric, *operator.scales(), setting.length)
        best = float("inf")
        if setting.lattice:
            iterates = lattice_codes(scaled, setting.bits)
        else:
            iterates = learned_codes(scaled, setting.bits, setting.dims, setting.rounds)
        for codes, book in iterates:
            operator_now = CodebookOperator(operator.shape, setting)
            operator_now.load_state_dict(operator.state_dict())
            _store(operator_now, codes, book)
            distance = metric.distance(weight - operator_now.dense())
            if distance < best:
                best, chosen = distance, operator_now
        return chosen


def _store(operator: CodebookOperator, codes: Tensor, book: Book) -> None:
    operator.set_codes(codes)
    if book.steps is not None:
        operator.steps = book.steps.float().view(torch.int32)
        return
    operator.entries = bits_of(book.entries)
    if book.projection is not None:
        operator.projection = bits_of(book.projection)


def exact_entries(shape: Shape) -> int:
    """How many entries of a weight are kept as they are."""
    return min(shape[0] * shape[1], 4 + shape[0] * shape[1] // 2**15)


def _parts(bits: int) -> tuple[int, ...]:
    """The bits that are packed together: eight at the most."""
    return (bits,) if bits <= 8 else (8, bits - 8)


def _even(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Scales of rows and columns that leave every row and column with about the same mean square."""
    rows, columns = torch.ones(weight.shape[0]), torch.ones(weight.shape[1])
    for _ in range(3):
        columns = (weight / rows[:, None]).square().mean(0).sqrt().clamp_min(1e-30)
        rows = (weight / columns).square().mean(1).sqrt().clamp_min(1e-30)
    return rows, columns


@cache
def lattice(bits: int, device: torch.device) -> Tensor:
    """The points (2^bits, 8) of a codebook of E8, float32; numbers beyond them mean zero."""
    found = np.zeros((2**bits, e8.DIMENSIONS), np.float32)
    points = e8.points(bits)
    found[: len(points)] = points * np.float32(0.5)
    return torch.from_numpy(found).to(device)
