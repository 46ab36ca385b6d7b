"""Many starts for problems with many minima."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from amortized.contract import Context, Problem, best_of, feasibility_tol, map_leaves, violation
from amortized.solvers.base import Optimality, Solution, Solver, Status, Trace


class Exploration(NamedTuple):
    """What the starts of each row came to."""

    best: Solution
    """The best of each row's starts; its evaluations are those of all of them."""
    share: Tensor
    """The share of a row's starts that reached the best value ``(B,)``; small: more starts may find better."""
    values: Tensor
    """``(B, starts)``; infinite where a start diverged with nothing to show, or is infeasible while another is not."""


class MultiStart(Solver):
    """The best of several starts of another solver, all run as rows of one batch.

    The first start is the one given, the others are drawn around it with torch's generator, normally distributed. The
    best among those that ended finite wins: the lowest value, with constraints among the feasible. :meth:`explore` says also
    how many starts reached it.

    Args:
        solver: runs from each start.
        starts: K, the starts of each row, the given one among them.
        spread: standard deviation of the others around it, in units of b.
        match: starts whose values lie within this of the best have reached it; relative to the size of the best plus
            that of the largest, 1 at most.

    Raises:
        ValueError: if ``starts`` is less than 1 or ``spread`` is negative.
    """

    def __init__(self, solver: Solver, starts: int = 16, spread: float = 1.0, match: float = 1e-6) -> None:
        nn.Module.__init__(self)  # with no steps and tol of its own
        if starts < 1 or spread < 0:
            raise ValueError(f"starts must be at least 1 and spread not negative, got {starts} and {spread}")
        self.solver, self.starts, self.spread, self.match = solver, starts, spread, match

    @property
    def steps(self) -> int:  # type: ignore[override]
        """Those of the solver."""
        return self.solver.steps

    @property
    def tol(self) -> float | None:  # type: ignore[override]
        """That of the solver."""
        return self.solver.tol

    def require(self, problem: Any) -> None:
        """As :meth:`Solver.require`: what the solver needs."""
        self.solver.require(problem)

    def explore(
        self, problem: Problem, a: Context, b: Tensor, *, dual: Tensor | None = None, trace: Trace | None = None
    ) -> Exploration:
        """The best of all starts, and what became of the others; ``dual`` is that of the start given, all begin with it."""
        with self._prepared(problem, a, b, dual) as (problem, a, b, dual):
            return self._explore(problem, a, b, dual, trace)

    def _solve(self, problem: Problem, a: Context, b: Tensor, dual: Tensor | None, trace: Trace | None) -> Solution:
        """As :meth:`Solver.solve`: the best of all starts."""
        return self._explore(problem, a, b, dual, trace).best

    def _explore(
        self, problem: Problem, a: Context, b: Tensor, dual: Tensor | None, trace: Trace | None
    ) -> Exploration:
        tol = feasibility_tol(problem)
        size, count = len(b), self.starts
        around = b.unsqueeze(1) + self.spread * torch.randn((size, count, *b.shape[1:]), dtype=b.dtype, device=b.device)
        around[:, 0] = b
        many = map_leaves(lambda leaf: leaf.repeat_interleave(count, 0), a)

        def chosen(value: Tensor, off: Tensor) -> Tensor:
            """The number of each row's best start among all."""
            value = torch.where(value.isfinite(), value, torch.inf).view(size, count)
            return best_of(value, off.view(size, count), tol) + count * torch.arange(size, device=b.device)

        def inner(evaluations: int, best: Tensor, value: Tensor) -> None:
            if trace is not None:
                rows = chosen(value, violation(problem, best, many))
                trace(evaluations * count, best[rows], value[rows])

        found = self.solver.solve(
            problem, many, around.flatten(0, 1), dual=None if dual is None else dual.repeat_interleave(count, 0),
            trace=None if trace is None else inner,
        )  # fmt: skip
        rows = chosen(found.value, found.violation)
        best = Solution(*(None if leaf is None else leaf[rows] for leaf in found))  # type: ignore[arg-type]
        best = best._replace(evaluations=found.evaluations.view(size, count).sum(1))
        feasible = (found.violation <= tol).view(size, count)
        comparable = found.value.isfinite().view(size, count) & (feasible | ~feasible.any(1, keepdim=True))
        values = torch.where(comparable, found.value.view(size, count), torch.inf)
        least = torch.where(best.value.isfinite(), best.value, torch.inf)
        unit = values.abs().nan_to_num(posinf=0).amax(1).clamp(max=1) if len(b) else least
        share = (values <= (least + self.match * (unit + least.abs())).unsqueeze(1)).to(b.dtype).mean(1)
        return Exploration(best, torch.where(best.status == int(Status.DIVERGED), 0, share), values)

    def optimality(self, problem: Any, a: Context, found: Solution) -> Optimality:
        """As :meth:`Solver.optimality`: the solver's own."""
        return self.solver.optimality(problem, a, found)
