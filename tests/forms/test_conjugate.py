"""Conjugate gradients reach the solution in as many steps as there are unknowns, whole or row by row."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tersor.forms.conjugate import conjugate_gradients


@pytest.mark.parametrize("alone", [None, 0])
def test_as_many_steps_as_unknowns_solve_it(alone: int | None, make_moment: Callable[..., Tensor]) -> None:
    moment, target = make_moment(12, spread=0.5), torch.randn(3, 12, dtype=torch.float64)
    start = torch.randn(3, 12, dtype=torch.float64)

    def felt(x: Tensor) -> Tensor:
        return x @ moment

    curvature = moment.diagonal().expand(3, 12)
    found = conjugate_gradients(start, target - felt(start), felt, 40, curvature, alone=alone)
    assert torch.allclose(found, torch.linalg.solve(moment, target.T).T, rtol=1e-5, atol=1e-7)
    assert not torch.allclose(start, found)


def test_the_solution_stays(make_moment: Callable[..., Tensor]) -> None:
    moment = make_moment(5)
    solution = torch.randn(2, 5, dtype=torch.float64)
    assert torch.equal(conjugate_gradients(solution, torch.zeros(2, 5), lambda x: x @ moment, 9), solution)
