"""Proximal gradient, plain (ISTA) and accelerated (FISTA), for a smooth objective plus one with a proximal map."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from amortized.contract import Composite, Context, value_and_grad
from amortized.solvers.base import Optimality, Solution, check_value
from amortized.solvers.engine.rows import Rows, RowSolver, over


class FISTAState(NamedTuple):
    """The point to take the gradient at, the last iterate, and how far to extrapolate and to step from it."""

    b: Tensor
    last: Tensor
    momentum: Tensor
    step: Tensor
    iterations: Tensor
    failures: Tensor


class _Smooth:
    """The smooth part of a composite problem, as a problem."""

    def __init__(self, problem: Composite) -> None:
        self.objective = problem.smooth


class FISTA(RowSolver):
    r"""``b ← prox_s(y − s ∇smooth(y))`` with ``y = b + (t_k − 1)/t_{k+1} (b − b_before)``, for ``L = smooth + r``.

    The problem has ``smooth(b, a)`` and ``prox(b, t, a)`` (:class:`~amortized.contract.Composite`). The step s of each
    row starts at an estimate of 1 / curvature and is halved where ``smooth`` exceeds its quadratic bound. Momentum
    starts over in a row that begins to run uphill, which makes it linear on strongly convex rows.

    ``residual`` is ``‖y − prox_s(y − s ∇smooth(y))‖ / s``, zero just at minimizers of convex problems, and the gradient
    norm where r = 0. It is for convex r; smooth parts that are not convex reach stationary points, more safely with
    ``accelerate=False``. An evaluation here is a gradient of ``smooth`` and its value after the step.

    In :meth:`iterates` the step sizes are ``lr``, and with ``learn_lr`` parameters, one for each step: with the prox of
    ℓ1 that is LISTA with learned steps.

    Source: Beck & Teboulle (2009); restarts, O'Donoghue & Candès (2015), gradient scheme.

    Args:
        steps: steps at most, halvings included; in :meth:`iterates`, the number of iterates.
        accelerate: FISTA; otherwise ISTA.
        lr: step size s of the first step, in units of b² per unit of L; None estimates it (:meth:`iterates` needs it).
        learn_lr: in :meth:`iterates`, make the step sizes parameters (their logarithms).
        tol: residual at which a row is finished; None chooses by dtype.
        chunk: rows at work at a time; None for all.

    Raises:
        TypeError: from :meth:`solve`, if the problem lacks ``smooth`` or ``prox``.
        ValueError: if ``lr`` is not positive, or ``learn_lr`` is set without it.
    """

    needs: tuple[str, ...] = ("smooth", "prox")

    def __init__(
        self,
        steps: int = 2000,
        accelerate: bool = True,
        lr: float | None = None,
        learn_lr: bool = False,
        tol: float | None = None,
        chunk: int | None = None,
    ) -> None:
        super().__init__(steps, tol, chunk)
        if (lr is not None and lr <= 0) or (learn_lr and lr is None):
            raise ValueError(f"lr must be positive, and given where learn_lr is set; got lr={lr}")
        self.accelerate, self.lr = accelerate, lr
        self.log_lr = nn.Parameter(torch.full((max(steps, 1),), math.log(lr))) if learn_lr and lr else None

    def composite(self, problem: Composite) -> Composite:
        """The problem in the form ``smooth`` + r."""
        return problem

    def begin(self, problem: Composite, a: Context, b: Tensor) -> Rows:
        """Rows at ``prox(b)``: a start where r is infinite would leave nothing to compare with."""
        problem = self.composite(problem)
        size = torch.ones_like(b.flatten(1)[:, 0])
        step = size * self.lr if self.lr else self._guess(problem, a, b)
        at = torch.where(over(problem.objective(b, a).isfinite(), b), b, problem.prox(b, step, a))
        value = problem.objective(at, a)
        check_value(value, at)
        residual = self._mapping(problem, a, at, step)
        flat, none = self.layout.flat(at), torch.zeros_like(value, dtype=torch.int32)
        state = FISTAState(flat, flat, torch.ones_like(value), step, none, none)
        return self.enter(flat, value, residual, state, evaluations=1 if self.lr else 3)

    def _guess(self, problem: Composite, a: Context, b: Tensor) -> Tensor:
        """1 / curvature along the gradient ``(B,)``."""
        _, grad = value_and_grad(_Smooth(problem), b, a)
        norm = self.layout.dot(self.layout.flat(grad), self.layout.flat(grad)).sqrt()
        reach = 1e-3 * (1 + self.layout.dot(self.layout.flat(b), self.layout.flat(b)).sqrt()) / norm
        _, further = value_and_grad(_Smooth(problem), b - over(reach, b) * grad, a)
        change = self.layout.flat(further - grad)
        step = reach * norm / self.layout.dot(change, change).sqrt()
        return torch.where(step.isfinite() & (step > 0), step, 1.0)

    def _mapping(self, problem: Composite, a: Context, at: Tensor, step: Tensor) -> Tensor:
        _, grad = value_and_grad(_Smooth(problem), at, a)
        ahead = problem.prox(at - over(step, at) * grad, step, a)
        move = self.layout.flat(at - ahead)
        return self.layout.dot(move, move).sqrt() / step

    def advance(self, problem: Composite, a: Context, rows: Rows, shape: torch.Size) -> Rows:
        """One proximal step of every row, or a halving of its step size."""
        problem, state = self.composite(problem), rows.state
        y, at = state.b, state.b.reshape(shape)
        value, grad = value_and_grad(_Smooth(problem), at, a)
        b = problem.prox(at - over(state.step, at) * grad, state.step, a)
        after, objective = problem.smooth(b, a), problem.objective(b, a)
        b, grad = b.reshape(y.shape), self.layout.flat(grad)
        move = b - y
        square = self.layout.dot(move, move)
        slack = 1e-12 if value.dtype == torch.float64 else 1e-5
        bound = value + self.layout.dot(grad, move) + square / (2 * state.step) + slack * value.abs()
        fits = (after <= bound) | (state.failures >= 60)
        residual = square.sqrt() / state.step
        uphill = -self.layout.dot(move, b - state.last) > 0
        momentum = (1 + (1 + 4 * state.momentum**2).sqrt()) / 2
        ahead = ((state.momentum - 1) / momentum * ~uphill if self.accelerate else 0 * momentum).unsqueeze(1)
        wide = fits.unsqueeze(1)
        state = FISTAState(
            b=torch.where(wide, b + ahead * (b - state.last), state.b),
            last=torch.where(wide, b, state.last),
            momentum=torch.where(fits, torch.where(uphill, 1.0, momentum), state.momentum),
            step=torch.where(fits, state.step, state.step / 2),
            iterations=state.iterations + fits,
            failures=torch.where(fits, 0, state.failures + 1),
        )
        wrong = ~fits
        merit = torch.where(wrong, torch.inf, objective)
        return self.settle(
            rows, b, objective, torch.where(wrong, torch.inf, residual), state, state.iterations,
            merit=merit, recovers=True, stalled=~(value.isfinite() & residual.isfinite()) | (state.failures > 60),
        )  # fmt: skip

    def _iterates(self, problem: Composite, a: Context, b: Tensor) -> Iterator[Tensor]:
        """As :meth:`Solver.iterates`: proximal steps of size ``lr``.

        Raises:
            ValueError: if ``lr`` was not given.
        """
        problem = self.composite(problem)
        if self.lr is None:
            raise ValueError(f"{type(self).__name__}.iterates needs a step size: give lr")
        graph, y, t = torch.is_grad_enabled(), b, 1.0
        for k in range(self.steps):
            s = torch.full_like(b.flatten(1)[:, 0], self.lr) if self.log_lr is None else self.log_lr[k].exp()
            s = s.to(b.dtype).expand(len(b))
            _, grad = value_and_grad(_Smooth(problem), y, a, create_graph=graph)
            before, b = b, problem.prox(y - over(s, b) * grad, s, a)
            t, last = (1 + math.sqrt(1 + 4 * t * t)) / 2, t
            y = b + (last - 1) / t * (b - before) if self.accelerate else b
            yield b

    def optimality(self, problem: Any, a: Context, found: Solution) -> Optimality:
        """As :meth:`Solver.optimality`: ``b − prox_s(b − s ∇smooth(b; a)) = 0``, which holds whatever s."""
        problem, b = self.composite(problem), found.b
        with torch.no_grad():
            step = torch.full_like(b.flatten(1)[:, 0], self.lr) if self.lr else self._guess(problem, a, b)

        def residual(w: Tensor) -> Tensor:
            at = w.view_as(b)
            _, grad = value_and_grad(_Smooth(problem), at, a, create_graph=True)
            return (at - problem.prox(at - over(step, at) * grad, step, a)).flatten(1)

        return Optimality(residual, b.flatten(1))
