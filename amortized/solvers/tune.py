"""Choosing a solver's settings over a stated grid, by one call: a rival must be tuned before it is beaten."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from amortized.contract import Context, Problem, feasibility_tol
from amortized.solvers.base import Solver
from amortized.solvers.smooth.adam import Adam
from amortized.solvers.smooth.gradient_descent import GradientDescent

STEP_SIZES = (1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0)
"""The grid of step sizes, in the units of each solver's ``lr``."""


class Tuned(NamedTuple):
    """The best solver of a grid, and how all of them did."""

    solver: Solver
    gaps: Tensor
    """Mean over rows of each solver's value less the best value any solver found there ``(S,)``."""
    values: Tensor
    """Each solver's value in each row ``(S, B)``."""


def adams(steps: int = 1000) -> list[Adam]:
    """Adam with each of :data:`STEP_SIZES`."""
    return [Adam(steps=steps, lr=lr) for lr in STEP_SIZES]


def descents(steps: int = 1000, momentum: float = 0.9) -> list[GradientDescent]:
    """Gradient descent with momentum, with each of :data:`STEP_SIZES`."""
    return [GradientDescent(steps=steps, lr=lr, momentum=momentum) for lr in STEP_SIZES]


def tune(solvers: Sequence[Solver], problem: Problem, a: Context, b: Tensor) -> Tuned:
    """The solver with the smallest mean gap to the best that any of them found, row by row.

    Rows in which some solver found nothing finite, or nothing feasible, are left to the others: a solver whose value is not
    finite in a row is ranked last. Tune on other contexts than those you report.

    Args:
        solvers: the grid, for instance :func:`adams`.
        problem: anything with ``objective(b, a) -> (B,)``.
        a: contexts, B rows.
        b: where to start ``(B, *)``.

    Raises:
        ValueError: if there are no solvers or no rows.
    """
    if not solvers or not len(b):
        raise ValueError(f"tune needs solvers and rows to try them on, got {len(solvers)} and {len(b)}")
    found = [solver.solve(problem, a, b) for solver in solvers]
    tol = feasibility_tol(problem)
    values = torch.stack([torch.where(one.violation <= tol, one.value, torch.inf) for one in found])
    values = torch.where(values.isfinite(), values, torch.inf)
    best = values.amin(0)
    known = best.isfinite()
    gaps = (values - best)[:, known].mean(1) if bool(known.any()) else torch.full_like(values[:, 0], torch.inf)
    return Tuned(solvers[int(gaps.argmin())], gaps, values)
