"""Augmented Lagrangian: general equality and inequality constraints, by an unconstrained solver."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor

from amortized.contract import Context, better, feasibility_tol, take, value_and_grad
from amortized.solvers.base import Optimality, Solution, Solver, Status, Trace, size, tolerance
from amortized.solvers.smooth.lbfgs import LBFGS
from amortized.solvers.structured.kkt import of_constraints


class Multiplied(NamedTuple):
    """A context with the multipliers and the penalty of its row."""

    a: Any
    equal: Tensor
    below: Tensor
    rho: Tensor
    unit: Tensor
    """The objective's size at the start, 1 at most."""


class _Lagrangian:
    """``L + ρ/2 ‖c + λ/ρ‖² + ρ/2 ‖max(0, d + μ/ρ)‖²`` for constraints c = 0 and d ≤ 0."""

    def __init__(self, problem: Any) -> None:
        self.problem = problem

    def constraints(self, b: Tensor, a: Context) -> tuple[Tensor, Tensor]:
        none = b.new_zeros(len(b), 0)
        c = self.problem.equality(b, a) if hasattr(self.problem, "equality") else none
        d = self.problem.inequality(b, a) if hasattr(self.problem, "inequality") else none
        return c, d

    def objective(self, b: Tensor, a: Multiplied) -> Tensor:
        c, d = self.constraints(b, a.a)
        rho = a.rho.unsqueeze(1)
        over = (d + a.below / rho).clamp(min=0)
        squares = ((c + a.equal / rho) ** 2).sum(1) + (over**2).sum(1)
        value: Tensor = self.problem.objective(b, a.a) + a.rho / 2 * squares
        return value


class AugmentedLagrangian(Solver):
    r"""``min L(b; a)`` subject to ``c(b; a) = 0`` and ``d(b; a) ≤ 0``, by unconstrained solves in turn.

    Each minimizes ``L + ρ/2 ‖c + λ/ρ‖² + ρ/2 ‖max(0, d + μ/ρ)‖²`` over b. After it ``λ ← λ + ρ c`` and
    ``μ ← max(0, μ + ρ d)`` in every row, and ρ grows tenfold in rows whose violation fell by less than a factor of 4.
    The problem has ``equality(b, a)``, ``inequality(b, a)`` or both (:class:`~amortized.contract.Constrained`).

    ``residual`` is the larger of the violation ``max(|c|, |max(d, −μ/ρ)|)`` and the gradient norm of the Lagrangian
    over u + ‖∇L‖, with ``u = min(1, max(|L|, ‖∇L‖))`` at the start. A row is finished when it is within ``tol`` and the
    violation within the problem's ``feasibility_tol``. Of its iterates a feasible one is best, then one of small residual:
    objectives of infeasible points mean nothing. Where the problem is not convex the point is a local minimum. Infeasible
    rows end as ``LIMIT``. For quadratic programs use ADMM. ``dual`` is λ and then μ, ``(B, p + m)``.

    Source: Nocedal & Wright (2006), framework 17.3 with (17.55); Birgin & Martínez (2014) for the penalty.

    Args:
        steps: outer rounds at most.
        inner: the solver of each round; None for ``LBFGS(steps=300)``. Its tolerance is set round by round.
        rho: penalty ρ at the start, in units of u.
        tol: residual at which a row is finished; None chooses by dtype, times 10.

    Raises:
        TypeError: from :meth:`solve`, if the problem has neither ``equality`` nor ``inequality``.
        ValueError: if ``rho`` is not positive.
    """

    needs = ("objective", "inequality")  # or equality

    def __init__(
        self, steps: int = 40, inner: Solver | None = None, rho: float = 10.0, tol: float | None = None
    ) -> None:
        super().__init__(steps, tol)
        if rho <= 0:
            raise ValueError(f"rho must be positive, got {rho}")
        self.inner, self.rho = inner or LBFGS(steps=300), rho

    def require(self, problem: Any) -> None:
        """As :meth:`Solver.require`; either kind of constraint will do."""
        if not (hasattr(problem, "equality") or hasattr(problem, "inequality")):
            raise TypeError(
                f"AugmentedLagrangian needs more of a problem than {type(problem).__name__} has: equality or "
                "inequality (see amortized.contract); without constraints use LBFGS."
            )

    def _solve(self, problem: Any, a: Context, b: Tensor, dual: Tensor | None, trace: Trace | None) -> Solution:
        """As :meth:`Solver.solve`, with what is best decided by violation and ``residual``."""
        lagrangian, inner = _Lagrangian(problem), copy.deepcopy(self.inner)
        tol = self.tol if self.tol is not None else 10 * tolerance(None, b.dtype)
        allowed = feasibility_tol(problem)
        c, d = lagrangian.constraints(b, a)
        p, m = c.shape[1], d.shape[1]
        if dual is not None and dual.shape[1] != p + m:
            raise ValueError(
                f"dual must hold {p} + {m} multipliers, of equalities and inequalities; got {dual.shape[1]}"
            )
        dual = b.new_zeros(len(b), p + m) if dual is None else dual.clone()
        value, grad = value_and_grad(problem, b, a)
        unit = size(value, grad.flatten(1).norm(dim=1))
        unit = torch.where(unit > 0, unit, 1)  # an objective that is zero: feasibility alone
        rho = self.rho * unit
        state = Multiplied(a, dual[:, :p], dual[:, p:].clamp(min=0), rho, unit)
        # Little of the penalty: whether the start solves its row is a matter of b and its multipliers alone.
        residual, violation = self._residual(lagrangian, state._replace(rho=1e-3 * rho), b)
        zero = torch.zeros_like(rho, dtype=torch.int64)
        finite = value.isfinite() & residual.isfinite()
        met = (residual <= tol) & (violation <= allowed)
        status = torch.where(finite, torch.where(met, 0, int(Status.LIMIT)), int(Status.DIVERGED))
        best, least = Solution(b.clone(), value, residual, zero, zero + 1, status, dual=dual), violation.clone()
        place = (status == int(Status.LIMIT)).nonzero()[:, 0]
        state, at, violation = take(state, place), b[place], violation[place]
        for k in range(self.steps):
            if not len(place):
                break
            inner.tol = max(tol / 2, 10.0 ** -(k + 1))
            found = inner.solve(lagrangian, state, at)
            at, rho = found.b, state.rho.unsqueeze(1)
            c, d = lagrangian.constraints(at, state.a)
            before = state
            state = Multiplied(state.a, state.equal + rho * c, (state.below + rho * d).clamp(min=0), *state[3:])
            residual, now = self._residual(lagrangian, before, at)
            value = lagrangian.problem.objective(at, state.a)
            finite = value.isfinite() & residual.isfinite() & ~found.diverged
            grown = torch.where(now > 0.25 * violation, 10 * state.rho, state.rho).clamp(max=1e10)
            state, violation = state._replace(rho=grown), now

            wins = finite & better(residual, now, best.residual[place], least[place], allowed)
            to = place[wins]
            best.b[to], best.value[to], best.residual[to] = at[wins], value[wins], residual[wins]
            least[to], dual[to] = now[wins], torch.cat([state.equal, state.below], 1)[wins]
            best.iterations[place] += 1
            best.evaluations[place] += found.evaluations
            met = (residual <= tol) & (now <= allowed)
            ended = torch.where(finite, torch.where(met, 0, int(Status.LIMIT)), int(Status.DIVERGED))
            best.status[place] = ended
            if trace is not None:
                trace(int(best.evaluations.max()), best.b.clone(), best.value.clone())
            going = (ended == int(Status.LIMIT)).nonzero()[:, 0]
            place, state, at, violation = place[going], take(state, going), at[going], violation[going]
        return best

    def optimality(self, problem: Any, a: Context, found: Solution) -> Optimality:
        """As :meth:`Solver.optimality`: the conditions of Karush, Kuhn and Tucker on the active set."""
        assert found.dual is not None
        return of_constraints(problem, a, found.b, found.dual)

    @staticmethod
    def _residual(lagrangian: _Lagrangian, state: Multiplied, b: Tensor) -> tuple[Tensor, Tensor]:
        c, d = lagrangian.constraints(b, state.a)
        off = torch.maximum(d, -state.below / state.rho.unsqueeze(1)).abs()
        violation = torch.cat([c.abs(), off, torch.zeros_like(state.rho).unsqueeze(1)], 1).amax(1)
        _, grad = value_and_grad(lagrangian, b, state)
        _, own = value_and_grad(lagrangian.problem, b, state.a)
        scaled = grad.flatten(1).norm(dim=1) / (state.unit + own.flatten(1).norm(dim=1))
        return torch.maximum(violation, scaled), violation
