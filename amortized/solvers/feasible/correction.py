"""What the maps onto a feasible set share: one differentiable step as a solver."""

from __future__ import annotations

import abc
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from amortized.contract import Context, evaluate, feasibility_tol, violation
from amortized.solvers.base import Solution, Solver, Status, Trace


class Correction(Solver):
    """``b ← C(b; a)``, where C moves points to the feasible set, or towards it: a subclass writes :meth:`correct`.

    As ``refine`` it makes a model's predictions feasible, and training goes through it. As a solver it takes one step and says
    what is left: ``residual`` is the violation, and a row that the problem's ``feasibility_tol`` calls feasible has converged.
    """

    def __init__(self) -> None:
        super().__init__(steps=1)

    @abc.abstractmethod
    def correct(self, problem: Any, a: Context, b: Tensor) -> Tensor:
        """``C(b; a)``, in the shape and dtype of ``b`` ``(B, *)``; on its graph where gradients are on."""

    def _iterates(self, problem: Any, a: Context, b: Tensor) -> Iterator[Tensor]:
        yield self.correct(problem, a, b) if b.shape[0] else b

    def _solve(self, problem: Any, a: Context, b: Tensor, dual: Tensor | None, trace: Trace | None) -> Solution:
        b = self.correct(problem, a, b).detach()
        value, residual = evaluate(problem, b, a), violation(problem, b, a)
        if trace is not None:
            trace(1, b, value)
        ended = torch.where(residual <= feasibility_tol(problem), int(Status.CONVERGED), int(Status.LIMIT))
        once = torch.ones_like(ended)
        return Solution(b, value, residual, once, once.clone(), ended)
