"""Blocked rounding with feedback equals the plain loop that defines it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tersor.forms.rounding import TILE, Grid, Levels, Prices, round_with_feedback
from tersor.metrics import Side


def steps(scale: Tensor) -> Grid:
    """All multiples of the scales, as far as any weight here reaches."""
    return Grid(scale, torch.full_like(scale, 1e6), 2e6)


def priced(scale: Tensor, generator: torch.Generator) -> Grid:
    """All multiples of the scales, dear ones in one class and cheap ones in the other."""
    table = torch.stack([torch.linspace(0, 3, 40), torch.linspace(0, 0.5, 40)]).double()
    classes = torch.randint(0, 2, scale.shape, generator=generator, dtype=torch.uint8)
    return Grid(scale, torch.zeros_like(scale), 1e6, -1e6, Prices(table, classes))


def nearest_or_cheaper(target: float, scale: float, prices: Tensor | None) -> float:
    code = round(target / scale)
    if prices is None or code == 0 or abs(code) >= len(prices):
        return code * scale
    toward = code - (1 if code > 0 else -1)
    costs = {c: (target / scale - c) ** 2 + float(prices[abs(c)]) for c in (code, toward)}
    return min(costs, key=lambda c: costs[c]) * scale


def by_loop(
    weight: Tensor, scale: Tensor, rows: Tensor | None, columns: Tensor | None, prices: Prices | None = None
) -> Tensor:
    """Entry by entry from the last: the target is the weight plus what `L_o^T E L_i` has there from later entries."""
    n, m = weight.shape
    lower_o = torch.eye(n, dtype=weight.dtype) if rows is None else rows
    lower_i = torch.eye(m, dtype=weight.dtype) if columns is None else columns
    error, rounded = torch.zeros_like(weight), torch.zeros_like(weight)
    for i in range(n - 1, -1, -1):
        for j in range(m - 1, -1, -1):
            target = weight[i, j] + lower_o[i:, i] @ error[i:, j:] @ lower_i[j:, j]
            price = None if prices is None else prices.table[int(prices.classes[i, j])]
            rounded[i, j] = nearest_or_cheaper(float(target), float(scale[i, j]), price)
            error[i, j] = weight[i, j] - rounded[i, j]
    return rounded


def unit_lower(size: int, generator: torch.Generator) -> Tensor:
    lower = torch.randn(size, size, generator=generator, dtype=torch.float64).tril(-1) * 0.5 / size**0.5
    return lower + torch.eye(size, dtype=torch.float64)


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from([(1, 1), (3, 9), (TILE, 5), (5, TILE + 1), (TILE + 3, TILE - 1), (2, 70), (66, 3)]),
    st.booleans(),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_it_equals_the_plain_loop(shape: tuple[int, int], by_rows: bool, by_columns: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator, dtype=torch.float64)
    scale = torch.rand(shape, generator=generator, dtype=torch.float64) + 0.2
    rows = unit_lower(shape[0], generator) if by_rows else None
    columns = unit_lower(shape[1], generator) if by_columns else None
    found = round_with_feedback(weight, steps(scale), rows, columns)
    assert torch.allclose(found, by_loop(weight, scale, rows, columns), rtol=0, atol=1e-9)
    grid = priced(scale, generator)
    found = round_with_feedback(weight, grid, rows, columns)
    exact = by_loop(weight, scale, rows, columns, grid.prices)
    assert torch.equal((found / scale).round(), (exact / scale).round())  # to the last integer


@pytest.mark.parametrize("sides", ["neither", "one", "both"])
def test_a_table_of_integers_is_the_grid(sides: str) -> None:
    generator = torch.Generator().manual_seed(4)
    shape = (TILE + 7, TILE + 5)
    weight = torch.randn(shape, generator=generator, dtype=torch.float64)
    scale = torch.rand(shape, generator=generator, dtype=torch.float64) * 0.2 + 0.2
    rows = unit_lower(shape[0], generator) if sides == "both" else None
    columns = unit_lower(shape[1], generator) if sides != "neither" else None
    grid = Grid(scale, torch.zeros_like(scale), 4.0, -5.0)
    levels = Levels(scale, torch.arange(-5.0, 5.0, dtype=torch.float64))
    found, exact = (round_with_feedback(weight, g, rows, columns) for g in (levels, grid))
    assert torch.allclose(found, exact, rtol=0, atol=1e-9)
    assert torch.equal(levels.codes(found) - 5, grid.codes(exact))


def test_an_uneven_table_takes_the_nearest_of_its_levels() -> None:
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(30, 20, generator=generator, dtype=torch.float64)
    table = torch.tensor([-2.0, -1.9, -0.3, 0.0, 0.01, 0.7, 3.0], dtype=torch.float64)
    lower = unit_lower(20, generator)
    rounded = round_with_feedback(weight, Levels(torch.full_like(weight, 0.5), table), None, lower)
    targets = weight + (weight - rounded) @ lower.tril(-1)
    assert torch.equal(rounded, 0.5 * table[(targets[..., None] / 0.5 - table).abs().argmin(-1)])


def test_values_beyond_the_grid_take_its_ends() -> None:
    weight = torch.tensor([[-9.0, 0.2, 9.0]], dtype=torch.float64)
    grid = Grid(torch.ones_like(weight), torch.ones_like(weight), 3.0)
    columns = torch.eye(3, dtype=torch.float64)
    assert round_with_feedback(weight, grid, None, columns).tolist() == [[-1.0, 0.0, 2.0]]
    assert grid.nearest(weight).tolist() == [[-1.0, 0.0, 2.0]]


@pytest.mark.parametrize("sides", ["neither", "one", "both"])
def test_what_is_left_is_the_rounding_error_of_each_entry(sides: str) -> None:
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(40, 35, generator=generator, dtype=torch.float64)
    rows = unit_lower(40, generator) if sides == "both" else None
    columns = unit_lower(35, generator) if sides != "neither" else None
    scale = torch.full_like(weight, 0.25)
    error = weight - round_with_feedback(weight, steps(scale), rows, columns)
    left = error if rows is None else rows.T @ error
    left = left if columns is None else left @ columns
    assert left.abs().max() <= 0.125 + 1e-9


def test_feedback_from_both_sides_beats_one_beats_none() -> None:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(64, 64, generator=generator, dtype=torch.float64)
    moments = [torch.randn(64, 80, generator=generator, dtype=torch.float64) for _ in range(2)]
    g, a = (m @ m.T / 80 + 1 for m in moments)  # a common direction makes feedback worth while
    (rows, _), (columns, _) = Side(g).unit_lower, Side(a).unit_lower
    scale = torch.full_like(weight, 0.5)
    distances = []
    for pair in ((rows, columns), (None, columns), (None, None)):
        error = weight - round_with_feedback(weight, steps(scale), *pair)
        distances.append(float(torch.trace(g @ error @ a @ error.T)))
    assert distances[0] < distances[1] < distances[2]
