"""A primal-dual interior point for nonlinear equalities and inequalities, all rows at once."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from amortized.contract import Context, Problem, feasibility_tol, map_leaves
from amortized.solvers.base import Solution, Trace
from amortized.solvers.engine.rows import Rows, RowSolver
from amortized.solvers.smooth.newton import jacobian
from amortized.solvers.structured.interior_point_program import ProgramInteriorPoint
from amortized.solvers.structured.newton_system import NewtonSystem, newton_system

TO_BOUNDARY = 0.995
"""Of the way to where a slack or a multiplier is zero, what a step may go."""
BACKTRACKS = 10
"""Halvings of a step before it is taken for no step."""
LEAST = 0.05
"""Of the mean product of slack and multiplier, what the next one is to be at least."""
STUCK = 6
"""Rounds without a step that end a row."""


class Point(NamedTuple):
    """Where a row is: ``d(x) + s = 0`` is sought with slacks s > 0, multipliers y of c and z > 0 of d."""

    x: Tensor
    s: Tensor
    y: Tensor
    z: Tensor


class Values(NamedTuple):
    """Of the problem at a point: the objective in units of the row, and the constraints."""

    f: Tensor
    c: Tensor
    d: Tensor


class InteriorPointState(NamedTuple):
    """The point, what the problem is there, and what the last rounds taught."""

    at: Point
    here: Values
    unit: Tensor
    """Of the objective: the largest entry of its gradient at the start ``(L,)``."""
    delta: Tensor
    """The last shift of the Hessian ``(L,)``."""
    ceiling: Tensor
    """The infeasibility that no step may exceed ``(L,)``."""
    floor: Tensor
    """What μ is to be at least, as long as the row is far from meeting its conditions ``(L,)``."""
    stuck: Tensor
    """Rounds in a row without a step ``(L,)``."""
    iterations: Tensor


class InteriorPoint(RowSolver):
    r"""``min L(b; a)`` subject to ``c(b; a) = 0`` and ``d(b; a) ≤ 0``, by Newton steps on perturbed optimality conditions.

    With slacks s > 0 and multipliers y, z > 0 each round takes one Newton step on

        ``∇L + Jᵀy + Dᵀz = 0,  c = 0,  d + s = 0,  s ∘ z = μ``,

    J and D the Jacobians, W the Hessian of the Lagrangian, all exact (n backward passes, with the rows in one batch). Where
    W is not positive definite on what the constraints leave free, it is shifted until it is. The step keeps s and z positive;
    a row takes it, or half of it, and so on, when that lowers the barrier function ``L − μ Σ log s``, the infeasibility, or
    the residual of the equations above. μ follows the mean of ``s ∘ z`` down.

    The problem has ``equality(b, a)``, ``inequality(b, a)`` or both (:class:`~amortized.contract.Constrained`), twice
    differentiable; one with ``program`` is solved as such, by
    :class:`~amortized.solvers.structured.interior_point_program.ProgramInteriorPoint`. It is solved in float64 where it can be
    evaluated so.

    ``residual`` is the largest of the violation; the largest entry of ``∇L + Jᵀy + Dᵀz``, and ``s·z``, both relative to the
    largest entry of ∇L at the start and, where it is above 1, the mean multiplier. Of the iterates a feasible one is best, then
    one of small residual; of infeasible ones that of the smallest violation. ``dual`` is y, then z, ``(B, p + m)``. Where the
    problem is not convex the point is a local minimum. A row without a feasible point ends as ``LIMIT`` once no step is possible.

    Source: Wächter & Biegler (2006), IPOPT, for the shifts and the units; Benson, Vanderbei & Shanno (2002) for the test of a
    step against the last point alone, and LOQO's μ; Wang, Murillo-Sánchez et al. (2007) for power flow without backtracking.

    Args:
        steps: rounds at most; each costs n + p + m backward passes for p equalities and m inequalities.
        tol: residual at which a row is finished; None chooses by dtype.
        chunk: rows at work at a time; None for all.

    Raises:
        TypeError: from :meth:`solve`, if the problem has no constraints that it could take.
    """

    relative = False
    needs = ("objective", "inequality")  # or equality, or program

    def __init__(self, steps: int = 60, tol: float | None = None, chunk: int | None = None) -> None:
        super().__init__(steps, tol, chunk)

    def require(self, problem: Any) -> None:
        """As :meth:`Solver.require`; either kind of constraint will do."""
        if not any(hasattr(problem, name) for name in ("equality", "inequality", "program")):
            raise TypeError(
                f"InteriorPoint needs more of a problem than {type(problem).__name__} has: equality, inequality or program "
                "(see amortized.contract); without constraints use LBFGS."
            )

    def _solve(self, problem: Any, a: Context, b: Tensor, dual: Tensor | None, trace: Trace | None) -> Solution:
        """As :meth:`Solver.solve`, with what is best decided by feasibility and ``residual``."""
        if hasattr(problem, "program"):
            return ProgramInteriorPoint(self.steps, self.tol, self.chunk)._solve(problem, a, b, dual, trace)
        exact, n = _Exact(problem, a, b), b[0].numel()
        a64 = map_leaves(_double, a) if exact.dtype == torch.float64 else a

        def primal(evaluations: int, every: Tensor, value: Tensor) -> None:
            if trace is not None:
                trace(evaluations, every[:, :n].reshape(b.shape).to(b.dtype), value)

        start, watch = torch.cat([b.flatten(1).to(exact.dtype), exact.multipliers(b, dual)], 1), trace and primal
        found = super()._solve(cast(Problem, exact), a64, start, None, watch)
        x = found.b[:, :n].reshape(b.shape).to(b.dtype)
        return found._replace(
            b=x, value=problem.objective(x, a), residual=found.residual.to(b.dtype), dual=found.b[:, n:].to(b.dtype)
        )

    def begin(self, problem: _Exact, a: Context, b: Tensor) -> Rows:
        """Rows at a start ``b`` ``(L, n + p + m)`` of x, y and z; where z is zero it is chosen here."""
        x, y, z = b.split([problem.n, problem.p, problem.m], 1)
        slope, value = problem.slope(x, a)
        unit = slope.abs().amax(1)
        unit = torch.where((unit > 0) & unit.isfinite(), unit, 1)
        here = problem.values(x, a, unit)
        s = torch.where(z > 0, (-here.d).clamp(min=1e-4), (-here.d).clamp(min=0.1))
        z = torch.where(z > 0, (z / unit.unsqueeze(1)).clamp(min=1e-6), 0.1 / s)
        at = Point(x, s, y / unit.unsqueeze(1), z)
        if problem.p:
            grad, J, D, _ = problem.derivatives(at, a, unit)
            at = at._replace(y=_fitted(at.y, grad + _into(D, at.z), J))
        residual, _ = self._residuals(problem, a, at, here, unit, _barrier(at))
        merit = problem.merit(residual, here)
        none = torch.zeros_like(unit, dtype=torch.int32)
        infeasibility = _infeasibility(here, s)
        ceiling = 1e4 * infeasibility.clamp(min=1)
        state = InteriorPointState(at, here, unit, torch.zeros_like(unit), ceiling, _floor(here, s), none, none)
        return self.enter(_joined(at, unit), value, residual, state, merit=merit)

    def advance(self, problem: _Exact, a: Context, rows: Rows, shape: torch.Size) -> Rows:
        """One Newton step of every row, as far as it lowers something."""
        state: InteriorPointState = rows.state
        at, here, unit = state.at, state.here, state.unit
        grad, J, D, W = problem.derivatives(at, a, unit)
        mu = torch.maximum(_barrier(at), state.floor)
        step, delta, slope = self._direction(at, here, grad, J, D, W, mu, state)
        far = _room(at.s, step.s)
        at, here, moved = self._search(problem, a, state, step, slope, mu, far)

        residual, _ = self._residuals(problem, a, at, here, unit, mu)
        merit = problem.merit(residual, here)
        stuck = torch.where(moved, 0, state.stuck + 1)
        state = InteriorPointState(
            at, here, unit, delta, state.ceiling, _floor(here, at.s), stuck, state.iterations + 1
        )
        return self.settle(
            rows, _joined(at, unit), here.f * unit, residual, state, state.iterations,
            merit=merit, stalled=stuck >= STUCK, recovers=True,
        )  # fmt: skip

    def _direction(
        self,
        at: Point,
        here: Values,
        grad: Tensor,
        J: Tensor,
        D: Tensor,
        W: Tensor,
        mu: Tensor,
        state: InteriorPointState,
    ) -> tuple[Point, Tensor, Tensor]:
        """The Newton step, the shift that it took, and the slope of the barrier function along it ``(L,)``."""
        sigma = at.z / at.s
        h = W + D.mT @ (sigma.unsqueeze(2) * D)
        size = (W.flatten(1).norm(dim=1) / W.shape[1] ** 0.5).clamp(min=1e-2)
        # A row that got stuck is shifted, for a shorter step.
        shift = torch.where(state.stuck > 0, 1e-2 * size * 10.0**state.stuck, 0)
        h = h + torch.diag_embed(shift.unsqueeze(1).expand_as(at.x))
        system: NewtonSystem = newton_system(h, J, size, state.delta)
        off, target = here.d + at.s, mu.unsqueeze(1) / at.s
        # ∇L + Jᵀ(y + dy) + Dᵀ(z + dz), with z + dz = μ/s + Σ (d + s + D dx)
        r1 = -(grad + _into(J, at.y) + _into(D, target + sigma * off))
        dx, dy = system.solve(r1, -here.c)
        along = torch.bmm(D, dx.unsqueeze(2)).squeeze(2)
        ds = -off - along
        dz = target - at.z - sigma * ds
        slope = (grad * dx).sum(1) - (target * ds).sum(1)
        bad = ~system.sound.unsqueeze(1)
        step = Point(*(torch.where(bad, 0, part) for part in (dx, ds, dy, dz)))
        return step, torch.where(system.delta > 0, system.delta, state.delta), slope

    def _search(
        self,
        problem: _Exact,
        a: Context,
        state: InteriorPointState,
        step: Point,
        slope: Tensor,
        mu: Tensor,
        far: Tensor,
    ) -> tuple[Point, Values, Tensor]:
        """Each row at the first of its trials, halved in turn, that lowers something; and whether there was one."""
        at, here, unit = state.at, state.here, state.unit
        theta, phi = _infeasibility(here, at.s), _barrier_function(here, at.s, mu)
        _, error = self._residuals(problem, a, at, here, unit, mu)
        eps = 10 * torch.finfo(phi.dtype).eps * (1 + phi.abs())
        alpha, moved = far, torch.zeros_like(far, dtype=torch.bool)
        dual = _room(at.z, step.z).unsqueeze(1)
        best_at, best_here = at, here
        for _ in range(BACKTRACKS):
            wide = alpha.unsqueeze(1)
            x = at.x + wide * step.x
            there = problem.values(x, a, unit)
            # A slack may be no smaller than what the constraint leaves: a free gain.
            s = torch.maximum(at.s + wide * step.s, -there.d)
            trial = Point(x, s, at.y + wide * step.y, at.z + dual * step.z)
            theta_there, phi_there = _infeasibility(there, s), _barrier_function(there, s, mu)
            _, error_there = self._residuals(problem, a, trial, there, unit, mu)
            armijo = phi_there <= phi + 1e-4 * alpha * slope + eps
            closer = theta_there <= (1 - 1e-4 * alpha) * theta
            # Near feasibility a descent direction must descend.
            must = (slope < 0) & (alpha * -slope > theta**1.1) & (theta < 1e-4)
            passes = torch.where(must, armijo, armijo | closer) & (theta_there < state.ceiling)
            passes = passes | (error_there < 0.9 * error)
            passes = passes & phi_there.isfinite() & theta_there.isfinite() & (far > 0) & ~moved
            best_at = Point(
                *(torch.where(passes.unsqueeze(1), new, old) for new, old in zip(trial, best_at, strict=True))
            )
            best_here = Values(*(_where(passes, new, old) for new, old in zip(there, best_here, strict=True)))
            moved = moved | passes
            if bool(moved.all()):
                break
            alpha = alpha / 2
        # Without a step, the multipliers of the constraints as they are.
        return best_at, best_here, moved & ((best_at.x - at.x).abs().amax(1) > 0)

    def _residuals(
        self, problem: _Exact, a: Context, at: Point, here: Values, unit: Tensor, mu: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What a row is finished by ``(L,)``, and the error of the perturbed conditions ``(L,)``."""
        lagrangian = _largest(problem.lagrangian(at, a, unit))
        every = torch.cat([at.y, at.z], 1)
        weight = every.abs().mean(1).clamp(min=1) if every.shape[1] else torch.ones_like(unit)
        products = at.s * at.z
        residual = torch.stack([lagrangian / weight, _violation(here), products.sum(1) / weight]).amax(0)
        off = torch.maximum(_largest(here.c), _largest(here.d + at.s))
        error = torch.stack([lagrangian, off, _largest(products - mu.unsqueeze(1))]).amax(0)
        return residual, error


class _Exact:
    """A problem on rows ``x`` ``(L, n)`` in float64, where its methods can be called so; else in the dtype of its solutions."""

    def __init__(self, problem: Any, a: Context, b: Tensor) -> None:
        self.problem, self.shape, self.n, self.dtype = problem, b.shape[1:], b[0].numel(), torch.float64
        self.allowed = feasibility_tol(problem)
        try:
            c, d = self._constraints(b.double().flatten(1), map_leaves(_double, a))
        except RuntimeError:  # of parts that are float32
            self.dtype = b.dtype
            c, d = self._constraints(b.flatten(1), a)
        self.p, self.m = c.shape[1], d.shape[1]

    def multipliers(self, b: Tensor, dual: Tensor | None) -> Tensor:
        """The dual start ``(L, p + m)``, zeros where there is none."""
        if dual is not None and dual.shape[1] != self.p + self.m:
            raise ValueError(
                f"dual must hold {self.p} + {self.m} multipliers, of equalities and inequalities; got {dual.shape[1]}"
            )
        return b.new_zeros(len(b), self.p + self.m, dtype=self.dtype) if dual is None else dual.to(self.dtype)

    def _constraints(self, x: Tensor, a: Context) -> tuple[Tensor, Tensor]:
        b, none = x.reshape(-1, *self.shape), x.new_zeros(len(x), 0)
        c = self.problem.equality(b, a).flatten(1) if hasattr(self.problem, "equality") else none
        d = self.problem.inequality(b, a).flatten(1) if hasattr(self.problem, "inequality") else none
        return c, d

    def _objective(self, x: Tensor, a: Context) -> Tensor:
        value: Tensor = self.problem.objective(x.reshape(-1, *self.shape), a)
        return value

    def values(self, x: Tensor, a: Context, unit: Tensor) -> Values:
        """The objective in its units, and the constraints."""
        return Values(self._objective(x, a) / unit, *self._constraints(x, a))

    def merit(self, residual: Tensor, here: Values) -> Tensor:
        """What decides which iterate is best: feasible ones by their residual, before others by their violation."""
        off = _violation(here)
        return torch.where(off <= self.allowed, residual / (1 + residual), 1 + off)

    def slope(self, x: Tensor, a: Context) -> tuple[Tensor, Tensor]:
        """The objective's gradient and value."""
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            value = self._objective(x, a)
            (grad,) = torch.autograd.grad(value.sum(), x)
        return grad, value.detach()

    def _lagrangian(self, x: Tensor, at: Point, a: Context, unit: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        f, (c, d) = self._objective(x, a) / unit, self._constraints(x, a)
        return f, c, d, f + (at.y * c).sum(1) + (at.z * d).sum(1)

    def lagrangian(self, at: Point, a: Context, unit: Tensor) -> Tensor:
        """``∇L + Jᵀy + Dᵀz``."""
        with torch.enable_grad():
            x = at.x.detach().requires_grad_()
            (grad,) = torch.autograd.grad(self._lagrangian(x, at, a, unit)[3].sum(), x)
        return grad

    def derivatives(self, at: Point, a: Context, unit: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """∇L, J, D and the Hessian of the Lagrangian."""
        with torch.enable_grad():
            x = at.x.detach().requires_grad_()
            f, c, d, lagrangian = self._lagrangian(x, at, a, unit)
            (grad,) = torch.autograd.grad(f.sum(), x, retain_graph=True)
            J, D = jacobian(c, x), jacobian(d, x)
            (slope,) = torch.autograd.grad(lagrangian.sum(), x, create_graph=True)
            W = jacobian(slope, x)
        return grad, J, D, (W + W.mT) / 2


def _double(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


def _joined(at: Point, unit: Tensor) -> Tensor:
    """x, and the multipliers in the objective's own units."""
    return torch.cat([at.x, unit.unsqueeze(1) * at.y, unit.unsqueeze(1) * at.z], 1)


def _barrier(at: Point) -> Tensor:
    """μ ``(L,)``: a tenth of the mean of s ∘ z, less where all are alike, more where some lag behind."""
    if not at.s.shape[1]:
        return torch.zeros_like(at.x[:, 0])
    products = at.s * at.z
    mean = products.mean(1)
    lag = products.amin(1) / mean.clamp(min=1e-300)
    return (0.1 * (0.05 * (1 - lag) / lag.clamp(min=1e-12)).clamp(max=2) ** 3).clamp(min=LEAST) * mean


def _fitted(y: Tensor, grad: Tensor, J: Tensor) -> Tensor:
    """The y for which ``∇ + Jᵀy`` is least, where none is given and it is not huge."""
    eye = torch.eye(J.shape[2], dtype=J.dtype, device=J.device).expand(len(J), -1, -1)
    system = newton_system(eye, J, torch.ones_like(grad[:, 0]))
    fit = system.solve(-grad, torch.zeros_like(y))[1]
    new = system.sound & (_largest(y) == 0) & (_largest(fit) < 1e3)
    return torch.where(new.unsqueeze(1), fit, y)


def _floor(here: Values, s: Tensor) -> Tensor:
    return 0.01 * torch.maximum(_largest(here.c), _largest(here.d + s)).clamp(max=1)


def _room(x: Tensor, step: Tensor) -> Tensor:
    """How far positive rows can go along a step and stay positive, at most 1 ``(L,)``."""
    if not x.shape[1]:
        return torch.ones(len(x), dtype=x.dtype, device=x.device)
    return (TO_BOUNDARY * x / (-step).clamp(min=1e-300)).amin(1).clamp(max=1)


def _violation(here: Values) -> Tensor:
    return torch.maximum(_largest(here.c), _largest(here.d.clamp(min=0)))


def _infeasibility(here: Values, s: Tensor) -> Tensor:
    return here.c.abs().sum(1) + (here.d + s).abs().sum(1)


def _barrier_function(here: Values, s: Tensor, mu: Tensor) -> Tensor:
    return here.f - mu * s.log().sum(1)


def _largest(x: Tensor) -> Tensor:
    return x.abs().amax(1) if x.shape[1] else torch.zeros_like(x.sum(1))


def _into(matrix: Tensor, multipliers: Tensor) -> Tensor:
    """``Mᵀ y`` of each row."""
    return torch.bmm(multipliers.unsqueeze(1), matrix).squeeze(1)


def _where(rows: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return torch.where(rows if x.ndim == 1 else rows.unsqueeze(1), x, y)
