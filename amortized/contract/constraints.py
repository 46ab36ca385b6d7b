"""Feasibility: how far a solution is from meeting its constraints, and which of two solutions is the better one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

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
    p: Any = problem
    if not len(b):
        return b.new_zeros(0)
    if _states(p, "equality") or _states(p, "inequality"):
        parts = [p.equality(b, a).abs()] if _states(p, "equality") else []
        parts += [p.inequality(b, a).clamp(min=0)] if _states(p, "inequality") else []
    elif _states(p, "program") or _states(p, "polyhedron"):
        A, lower, upper = polyhedron(p, a)
        x = b.flatten(1)
        ab = x @ A.mT if A.ndim == 2 else torch.bmm(x.unsqueeze(1), A.mT).squeeze(1)
        parts = [torch.maximum(ab - upper, lower - ab).clamp(min=0)]
    elif _states(p, "project"):
        parts = [(b - p.project(b, a)).abs()]
    else:
        return b.new_zeros(len(b))
    return torch.cat([b.new_zeros(len(b), 1), *(part.flatten(1) for part in parts)], 1).amax(1)


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
