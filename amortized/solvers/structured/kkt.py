"""The conditions of Karush, Kuhn and Tucker on an active set: the equations that a constrained solution moves by.

Constraints that are active stay so, others keep a multiplier of zero: where strict complementarity holds that is how solution
and multipliers move with all that the problem sees. Where a constraint is just about to change sides, the derivative is one of
the two sides'.

Source: Fiacco & McCormick (1968), theorem 2.3.2; Amos & Kolter (2017), OptNet, for programs as layers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from amortized.contract import Context, value_and_grad
from amortized.solvers.base import Optimality
from amortized.solvers.engine.rows import times
from amortized.solvers.structured.active_set import on_set, schur, sides


def of_program(problem: Any, a: Context, b: Tensor, dual: Tensor) -> Optimality:
    """``P x + q + Aᵀy = 0`` and ``A_S x = bound_S``, with y zero outside S, of a problem with ``program``.

    Args:
        problem: has ``program(a)``.
        a: contexts.
        b: solutions ``(B, *)``.
        dual: their multipliers ``(B, m)``, those of upper bounds positive.
    """
    n = b[0].numel()
    with torch.no_grad():
        p, _, matrix, lower, upper = (leaf.detach().double() for leaf in problem.program(a))
        if p.ndim == 3 or matrix.ndim == 3:
            p, matrix = (m.expand(len(b), *m.shape[-2:]) for m in (p, matrix))
        s = schur(p, matrix)
        up, low = sides(s, lower, upper, times(matrix, b.flatten(1).double()), dual.double())
        equal = lower >= upper
        active = up | low | equal

    def equations(w: Tensor) -> Tensor:
        p, q, matrix, lower, upper = problem.program(a)
        x, y = w[:, :n], w[:, n:]
        bound = torch.where(equal, (lower + upper) / 2, torch.where(up, upper, lower))
        held = torch.where(active, times(matrix, x) - bound, y)
        return torch.cat([times(p, x) + q + times(matrix.mT, y), held], 1)

    def adjoint(v: Tensor) -> Tensor:
        right = v.double()
        x, y = on_set(s, -right[:, :n], right[:, n:], active, refine=2)
        return torch.cat([x, torch.where(active, y, right[:, n:] - times(s.a, x))], 1).to(v.dtype)

    return Optimality(equations, torch.cat([b.flatten(1), dual], 1), adjoint)


class _Lagrangian:
    """``L + λᵀc + μᵀd`` at given multipliers."""

    def __init__(self, problem: Any, dual: Tensor) -> None:
        self.problem, self.dual = problem, dual

    def objective(self, b: Tensor, a: Context) -> Tensor:
        value: Tensor = self.problem.objective(b, a)
        return value + (self.dual * constraints(self.problem, b, a)[0]).sum(1)


def constraints(problem: Any, b: Tensor, a: Context) -> tuple[Tensor, int]:
    """Equalities and then inequalities ``(B, p + m)``, and p."""
    parts = [getattr(problem, name)(b, a) for name in ("equality", "inequality") if hasattr(problem, name)]
    return torch.cat(parts, 1), parts[0].shape[1] if hasattr(problem, "equality") else 0


def of_constraints(problem: Any, a: Context, b: Tensor, dual: Tensor) -> Optimality:
    """``∇L + ∇cᵀλ + ∇dᵀμ = 0``, ``c = 0`` and ``d_S = 0``, with μ zero outside S, for ``equality`` c and ``inequality`` d.

    Args:
        problem: has ``equality``, ``inequality`` or both.
        a: contexts.
        b: solutions ``(B, *)``.
        dual: λ and then μ, ``(B, p + m)``.
    """
    n = b[0].numel()
    with torch.no_grad():
        at, p = constraints(problem, b, a)
        active = dual > -at
        active[:, :p] = True

    def equations(w: Tensor) -> Tensor:
        x, y = w[:, :n].reshape(b.shape), w[:, n:]
        grad = value_and_grad(_Lagrangian(problem, y), x, a, create_graph=True)[1].flatten(1)
        return torch.cat([grad, torch.where(active, constraints(problem, x, a)[0], y)], 1)

    return Optimality(equations, torch.cat([b.flatten(1), dual], 1))
