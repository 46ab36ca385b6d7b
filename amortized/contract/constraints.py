"""Feasibility: how far a solution is from meeting its constraints, and which of two solutions is the better one."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from amortized.contract.error import ProblemError
from amortized.contract.problem import Problem, polyhedron
from amortized.contract.rows import Context

FEASIBILITY_TOL = 1e-4
"""The violation up to which a solution counts as feasible, where the problem has no ``feasibility_tol`` of its own."""


def constrained(problem: Problem) -> bool:
    """Whether a problem has constraints: ``equality``, ``inequality``, ``program``, ``polyhedron`` or ``project``."""
    return any(_states(problem, name) for name in ("equality", "inequality", "program", "polyhedron", "project"))


def _states(problem: Any, name: str) -> bool:
    """Whether a problem has such a method; a network of a model that happens to be called so is none."""
    return hasattr(problem, name) and not isinstance(getattr(problem, name), nn.Module)


def feasibility_tol(problem: Problem) -> float:
    """The violation up to which a solution counts as feasible, in the constraints' own units: ``problem.feasibility_tol``."""
    return float(getattr(problem, "feasibility_tol", FEASIBILITY_TOL))


def violation(problem: Problem, b: Tensor, a: Context) -> Tensor:
    """How far each row is from meeting its constraints, ``(B,)``, in the constraints' own units; 0 where there are none.

    The largest entry of ``|c(b; a)|`` and ``max(d(b; a), 0)`` where the problem has ``equality`` c or ``inequality`` d; else
    of ``max(A b − upper, lower − A b, 0)`` where it has ``program`` or ``polyhedron``; else of ``|b − project(b)|`` where it
    has that. NaN where a constraint is. Differentiable where the constraints are.
    """
    if not len(b):
        return b.new_zeros(0)
    if any(_states(problem, name) for name in ("equality", "inequality", "program", "polyhedron")):
        off = bounded(problem, b, a).outside
    elif _states(problem, "project"):
        p: Any = problem
        off = (b - p.project(b, a)).abs()
    else:
        return b.new_zeros(len(b))
    return torch.cat([b.new_zeros(len(b), 1), off.flatten(1)], 1).amax(1)


class Bounded(NamedTuple):
    """All constraints of a problem in one form, ``lower ≤ v(b; a) ≤ upper``, each ``(B, m)``."""

    value: Tensor
    """``v``: the problem's ``equality`` and then its ``inequality``, or ``A b`` of its ``polyhedron`` or ``program``."""
    lower: Tensor
    upper: Tensor

    @property
    def outside(self) -> Tensor:
        """How far each is from within its bounds ``(B, m)``; never 0 of bounds that contradict each other."""
        return torch.maximum(self.value - self.upper, self.lower - self.value).clamp(min=0)

    def nearest(self, shift: Tensor | float = 0.0) -> Tensor:
        """What is nearest to ``v + shift`` within the bounds."""
        return torch.maximum(torch.minimum(self.value + shift, self.upper), self.lower)


def bounded(problem: Problem, b: Tensor, a: Context) -> Bounded:
    """The constraints at ``b``, differentiable where they are.

    Multipliers y of this form, ``∇L + (∂v/∂b)ᵀ y = 0``, are those of :class:`~amortized.solvers.ADMM` and of
    :class:`~amortized.solvers.AugmentedLagrangian`: positive where the upper bound holds, negative where the lower one does.

    Raises:
        ProblemError: if the problem has no constraints of these kinds.
    """
    p: Any = problem
    if _states(p, "equality") or _states(p, "inequality"):
        none = b.new_zeros(len(b), 0)
        c = p.equality(b, a).flatten(1) if _states(p, "equality") else none
        d = p.inequality(b, a).flatten(1) if _states(p, "inequality") else none
        value = torch.cat([c, d], 1)
        lower = torch.cat([torch.zeros_like(c), torch.full_like(d, -torch.inf)], 1)
        return Bounded(value, lower, torch.zeros_like(value))
    if _states(p, "program") or _states(p, "polyhedron"):
        A, lower, upper = polyhedron(p, a)
        x = b.flatten(1)
        ab = x @ A.mT if A.ndim == 2 else torch.bmm(x.unsqueeze(1), A.mT).squeeze(1)
        return Bounded(ab, lower, upper)
    raise ProblemError(
        f"{type(problem).__name__} has no constraints: write equality(b, a), inequality(b, a), polyhedron(a) or program(a)"
    )


def feasible_value(problem: Problem, b: Tensor, value: Tensor, a: Context) -> Tensor:
    """``value`` ``(B,)``, the objectives of ``b``, where ``b`` is feasible; infinite elsewhere, as they mean nothing there."""
    if not constrained(problem):
        return value
    with torch.no_grad():
        return torch.where(violation(problem, b, a) <= feasibility_tol(problem), value, torch.inf)


def better(value: Tensor, violation: Tensor, than_value: Tensor, than_violation: Tensor, tol: float) -> Tensor:
    """Where the first of two solutions is the better one, of tensors of any one shape.

    Feasible comes before infeasible; among feasible ones, whose violation is at most ``tol``, the lower value; among
    infeasible ones the smaller violation. What is NaN or infinitely bad, in either, comes last. Of equals neither is better.

    >>> better(torch.tensor(5.0), torch.tensor(0.0), torch.tensor(-9.0), torch.tensor(0.2), tol=1e-4)
    tensor(True)
    """
    level, key = _ranked(value, violation, tol)
    than_level, than_key = _ranked(than_value, than_violation, tol)
    return (level < than_level) | ((level == than_level) & (key < than_key))


def best_of(value: Tensor, violation: Tensor, tol: float) -> Tensor:
    """The place of the best of K solutions ``(..., K)``, by the ranking of :func:`better`: ``(...)``, the first of equals."""
    level, key = _ranked(value, violation, tol)
    return torch.where(level == level.amin(-1, keepdim=True), key, torch.inf).argmin(-1)


def _ranked(value: Tensor, violation: Tensor, tol: float) -> tuple[Tensor, Tensor]:
    """0 for feasible, 1 for infeasible, 2 for what is no solution; and what decides within each."""
    sound = (value < torch.inf) & (violation < torch.inf)  # False of NaN
    level = torch.where(sound, torch.where(violation <= tol, 0, 1), 2)
    key = torch.where(level == 0, value, torch.where(level == 1, violation.to(value), 0))
    return level, key
