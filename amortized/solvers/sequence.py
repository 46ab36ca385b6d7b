"""Solvers one after another, each from where the last one ended."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from amortized.contract import Context, better, feasibility_tol
from amortized.solvers.base import Solution, Solver, Trace
from amortized.solvers.engine.rows import over


class Sequence(Solver):
    r"""``b ← S_k(... S_1(b))``: a few learned steps and then a projection, a completion and then Gauss-Newton, and the like.

    As ``refine`` its iterates are those of every solver in turn. As a solver it gives, row by row, the better of where the last
    one ended and where it began, with the counts of all.

    Args:
        solvers: in the order in which they run.

    Raises:
        ValueError: if there is none.
    """

    def __init__(self, solvers: list[Solver]) -> None:
        if not solvers:
            raise ValueError("Sequence needs at least one solver")
        super().__init__(sum(solver.steps for solver in solvers))
        self.solvers = nn.ModuleList(solvers)

    def require(self, problem: Any) -> None:
        """As every one of its solvers."""
        for solver in self.solvers:
            solver.require(problem)  # type: ignore[operator]

    def _solve(self, problem: Any, a: Context, b: Tensor, dual: Tensor | None, trace: Trace | None) -> Solution:
        found: Solution | None = None
        spent = 0
        for solver in self.solvers:
            start = b if found is None else found.b
            then = (lambda n, x, v, spent=spent: trace(spent + n, x, v)) if trace is not None else None
            ended = solver.solve(problem, a, start, dual=dual, trace=then)  # type: ignore[operator]
            dual = ended.dual if ended.dual is not None else dual
            found = ended if found is None else self._after(problem, found, ended)
            spent = int(found.evaluations.max())
        assert found is not None
        return found

    @staticmethod
    def _after(problem: Any, before: Solution, after: Solution) -> Solution:
        """The later end, with the counts of both; the earlier one where it is better."""
        worse = better(before.value, before.violation, after.value, after.violation, feasibility_tol(problem))
        kept = after._replace(
            b=torch.where(over(worse, after.b), before.b, after.b),
            value=torch.where(worse, before.value, after.value),
            violation=torch.where(worse, before.violation, after.violation),
        )
        return kept._replace(
            iterations=before.iterations + after.iterations, evaluations=before.evaluations + after.evaluations
        )

    def _iterates(self, problem: Any, a: Context, b: Tensor) -> Iterator[Tensor]:
        for solver in self.solvers:
            for point in solver.iterates(problem, a, b):  # type: ignore[operator]
                yield point
                b = point
