"""Newton's method in a trust region, for few unknowns: every row with its own Hessian and radius."""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import torch
from torch import Tensor

from amortized.contract import Context, Problem
from amortized.solvers.base import check_value
from amortized.solvers.engine.rows import Rows, RowSolver, times

SECULAR = 12
"""Newton steps on the length of the step; they converge in a handful."""


class NewtonState(NamedTuple):
    """The accepted point with its quadratic model, a trial ``b``, and the radius in which the model is trusted."""

    b: Tensor
    point: Tensor
    value: Tensor
    grad: Tensor
    hessian: Tensor
    predicted: Tensor
    radius: Tensor
    iterations: Tensor


class Newton(RowSolver):
    r"""``b ← b + argmin_p gᵀp + ½ pᵀHp`` over ``‖p‖ ≤ Δ``, with the Hessian H and a radius Δ for every row.

    The step comes from the eigenvectors of H, so it is exact where H is indefinite too, and leaves saddle points.
    Few evaluations (one or two on quadratics), but each costs n backward passes and an eigendecomposition, n³:
    for up to some 30 unknowns and objectives that are dear. Objectives must be twice differentiable; where H is
    wrong (kinks) the radius shrinks and the row ends as ``LIMIT``.

    Source: Moré & Sorensen (1983); Nocedal & Wright (2006), algorithms 4.1 and 4.3.

    Args:
        steps: evaluations after the first, at most; each is a value, a gradient and a Hessian.
        radius: Δ at the start, in units of b.
        tol: gradient norm at which a row is finished; None chooses by dtype.
        chunk: rows at work at a time; None for all.
    """

    def __init__(
        self, steps: int = 500, radius: float = 1.0, tol: float | None = None, chunk: int | None = None
    ) -> None:
        super().__init__(steps, tol, chunk)
        if radius <= 0:
            raise ValueError(f"radius must be positive, got {radius}")
        self.radius = radius

    def model(self, problem: Problem, b: Tensor, a: Context) -> tuple[Tensor, Tensor, Tensor]:
        """Value ``(L,)``, gradient ``(L, n)`` and Hessian ``(L, n, n)`` at ``b`` ``(L, *)``."""
        with torch.enable_grad():
            flat = b.detach().flatten(1).requires_grad_()
            value = problem.objective(flat.view(b.shape), a)
            (grad,) = torch.autograd.grad(value.sum(), flat, create_graph=True)
            hessian = jacobian(grad, flat)
        return value.detach(), grad.detach(), (hessian + hessian.mT) / 2

    def begin(self, problem: Problem, a: Context, b: Tensor) -> Rows:
        """Rows that start at ``b`` ``(L, *)``, with their models there."""
        value, grad, hessian = self.model(problem, b, a)
        check_value(value, b)
        flat, radius = self.layout.flat(b), torch.full_like(value, self.radius)
        p, predicted = step_within(grad, hessian, radius)
        none = torch.zeros_like(value, dtype=torch.int32)
        state = NewtonState(flat + p, flat, value, grad, hessian, predicted, radius, none)
        return self.enter(flat, value, grad.norm(dim=1), state)

    def advance(self, problem: Problem, a: Context, rows: Rows, shape: torch.Size) -> Rows:
        """The model at the trial of every row: accept it or not, fit the radius, and try the next."""
        b, point, value0, grad0, hessian0, predicted, radius, iterations = rows.state
        value, grad, hessian = self.model(problem, b.reshape(shape), a)
        residual, residual0 = grad.norm(dim=1), grad0.norm(dim=1)
        finite = value.isfinite() & residual.isfinite() & hessian.flatten(1).isfinite().all(1)
        gain = value0 - value
        ratio = torch.where(finite, gain / predicted, -1)
        # Below rounding the values say nothing: a smaller gradient then is success.
        noise = torch.finfo(value.dtype).eps ** (2 / 3) * value0.abs()
        quiet = finite & (predicted <= noise) & (gain >= -noise) & (residual < residual0)
        ratio = torch.where(quiet, 1.0, ratio)
        accepted = ratio > 1e-4
        length = (b - point).norm(dim=1)
        grown = torch.where((ratio > 0.75) & (length > 0.8 * radius), 2 * radius, radius)
        radius = torch.where(ratio < 0.25, 0.25 * torch.minimum(length, radius), grown)

        to = accepted.unsqueeze(1)
        point, grad0 = torch.where(to, b, point), torch.where(to, grad, grad0)
        hessian0 = torch.where(to.unsqueeze(2), hessian, hessian0)
        iterations = iterations + accepted
        p, predicted = step_within(grad0, hessian0, radius)
        state = NewtonState(
            point + p, point, torch.where(accepted, value, value0), grad0, hessian0, predicted, radius, iterations
        )
        stalled = radius <= torch.finfo(value.dtype).eps * (1e-3 + point.norm(dim=1))
        return self.settle(rows, b, value, residual, state, iterations, stalled=stalled, recovers=True)


def jacobian(y: Tensor, x: Tensor) -> Tensor:
    """``∂y/∂x`` ``(L, m, n)`` for rows ``y`` ``(L, m)`` that each depend on their own row of ``x`` ``(L, n)``."""
    if not y.requires_grad:
        return y.new_zeros(*y.shape, x.shape[1])
    m = y.shape[1]
    unit = torch.eye(m, dtype=y.dtype, device=y.device).unsqueeze(1).expand(m, *y.shape)
    rows = None
    if isinstance(y.shape[0], int):  # batched, the free batch size of a graph that is exported would become a number
        with contextlib.suppress(RuntimeError):  # an operation that cannot be batched over
            (rows,) = torch.autograd.grad(y, x, unit, is_grads_batched=True, retain_graph=True)
    if rows is None:
        rows = torch.stack([torch.autograd.grad(y, x, one, retain_graph=True)[0] for one in unit])
    return rows.detach().movedim(0, 1)


def step_within(grad: Tensor, hessian: Tensor, radius: Tensor) -> tuple[Tensor, Tensor]:
    """``p = argmin gᵀp + ½ pᵀHp`` over ``‖p‖ ≤ radius`` for each row, and the decrease that the model predicts."""
    n, tiny = grad.shape[1], torch.finfo(grad.dtype).tiny
    usable = hessian.flatten(1).isfinite().all(1) & grad.isfinite().all(1)
    hessian = torch.where(usable[:, None, None], hessian, torch.eye(n, dtype=grad.dtype, device=grad.device))
    grad = torch.where(usable.unsqueeze(1), grad, 0)
    curvatures, vectors = torch.linalg.eigh(hessian)
    g = times(vectors.mT, grad)
    largest = curvatures.abs().amax(1).clamp(min=tiny)
    lowest = curvatures[:, 0]
    floor = torch.finfo(grad.dtype).eps * largest
    shift = torch.where(lowest > floor, 0.0, floor - lowest)
    for _ in range(SECULAR):
        damped = curvatures + shift.unsqueeze(1)
        p = g / damped
        square = (p * p).sum(1)
        length = square.sqrt()
        slope = (p * p / damped).sum(1)
        more = square / slope * (length - radius) / radius
        shift = torch.where((length > radius) & more.isfinite(), shift + more, shift)
    p = -g / (curvatures + shift.unsqueeze(1))
    length = p.norm(dim=1)
    p = p * (radius / length).clamp(max=1).nan_to_num(1.0).unsqueeze(1)
    # The hard case: g is orthogonal to the direction of most negative curvature, which then leads the rest of the way.
    short = (radius**2 - (p * p).sum(1)).clamp(min=0).sqrt()
    along = torch.where(p[:, 0] < 0, -short, short)
    p[:, 0] += torch.where((lowest < -floor) & (length < 0.99 * radius), along, 0)
    predicted = -(g * p).sum(1) - 0.5 * (curvatures * p * p).sum(1)
    return times(vectors, p), predicted
