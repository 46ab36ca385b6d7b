"""Fixed points of a map: damped iteration and Anderson acceleration."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from amortized.contract import Context, FixedPoint
from amortized.solvers.base import Optimality, Solution
from amortized.solvers.engine.rows import Rows, RowSolver


class AndersonState(NamedTuple):
    """The point to apply the map to, and the last m changes of points and of their residuals."""

    b: Tensor
    last: Tensor
    last_residual: Tensor
    points: Tensor
    residuals: Tensor
    iterations: Tensor
    fresh: Tensor
    """Changes since the row last started over ``(L,)``; −1 where there is no last point either."""


class Anderson(RowSolver):
    r"""``b = T(b; a)``, by Anderson acceleration of ``b ← b + β f``, ``f = T(b; a) − b``.

    With ΔX, ΔF the last ``memory`` changes of b and f: ``b ← b + β f − (ΔX + β ΔF) γ``, ``γ = argmin ‖f − ΔF γ‖``. With
    ``memory = 0`` it is the damped iteration itself, which converges where ``(1 − β) + β T`` contracts. A row whose
    residual has grown tenfold over its best starts over from there.

    The problem has ``update(b, a) -> (B, *)`` (:class:`~amortized.contract.FixedPoint`). ``residual`` is ‖f‖, or the error
    that the problem has in its own units, and decides which iterate is best; ``value`` is the problem's objective where it has
    one, else half the square of the residual.

    Source: Walker & Ni (2011); restarts as in Zhang, O'Donoghue & Boyd (2020), simplified.

    Args:
        steps: applications of T after the first, at most; in :meth:`iterates`, the number of iterates.
        memory: m, the changes kept; 0 for the damped iteration.
        damping: β in (0, 1].
        regularization: added to ``ΔFᵀΔF``, relative to its trace.
        tol: residual at which a row is finished; None chooses by dtype.
        chunk: rows at work at a time; None for all.

    Raises:
        TypeError: from :meth:`solve`, if the problem lacks ``update``.
        ValueError: if ``damping`` or ``memory`` is out of range.
    """

    relative = False
    needs = ("update",)

    def __init__(
        self,
        steps: int = 500,
        memory: int = 5,
        damping: float = 1.0,
        regularization: float = 1e-12,
        tol: float | None = None,
        chunk: int | None = None,
    ) -> None:
        super().__init__(steps, tol, chunk)
        if not 0 < damping <= 1 or memory < 0:
            raise ValueError(f"damping must be in (0, 1] and memory not negative, got {damping} and {memory}")
        self.memory, self.damping, self.regularization = memory, damping, regularization

    def _evaluated(self, problem: Any, a: Context, b: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor, Tensor]:
        point = b.reshape(shape)
        moved = problem.update(point, a)
        f = moved.reshape(b.shape) - b
        known = hasattr(problem, "fixed_point_error")
        residual = problem.fixed_point_error(point, moved, a) if known else f.norm(dim=1)
        value = problem.objective(b.reshape(shape), a) if hasattr(problem, "objective") else residual**2 / 2
        return f, residual, value

    def begin(self, problem: FixedPoint, a: Context, b: Tensor) -> Rows:
        """Rows that start at ``b``, with the first damped step."""
        flat = self.layout.flat(b)
        f, residual, value = self._evaluated(problem, a, flat, b.shape)
        changes = flat.new_zeros(len(flat), self.memory, flat.shape[1])
        none = torch.zeros_like(residual, dtype=torch.int32)
        state = AndersonState(flat + self.damping * f, flat, f, changes, changes, none + 1, none)
        return self.enter(flat, value, residual, state, merit=residual)

    def advance(self, problem: FixedPoint, a: Context, rows: Rows, shape: torch.Size) -> Rows:
        """One application of the map to every row, and the mix that follows."""
        state = rows.state
        f, residual, value = self._evaluated(problem, a, state.b, shape)
        ahead, points, residuals, fresh = self._mix(state, f, self.damping, self.regularization)
        over = ((residual > 10 * rows.residual) | ~residual.isfinite()) & (self.memory > 0)
        # Back to the best point, with nothing remembered: its own residual is looked at again.
        back = over.unsqueeze(1)
        state = AndersonState(
            b=torch.where(back, rows.b, ahead),
            last=torch.where(back, rows.b, state.b),
            last_residual=torch.where(back, 0, f),
            points=torch.where(back.unsqueeze(2), 0, points),
            residuals=torch.where(back.unsqueeze(2), 0, residuals),
            iterations=state.iterations + 1,
            fresh=torch.where(over, -1, fresh),
        )
        return self.settle(
            rows, rows.state.b, value, residual, state, state.iterations, merit=residual, recovers=self.memory > 0
        )

    def _mix(
        self, state: AndersonState, f: Tensor, beta: float | Tensor, regularization: float | Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        m = self.memory
        if not m:
            return state.b + beta * f, state.points, state.residuals, state.fresh
        fits = (torch.arange(m, device=f.device) == (state.fresh % m).unsqueeze(1)) & (state.fresh >= 0).unsqueeze(1)
        here = fits.unsqueeze(2)
        points = torch.where(here, (state.b - state.last).unsqueeze(1), state.points)
        residuals = torch.where(here, (f - state.last_residual).unsqueeze(1), state.residuals)
        gram = residuals @ residuals.mT
        ridge = regularization * gram.diagonal(dim1=1, dim2=2).sum(1) + torch.finfo(f.dtype).tiny
        gram = gram + ridge[:, None, None] * torch.eye(m, dtype=f.dtype, device=f.device)
        gamma, _ = torch.linalg.solve_ex(gram, residuals @ f.unsqueeze(2))
        move = (points + beta * residuals).mT @ gamma
        ahead = state.b + beta * f - move.squeeze(2)
        plain = state.b + beta * f
        return torch.where(ahead.isfinite().all(1, keepdim=True), ahead, plain), points, residuals, state.fresh + 1

    def _iterates(self, problem: FixedPoint, a: Context, b: Tensor) -> Iterator[Tensor]:
        """As :meth:`Solver.iterates`: damped iterates, not accelerated."""
        for _ in range(self.steps):
            b = (1 - self.damping) * b + self.damping * problem.update(b, a)
            yield b

    def optimality(self, problem: FixedPoint, a: Context, found: Solution) -> Optimality:
        """As :meth:`Solver.optimality`: ``b − T(b; a) = 0``."""

        def residual(w: Tensor) -> Tensor:
            b = w.view_as(found.b)
            return (b - problem.update(b, a)).flatten(1)

        return Optimality(residual, found.b.flatten(1))


class LearnedAnderson(Anderson):
    r"""Anderson acceleration as a ``refine``: each step has a damping β and a regularization of its own, which learn.

    :meth:`iterates` are the accelerated ones, and differentiable; :meth:`solve` is :class:`Anderson`'s. Over few steps a mix that
    is best for the next one (small regularization) is not the best for the last one, which is what a loss sees.

    Source: Bai, Koltun & Kolter (2022), *Neural deep equilibrium solvers*, where a network predicts the mix; here it is that of
    least squares, in two learned numbers a step.

    Args:
        steps: applications of T; the number of iterates.
        memory: m, the changes kept, at least 1.
        damping: that each step starts from.
        regularization: that each step starts from.
        tol: residual at which a row is finished in :meth:`solve`; None chooses by dtype.
        chunk: rows at work at a time; None for all.

    Raises:
        ValueError: if ``damping``, ``regularization`` or ``memory`` is out of range.
    """

    def __init__(
        self,
        steps: int = 10,
        memory: int = 5,
        damping: float = 1.0,
        regularization: float = 1e-4,
        tol: float | None = None,
        chunk: int | None = None,
    ) -> None:
        super().__init__(steps, memory, damping, regularization, tol, chunk)
        if memory < 1 or regularization <= 0:
            raise ValueError(f"memory and regularization must be positive, got {memory} and {regularization}")
        self.log_damping = nn.Parameter(torch.full((steps,), math.log(damping)))
        self.log_regularization = nn.Parameter(torch.full((steps,), math.log(regularization)))

    def _iterates(self, problem: FixedPoint, a: Context, b: Tensor) -> Iterator[Tensor]:
        """As :meth:`Solver.iterates`, accelerated."""
        state: AndersonState | None = None
        at, none = b.flatten(1), torch.zeros(len(b), dtype=torch.int32, device=b.device)
        changes = at.new_zeros(len(at), self.memory, at.shape[1])
        for beta, regularization in zip(self.log_damping.exp(), self.log_regularization.exp(), strict=True):
            f = problem.update(at.view(b.shape), a).flatten(1) - at
            if state is None:  # nothing to mix with yet
                state = AndersonState(at + beta * f, at, f, changes, changes, none, none)
            else:
                ahead, points, residuals, fresh = self._mix(state, f, beta, regularization)
                state = AndersonState(ahead, at, f, points, residuals, none, fresh)
            at = state.b
            yield at.view(b.shape)
