"""ADMM for quadratic programs: OSQP's splitting, for all rows at once, each with its own penalty."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from amortized.problem import Context, QuadraticProgram
from amortized.solvers.base import Solution, Trace, ordinary
from amortized.solvers.rows import Rows, RowSolver, times

RELAXATION = 1.6
EQUALITY = 1e3
"""How much larger the penalty of equalities is, as in OSQP."""


class Split(NamedTuple):
    """The iterate: x in the factor's coordinates, z = A b kept within its bounds, and the dual y."""

    v: Tensor
    z: Tensor
    y: Tensor
    rho: Tensor
    iterations: Tensor
    program: Any
    """What of the program is each row's own."""
    factor: Any
    """The factor, where matrices are each row's own; else :class:`Nothing`."""


class Factor(NamedTuple):
    """``K`` with ``Kᵀ (P + σ 1) K = 1`` and ``Kᵀ Aᵀ W A K = diag(s)``: it serves every ρ, each row its own.

    ``W`` weighs equalities more. With it ``(P + σ 1 + ρ AᵀWA)⁻¹ = K diag(1 / (1 + ρ s)) Kᵀ``.
    """

    k: Tensor
    s: Tensor
    ak: Tensor
    pk: Tensor
    gram: Tensor
    """``σ KᵀK``; zero where P alone can be factored."""
    a: Tensor
    weight: Tensor


class Nothing(NamedTuple):
    """In place of a factor of each row's own, where all rows share one."""


class Vectors(NamedTuple):
    """The vectors of a program, each row's own."""

    q: Tensor
    lower: Tensor
    upper: Tensor
    kq: Tensor
    """``Kᵀq``."""


class Certificate(NamedTuple):
    """How good a primal and dual pair is, all ``(B,)``."""

    primal: Tensor
    """``max(A b − upper, lower − A b, 0)``, largest entry."""
    dual: Tensor
    """``|P b + q + Aᵀ y|``, largest entry."""
    gap: Tensor
    """``|bᵀ P b + qᵀ b + upperᵀ y₊ + lowerᵀ y₋|``: value less dual value."""


class ADMM(RowSolver):
    r"""``min ½ bᵀPb + qᵀb`` subject to ``lower ≤ A b ≤ upper``, by the alternating directions of OSQP.

    A matrix shared by all rows is factored once for all, in a form that serves every penalty ρ, so each row adapts its
    own at no cost; matrices of each row's own are factored in a batch. The problem has ``program(a)``
    (:class:`~amortized.problem.Quadratic`) and its ``objective`` is the quadratic. Equal bounds in all rows mean an
    equality; infinite bounds are free.

    ``residual`` is the larger of ``‖A b − z‖∞``, with z within the bounds, and ``‖P b + q + Aᵀy‖∞``; it decides which
    iterate is best (objectives of infeasible points mean nothing) and when a row is finished. :meth:`solve_with_duals`
    returns y as well, and :meth:`certify` the residuals and the duality gap. An infeasible row ends as ``LIMIT``.

    Linear convergence, fast to 1e-6; not a way to machine precision. Badly scaled programs should be scaled first.

    Source: Stellato et al. (2020), OSQP, algorithm 1 and (13); the factor by simultaneous diagonalization is ours.

    Args:
        steps: iterations at most.
        rho: penalty ρ at the start.
        check: iterations between looks at the residuals, when ρ adapts too.
        tol: residual at which a row is finished; None chooses by dtype.
        chunk: rows at work at a time; None for all.

    Raises:
        TypeError: from :meth:`solve`, if the problem lacks ``program``.
        ValueError: if ``rho`` or ``check`` is not positive.
    """

    relative = False
    needs = ("program",)

    def __init__(
        self,
        steps: int = 5000,
        rho: float = 0.1,
        check: int = 10,
        tol: float | None = None,
        chunk: int | None = None,
    ) -> None:
        super().__init__(-(-steps // max(check, 1)), tol, chunk)
        if rho <= 0 or check < 1:
            raise ValueError(f"rho and check must be positive, got {rho} and {check}")
        self.rho, self.check = rho, check

    def _solve(self, problem: Any, a: Context, b: Tensor, trace: Trace | None) -> Solution:
        """As :meth:`Solver.solve`, with what is best decided by ``residual``."""
        return self._solve_both(problem, a, b, None, trace)[0]

    def solve_with_duals(
        self, problem: Any, a: Context, b: Tensor, y: Tensor | None = None, *, trace: Trace | None = None
    ) -> tuple[Solution, Tensor]:
        """The solution and its dual ``y`` ``(B, m)``, from a start ``b`` and, if there is one, a dual start."""
        with self._prepared(problem, a, b) as (problem, a, b):
            return self._solve_both(problem, a, b, y, trace)

    def _solve_both(
        self, problem: Any, a: Context, b: Tensor, y: Tensor | None, trace: Trace | None
    ) -> tuple[Solution, Tensor]:
        flat, program = b.flatten(1), problem.program(a)
        y = torch.zeros_like(program.lower) if y is None else ordinary(y)
        both = torch.cat([flat, y.to(flat.dtype)], 1)
        programs: Any = _Programs(problem, program, b.shape[1:], trace is not None)
        found = super()._solve(programs, a, both, trace)
        n = flat.shape[1]
        x, y = found.b[:, :n].reshape(b.shape), found.b[:, n:]
        found = found._replace(value=problem.objective(x, a))
        # A bound that is not there has no force; what is left there is rounding.
        absent = torch.where(y > 0, program.upper, program.lower).isinf()
        return found._replace(b=x), torch.where(absent, 0, y)

    def certify(self, problem: Any, a: Context, b: Tensor, y: Tensor) -> Certificate:
        """The residuals and the duality gap of a primal and dual pair."""
        program, b = problem.program(a), b.flatten(1)
        ab, pb = times(program.A, b), times(program.P, b)
        outside = torch.maximum(ab - program.upper, program.lower - ab).clamp(min=0)
        bound = torch.where(y > 0, program.upper, program.lower)
        support = torch.where(y == 0, 0, y * bound).sum(1)
        gap = ((b * pb).sum(1) + (program.q * b).sum(1) + support).abs()
        return Certificate(outside.amax(1), (pb + program.q + times(program.A.mT, y)).abs().amax(1), gap)

    def begin(self, problem: Any, a: Context, b: Tensor) -> Rows:
        """Rows at a primal and dual start."""
        vectors, factor, own = problem.of(a)
        n = vectors.q.shape[1]
        x, y = b[:, :n], b[:, n:]
        v = times(factor.k.mT, times(problem.matrix(a), x) + problem.sigma * x)
        z = torch.clamp(times(factor.ak, v), vectors.lower, vectors.upper)
        one = torch.ones_like(v[:, 0])
        state = Split(v, z, y, self.rho * one, torch.zeros_like(one, dtype=torch.int32), vectors, own)
        primal, dual, _ = _residuals(factor, state)
        residual = torch.maximum(primal, dual)
        return self.enter(b, problem.value(x, a), residual, state, merit=residual)

    def advance(self, problem: Any, a: Context, rows: Rows, shape: torch.Size) -> Rows:
        """As many iterations as there are between two looks, and a look."""
        state = rows.state
        factor = state.factor if isinstance(state.factor, Factor) else problem.shared
        v, z, y, rho, iterations, (_, lower, upper, kq), _ = state
        weight = factor.weight * rho.unsqueeze(1)
        light, inverse = 1 / weight, 1 / (1 + rho.unsqueeze(1) * factor.s)
        for _ in range(self.check):
            right = times(factor.ak.mT, weight * z - y) - kq
            if problem.sigma:
                right = right + times(factor.gram, v)
            u = right * inverse
            az = torch.lerp(z, times(factor.ak, u), RELAXATION)
            v = torch.lerp(v, u, RELAXATION)
            z = torch.clamp(torch.addcmul(az, y, light), lower, upper)
            y = torch.addcmul(y, weight, az - z)
        state = Split(v, z, y, rho, iterations + self.check, state.program, state.factor)
        primal, dual, scales = _residuals(factor, state)
        balance = (primal / scales[0] / (dual / scales[1])).sqrt()
        # Ever more seldom, at looks 1, 2, 4, 8, ...: a penalty that keeps changing need not converge.
        looks = state.iterations // self.check
        due = ((looks & (looks - 1)) == 0) & ((balance > 2) | (balance < 0.5))
        change = torch.where(due, balance, 1.0).nan_to_num(1.0).clamp(0.1, 10)
        state = state._replace(rho=(rho * change).clamp(1e-6, 1e6))
        x = times(factor.k, v)
        residual = torch.maximum(primal, dual)
        return self.settle(
            rows, torch.cat([x, y], 1), problem.value(x, a), residual, state, state.iterations,
            merit=residual, evaluations=self.check,
        )  # fmt: skip


class _Programs:
    """The programs of a batch: shared matrices factored once, own ones where rows begin."""

    def __init__(self, problem: Any, program: QuadraticProgram, shape: torch.Size, traced: bool) -> None:
        self.problem, self.tail, self.traced = problem, shape, traced
        # Whether P can be factored as it is, and which constraints are equalities, is one answer for all rows.
        p = program.P
        spectrum = torch.linalg.eigvalsh(p)
        definite = bool((spectrum[..., 0] > 1e-7 * spectrum[..., -1]).all())
        self.sigma = 0.0 if definite else 1e-6 * max(float(spectrum[..., -1].abs().max()), 1.0)
        equal = (program.lower == program.upper).all(0)
        self.weight = torch.where(equal, EQUALITY, 1.0).to(p.dtype)
        own = p.ndim == 3 or program.A.ndim == 3
        self.shared = None if own else self.factor(p, program.A)

    def factor(self, p: Tensor, a: Tensor) -> Factor:
        n = p.shape[-1]
        eye = torch.eye(n, dtype=p.dtype, device=p.device)
        lower, _ = torch.linalg.cholesky_ex(p + self.sigma * eye)
        scaled = torch.linalg.solve_triangular(lower, a.mT, upper=False)
        inner = (scaled * self.weight) @ scaled.mT
        finite = inner.flatten(-2).isfinite().all(-1)[..., None, None]
        s, turn = torch.linalg.eigh(torch.where(finite, inner, eye))
        k = torch.where(finite, torch.linalg.solve_triangular(lower.mT, turn, upper=True), torch.nan)
        return Factor(k, s.clamp(min=0), a @ k, p @ k, self.sigma * k.mT @ k, a, self.weight)

    def of(self, a: Context) -> tuple[Vectors, Factor, Any]:
        p, q, matrix, lower, upper = self.problem.program(a)
        if self.shared is not None:
            return Vectors(q, lower, upper, times(self.shared.k.mT, q)), self.shared, Nothing()
        size = len(q)
        factor = self.factor(p.expand(size, *p.shape[-2:]), matrix.expand(size, *matrix.shape[-2:]))
        factor = factor._replace(weight=factor.weight.expand(size, -1), gram=factor.gram + 0 * factor.k)
        return Vectors(q, lower, upper, times(factor.k.mT, q)), factor, factor

    def matrix(self, a: Context) -> Tensor:
        p: Tensor = self.problem.program(a).P
        return p

    def value(self, x: Tensor, a: Context) -> Tensor:
        """The objective where someone looks at it; no iterate is chosen by it, so otherwise it can wait for the end."""
        if not self.traced:
            return torch.zeros_like(x[:, 0])
        value: Tensor = self.problem.objective(x.reshape(len(x), *self.tail), a)
        return value


def _residuals(factor: Factor, state: Split) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """The primal and dual residuals ``(L,)``, and the scales they are measured against when ρ adapts."""
    ab, pb = times(factor.ak, state.v), times(factor.pk, state.v)
    ay = times(factor.a.mT, state.y)
    q = state.program.q
    tiny = torch.finfo(q.dtype).tiny
    primal, dual = (ab - state.z).abs().amax(1), (pb + q + ay).abs().amax(1)
    large = torch.maximum(ab.abs().amax(1), state.z.abs().amax(1))
    pull = torch.stack([pb.abs().amax(1), ay.abs().amax(1), q.abs().amax(1)]).amax(0)
    return primal, dual, (large + tiny, pull + tiny)
