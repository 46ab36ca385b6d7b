"""What the maps onto a feasible set share: one differentiable step as a solver."""

from __future__ import annotations

import abc
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from amortized.contract import Context, evaluate, polyhedron
from amortized.solvers.base import Solution, Solver, Status, Trace, tolerance
from amortized.solvers.engine.rows import times


class Correction(Solver):
    """``b ← C(b; a)``, where C moves points to the feasible set, or towards it: a subclass writes :meth:`correct`.

    As ``refine`` it makes a model's predictions feasible, and training goes through it. As a solver it takes one step and says
    what is left: ``residual`` is the largest violation of a row's constraints, in their own units.

    Args:
        tol: violation at which a row has converged; None chooses by dtype.
    """

    def __init__(self, tol: float | None = None) -> None:
        super().__init__(steps=1, tol=tol)

    @abc.abstractmethod
    def correct(self, problem: Any, a: Context, b: Tensor) -> Tensor:
        """``C(b; a)``, in the shape and dtype of ``b`` ``(B, *)``; on its graph where gradients are on."""

    def violation(self, problem: Any, a: Context, b: Tensor) -> Tensor:
        """How far outside each row is ``(B,)``."""
        return violation(problem, b, a)

    def _iterates(self, problem: Any, a: Context, b: Tensor) -> Iterator[Tensor]:
        yield self.correct(problem, a, b) if len(b) else b

    def _solve(self, problem: Any, a: Context, b: Tensor, trace: Trace | None) -> Solution:
        b = self.correct(problem, a, b).detach()
        value, residual = evaluate(problem, b, a), self.violation(problem, a, b)
        if trace is not None:
            trace(1, value)
        ended = torch.where(residual <= tolerance(self.tol, b.dtype), int(Status.CONVERGED), int(Status.LIMIT))
        once = torch.ones_like(ended)
        return Solution(b, value, residual, once, once.clone(), ended)


def violation(problem: Any, b: Tensor, a: Context) -> Tensor:
    """The largest entry by which a row is outside its constraints ``(B,)``."""
    if hasattr(problem, "equality") or hasattr(problem, "inequality"):
        parts = [problem.equality(b, a).abs()] if hasattr(problem, "equality") else []
        parts += [problem.inequality(b, a)] if hasattr(problem, "inequality") else []
        return torch.cat([b.new_zeros(len(b), 1), *parts], 1).amax(1)
    A, lower, upper = polyhedron(problem, a)
    ab = times(A, b.flatten(1))
    return torch.maximum(ab - upper, lower - ab).clamp(min=0).amax(1)
