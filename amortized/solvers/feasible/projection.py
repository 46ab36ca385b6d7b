"""The nearest point of a polyhedron, by ADMM, differentiated where it ends."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from amortized.contract import Context, QuadraticProgram, polyhedron
from amortized.solvers.engine.rows import times
from amortized.solvers.feasible.linear import LinearCorrection
from amortized.solvers.structured.admm import ADMM


class Projection(LinearCorrection):
    r"""``C(b) = argmin_x ½ ‖x − b‖²`` subject to the problem's linear constraints, by :class:`~amortized.solvers.ADMM`.

    Its derivative is that of an exact solution, ``g − A_Sᵀ (A_S A_Sᵀ)⁻¹ A_S g`` with S the active constraints, those with a
    multiplier: it costs one linear system a row, whatever the iterations, and no memory for them. How a projection moves with
    the bounds is left out: contexts are not trained.

    A :class:`~amortized.solvers.Gauge` costs a hundredth of it, where there is an interior point; a projection leaves less for
    the network to learn. For a convex program it costs about as much as solving it.

    Source: Agrawal et al. (2019), *Differentiable convex optimization layers*; as a network's last layer, Grontas et al. (2025),
    *Pinet: optimizing hard-constrained neural networks with orthogonal projection layers*.

    Args:
        steps: iterations of ADMM at most.
        rho: its penalty at the start.
        tol: residual at which ADMM ends a row; None chooses by dtype.
    """

    def __init__(self, steps: int = 2000, rho: float = 1.0, tol: float | None = None) -> None:
        super().__init__()
        self.solver = ADMM(steps, rho, tol=tol)

    def correct(self, problem: Any, a: Context, b: Tensor) -> Tensor:
        problem = _Nearest(problem)
        found = self.solver.solve(problem, Given(a, b.detach()), b.detach())
        if not (torch.is_grad_enabled() and b.requires_grad):
            return found.b
        assert found.dual is not None
        A, lower, upper = polyhedron(problem.problem, a)
        active = (lower == upper) | (found.dual.abs() > 1e-6 * found.dual.abs().amax(1, keepdim=True))
        projected: Tensor = _Projected.apply(b, found.b, A, active)
        return projected


class Given(NamedTuple):
    """A context and the point to project."""

    a: Any
    b: Tensor


class _Nearest:
    """``½ ‖x − b‖²`` over the polyhedron of a problem."""

    def __init__(self, problem: Any) -> None:
        self.problem = problem

    def objective(self, x: Tensor, a: Given) -> Tensor:
        return (x - a.b).flatten(1).square().sum(1) / 2

    def program(self, a: Given) -> QuadraticProgram:
        b = a.b.flatten(1)
        return QuadraticProgram(
            torch.eye(b.shape[1], dtype=b.dtype, device=b.device), -b, *polyhedron(self.problem, a.a)
        )


class _Projected(torch.autograd.Function):
    """The projection itself; backwards, what the active constraints leave of a gradient."""

    @staticmethod
    def forward(ctx: Any, b: Tensor, found: Tensor, A: Tensor, active: Tensor) -> Tensor:
        ctx.save_for_backward(A, active)
        return found.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        A, active = ctx.saved_tensors
        A, s, g = A.double(), active.double(), grad.flatten(1).double()
        gram = s.unsqueeze(2) * (A @ A.mT) * s.unsqueeze(1)
        # Rows that are not active stand for themselves; of dependent ones, the ridge picks the shortest multipliers.
        ridge = 1e-12 * (1 + gram.diagonal(dim1=1, dim2=2).amax(1, keepdim=True))
        gram = gram + torch.diag_embed(torch.where(active, ridge, 1))
        y, info = torch.linalg.solve_ex(gram, (s * times(A, g)).unsqueeze(2))
        left = g - times(A.mT, s * y.squeeze(2))
        return torch.where((info == 0).unsqueeze(1), left, 0).to(grad.dtype).view_as(grad), None, None, None
