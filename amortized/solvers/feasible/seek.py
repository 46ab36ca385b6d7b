"""Gauss-Newton on the violation: for constraints of any shape, towards the nearest point that meets them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from amortized.contract import Context, polyhedron
from amortized.solvers.engine.rows import times
from amortized.solvers.feasible.correction import Correction
from amortized.solvers.smooth.newton import jacobian


class Seek(Correction):
    r"""``b ← b − Jᵀ (J Jᵀ + μ 1)⁻¹ r``, for ``r = (c, max(d, 0))`` and its Jacobian J: a few steps towards feasibility.

    c are the problem's ``equality`` and d its ``inequality``, or the bounds of its ``polyhedron`` or ``program``. Steps are the
    shortest that meet the constraints to first order: linear equalities are met in one, smooth ones at a quadratic rate where the
    start is near. Inequalities that a step newly breaks are seen by the next. Nothing is guaranteed after a fixed number of
    steps: the violation says what is left. Differentiated through its steps with J held fixed, which at a point that meets the
    constraints is exact.

    Source: Nocedal & Wright (2006), section 10.3, for the method; as a layer, Liang et al. (2025), *FSNet: feasibility-seeking
    neural network for constrained optimization with guarantees*, which takes L-BFGS for it.

    Args:
        steps: of Gauss-Newton.
        damping: μ, relative to the largest squared length of a constraint's gradient.
        tol: violation at which a row counts as converged; None chooses by dtype.

    Raises:
        TypeError: if the problem has no constraints of these kinds.
    """

    def __init__(self, steps: int = 5, damping: float = 1e-8, tol: float | None = None) -> None:
        super().__init__(tol)
        if steps < 1 or damping <= 0:
            raise ValueError(f"Seek: steps and damping must be positive, got {steps} and {damping}")
        self.rounds, self.damping = steps, damping

    def require(self, problem: Any) -> None:
        """Raises ``TypeError`` unless there is something to meet."""
        if not any(hasattr(problem, name) for name in ("equality", "inequality", "polyhedron", "program")):
            raise TypeError(
                f"Seek needs constraints: {type(problem).__name__} has none of equality, inequality, polyhedron and program "
                "(see amortized.contract)"
            )

    def correct(self, problem: Any, a: Context, b: Tensor) -> Tensor:
        graph = torch.is_grad_enabled() and b.requires_grad
        x = b.flatten(1)
        for _ in range(self.rounds):
            r, j = self._linear(problem, a, x) if self._is_linear(problem) else self._smooth(problem, a, x, b, graph)
            gram = j @ j.mT
            size = gram.diagonal(dim1=1, dim2=2).amax(1) + torch.finfo(x.dtype).tiny
            gram = gram + (self.damping * size)[:, None, None] * torch.eye(r.shape[1], dtype=x.dtype, device=x.device)
            step, info = torch.linalg.solve_ex(gram, r.unsqueeze(2))
            step = torch.where((info == 0)[:, None, None], step, 0)
            x = x - (j.mT @ step).squeeze(2)
        return x.view_as(b)

    @staticmethod
    def _is_linear(problem: Any) -> bool:
        return not (hasattr(problem, "equality") or hasattr(problem, "inequality"))

    @staticmethod
    def _linear(problem: Any, a: Context, x: Tensor) -> tuple[Tensor, Tensor]:
        """``r`` and J of bounds on ``A x``; the signs of both cancel where a lower bound is broken."""
        A, lower, upper = polyhedron(problem, a)
        ax = times(A, x)
        r = (ax - upper).clamp(min=0) - (lower - ax).clamp(min=0)
        return r, (r != 0).to(x.dtype).unsqueeze(2) * A

    @staticmethod
    def _smooth(problem: Any, a: Context, x: Tensor, b: Tensor, graph: bool) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            at = x if graph else x.detach().requires_grad_()
            point = at.view_as(b)
            parts = [problem.equality(point, a)] if hasattr(problem, "equality") else []
            parts += [problem.inequality(point, a).clamp(min=0)] if hasattr(problem, "inequality") else []
            r = torch.cat([part.flatten(1) for part in parts], 1)
            j = jacobian(r, at)
        return (r if graph else r.detach()), j
