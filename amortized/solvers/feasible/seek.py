"""Gauss-Newton on the violation: for constraints of any shape, towards the nearest point that meets them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from amortized.contract import Context, feasibility_tol, polyhedron
from amortized.solvers.engine.rows import times
from amortized.solvers.feasible.correction import Correction
from amortized.solvers.smooth.newton import jacobian


class Seek(Correction):
    r"""``b ← b − Jᵀ (J Jᵀ + μ 1)⁻¹ r``, for ``r = (c, max(d, 0))`` and its Jacobian J: a few steps towards feasibility.

    c are the problem's ``equality`` and d its ``inequality``, or the bounds of its ``polyhedron`` or ``program``. The damping
    ``μ = damping · ‖J‖² ‖r‖² / ‖r_0‖²`` keeps the first steps from running off where constraints bend and goes away with the
    violation, which then falls at a quadratic rate. Constraints broken by less than a thousandth of the problem's
    ``feasibility_tol`` count as met; those that a step newly breaks are seen by the next. Nothing is guaranteed after a fixed
    number of steps: the violation says what is left. Differentiated through its steps with J held fixed: exact for linear
    constraints, and without second derivatives.

    Source: Nocedal & Wright (2006), section 10.3, for the method; as a layer, Liang et al. (2025), *FSNet: feasibility-seeking
    neural network for constrained optimization with guarantees*, which takes L-BFGS for it.

    Args:
        steps: of Gauss-Newton.
        damping: of the first step, relative to the largest squared length of a constraint's gradient; 0 for none.

    Raises:
        TypeError: if the problem has no constraints of these kinds.
    """

    def __init__(self, steps: int = 5, damping: float = 0.1) -> None:
        super().__init__()
        if steps < 1 or damping < 0:
            raise ValueError(f"Seek: steps must be positive and damping not negative, got {steps} and {damping}")
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
        x, met, first = b.flatten(1), 1e-3 * feasibility_tol(problem), None
        for _ in range(self.rounds):
            r, j = self._linear(problem, a, x) if self._is_linear(problem) else self._smooth(problem, a, x, b, graph)
            broken = (r.abs() > met).to(x.dtype)
            r, j = r * broken, j * broken.unsqueeze(2)
            left = r.square().sum(1)
            first = left if first is None else first
            gram, tiny = j @ j.mT, torch.finfo(x.dtype).tiny
            size = gram.diagonal(dim1=1, dim2=2).amax(1)
            damping = self.damping * (left / (first + tiny)).clamp(max=1) + 1e-12
            gram = gram + torch.diag_embed((damping * size + tiny).unsqueeze(1).expand_as(r))
            step, info = torch.linalg.solve_ex(gram, r.unsqueeze(2))
            step = torch.where((info == 0)[:, None, None], step, 0)
            x = x - (j.mT @ step).squeeze(2)
        return x.view_as(b)

    @staticmethod
    def _is_linear(problem: Any) -> bool:
        return not (hasattr(problem, "equality") or hasattr(problem, "inequality"))

    @staticmethod
    def _linear(problem: Any, a: Context, x: Tensor) -> tuple[Tensor, Tensor]:
        """``r``, negative where a lower bound is broken, and A."""
        A, lower, upper = polyhedron(problem, a)
        ax = times(A, x)
        r = (ax - upper).clamp(min=0) - (lower - ax).clamp(min=0)
        return r, A.expand(x.shape[0], *A.shape[-2:])

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
