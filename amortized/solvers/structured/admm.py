"""ADMM for quadratic programs: OSQP's splitting, for all rows at once, each with its own penalty."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from amortized.contract import Context, QuadraticProgram, map_leaves, take
from amortized.solvers.base import Optimality, Solution, Status, Trace, tolerance
from amortized.solvers.engine.rows import Rows, RowSolver, put, times
from amortized.solvers.structured.active_set import exchange, schur, search, sides
from amortized.solvers.structured.kkt import of_program

RELAXATION = 1.6
EQUALITY = 1e3
"""How much larger the penalty of equalities is, as in OSQP."""
PROXIMAL = 1e-6
"""σ, as in OSQP, relative to the size of the objective."""
EXCHANGES = 3
"""Active sets that a polish tries."""
SEARCHES = 10
"""Active sets that are looked through before the first iteration."""
BEYOND = 1e3
"""How much farther than the iterate no feasible point may lie before a row counts as infeasible."""


class Matrices(NamedTuple):
    """Of scaled programs, ``P ← D P D`` and ``A ← E A D``: one for all rows, or of each row its own."""

    p: Tensor
    a: Tensor
    columns: Tensor
    """The diagonal of D."""
    rows: Tensor
    """The diagonal of E."""
    weight: Tensor
    """Of each constraint in the penalty: equalities have more."""
    sigma: Tensor


class Factor(NamedTuple):
    """``K`` with ``(P + σ 1 + ρ AᵀWA)⁻¹ = K diag(1 / (1 + ρ s)) Kᵀ``; iterates are ``x = K v``.

    Shared matrices have one for all rows and every ρ: ``Kᵀ (P + σ 1) K = 1``, ``Kᵀ Aᵀ W A K = diag(s)``. Where matrices
    are each row's own K is of its ρ, and s = 0.
    """

    k: Tensor
    s: Tensor
    ak: Tensor
    gram: Tensor
    """``σ KᵀK``; empty where P is definite, and σ = 0."""


class Program(NamedTuple):
    """The context of a row: its program, scaled."""

    a: Any
    """The problem's own context."""
    q: Tensor
    lower: Tensor
    upper: Tensor
    curvature: Tensor
    """Of the objective, the mean of ‖P_j‖∞ ``(L,)``."""
    size: Tensor
    """Of the objective, the larger of that and ‖q‖∞: what ρ is relative to ``(L,)``."""
    matrices: Any
    """:class:`Matrices` of the row, or :class:`Nothing`."""
    schur: Any
    """:class:`Schur` of the row, for the polish, or :class:`Nothing`."""


class Nothing(NamedTuple):
    """In place of what all rows share."""


class ADMMState(NamedTuple):
    """The iterate ``x = K v``, z = A x kept within its bounds, and the dual y; and how it was at the last check."""

    v: Tensor
    z: Tensor
    y: Tensor
    rho: Tensor
    iterations: Tensor
    factor: Any
    """:class:`Factor` of the row, or :class:`Nothing`."""
    x: Tensor
    ax: Tensor
    px: Tensor
    aty: Tensor


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

    The problem has ``program(a)`` (:class:`~amortized.contract.Quadratic`) and its ``objective`` is the quadratic. Equal
    bounds mean an equality; infinite bounds are free. Programs are scaled first (Ruiz equilibration), and solved in
    float64 whatever their dtype: single precision would stop short. A matrix shared by all rows is factored once for
    all, in a form that serves every penalty ρ, so each row adapts its own at no cost; matrices of each row's own are
    factored in a batch (Cholesky), and anew where ρ changes.

    ``residual`` is the larger of ``‖A b − z‖∞ / u``, with z within the bounds, and ``‖P b + q + Aᵀy‖∞ / w``, where u and
    w are 1, less in small units (the largest bound, ``‖q‖∞``), and more in large ones: ``rtol / tol`` times the largest
    term of the sum. It decides which iterate is best (objectives of infeasible points mean nothing) and when a row is
    finished. ``dual`` is y ``(B, m)``, in the order of the rows of A; :meth:`certify` gives the residuals as they are and
    the duality gap.

    A row ends as ``INFEASIBLE`` where a bound contradicts another, where the change of y proves that no point within
    1,000 times the iterate's size meets the constraints, or where the change of b is a direction along which the
    objective falls for ever.

    Linear convergence, fast to 1e-6. With ``polish``, at checks 1, 2, 4, 8, ... and where a row is finished, the program is
    solved on the active set that the iterate has, exchanged up to twice for what is wrong with it: where the conditions of
    optimality then hold, the row ends with the exact solution, often long before the iteration would.

    Source: Stellato et al. (2020), OSQP, algorithms 1 and 2, (13) and section 3.4; the factor by simultaneous
    diagonalization, and the measure of a proof of infeasibility, are ours.

    Args:
        steps: iterations at most.
        rho: penalty ρ at the start, relative to the size of the scaled objective.
        check: iterations between checks of the residuals, when ρ adapts too.
        tol: residual at which a row is finished; None chooses by dtype.
        rtol: relative tolerance beside it: ``rtol = tol`` is OSQP's test.
        polish: end rows with the exact solution where the active set can be proven; it is looked for before the first
            iteration too, and where that finds it there are none.
        chunk: rows at work at a time; None for all.

    Raises:
        TypeError: from :meth:`solve`, if the problem lacks ``program``.
        ValueError: if ``rho`` or ``check`` is not positive, or ``rtol`` is negative.
    """

    relative = False
    needs = ("program",)

    def __init__(
        self,
        steps: int = 5000,
        rho: float = 0.1,
        check: int = 10,
        tol: float | None = None,
        rtol: float = 1e-10,
        polish: bool = True,
        chunk: int | None = None,
    ) -> None:
        super().__init__(-(-steps // max(check, 1)), tol, chunk)
        if rho <= 0 or check < 1 or rtol < 0:
            raise ValueError(f"rho and check must be positive and rtol not negative, got {rho}, {check} and {rtol}")
        self.rho, self.check, self.rtol, self.polish = rho, check, rtol, polish

    def _solve(self, problem: Any, a: Context, b: Tensor, dual: Tensor | None, trace: Trace | None) -> Solution:
        """As :meth:`Solver.solve`, with what is best decided by ``residual``."""
        program, n = problem.program(a), b[0].numel()
        y = torch.zeros_like(program.lower) if dual is None else dual
        programs: Any = _Programs(problem, program, b, trace is not None, self.polish)

        def primal(evaluations: int, both: Tensor, value: Tensor) -> None:
            if trace is not None:
                trace(evaluations, both[:, :n].reshape(b.shape).to(b.dtype), value)

        both, watch = torch.cat([b.flatten(1), y], 1).double(), None if trace is None else primal
        found = super()._solve(programs, programs.context(a, program), both, None, watch)
        x, y = found.b[:, :n].reshape(b.shape).to(b.dtype), found.b[:, n:].to(b.dtype)
        # A bound that is not there has no force; what is left there is rounding.
        absent = torch.where(y > 0, program.upper, program.lower).isinf()
        residual, y = found.residual.to(b.dtype), torch.where(absent, 0, y)
        return found._replace(b=x, value=problem.objective(x, a), residual=residual, dual=y)

    def optimality(self, problem: Any, a: Context, found: Solution) -> Optimality:
        """As :meth:`Solver.optimality`: the conditions of Karush, Kuhn and Tucker on the active set."""
        assert found.dual is not None
        return of_program(problem, a, found.b, found.dual)

    def certify(self, problem: Any, a: Context, b: Tensor, y: Tensor) -> Certificate:
        """The residuals and the duality gap of a primal and dual pair."""
        program, b = problem.program(a), b.flatten(1)
        ab, pb = times(program.A, b), times(program.P, b)
        outside = torch.maximum(ab - program.upper, program.lower - ab).clamp(min=0)
        bound = torch.where(y > 0, program.upper, program.lower)
        support = torch.where(y == 0, 0, y * bound).sum(1)
        gap = ((b * pb).sum(1) + (program.q * b).sum(1) + support).abs()
        return Certificate(outside.amax(1), (pb + program.q + times(program.A.mT, y)).abs().amax(1), gap)

    def begin(self, problem: _Programs, a: Program, b: Tensor) -> Rows:
        """Rows at a primal and dual start."""
        m = problem.matrices(a)
        n = a.q.shape[1]
        x, y, rho = b[:, :n] / m.columns, b[:, n:] / m.rows, self.rho * a.size
        ax, px, aty = times(m.a, x), times(m.p, x), times(m.a.mT, y)
        z = torch.clamp(ax, a.lower, a.upper)
        none = torch.zeros_like(rho, dtype=torch.int32)
        state = ADMMState(torch.zeros_like(x), z, y, rho, none, Nothing(), x, ax, px, aty)
        if self.polish and self.steps:
            state = self._polished(problem, m, a, state, none == 0, searches=SEARCHES)
        residual = self._measured(m, a, state, problem.dtype)[0]
        b = torch.cat([state.x * m.columns, state.y * m.rows], 1)
        rows = self.enter(b, problem.value(b[:, :n], a), residual, state, merit=residual)
        rows = rows._replace(state=problem.started(m, state, rows.status == int(Status.RUNNING)))
        contradictory = (a.lower > a.upper).any(1)
        return rows._replace(status=torch.where(contradictory, int(Status.INFEASIBLE), rows.status).to(torch.int32))

    def advance(self, problem: _Programs, a: Program, rows: Rows, shape: torch.Size) -> Rows:
        """As many iterations as there are between two checks, and a check."""
        state, m = rows.state, problem.matrices(a)
        factor: Any = state.factor if problem.own else problem.factor
        v, z, y, rho = state[:4]
        weight, inverse = m.weight * rho.unsqueeze(1), 1 / (1 + rho.unsqueeze(1) * factor.s)
        light, kq = 1 / weight, times(factor.k.mT, a.q)
        for _ in range(self.check):
            right = times(factor.ak.mT, weight * z - y) - kq
            if problem.proximal:
                right = right + times(factor.gram, v)
            u = right * inverse
            az = torch.lerp(z, times(factor.ak, u), RELAXATION)
            v = torch.lerp(v, u, RELAXATION)
            z = torch.clamp(torch.addcmul(az, y, light), a.lower, a.upper)
            y = torch.addcmul(y, weight, az - z)
        x, ax, aty = times(factor.k, v), times(factor.ak, v), times(m.a.mT, y)
        now = ADMMState(v, z, y, rho, state.iterations + self.check, state.factor, x, ax, times(m.p, x), aty)
        residual, balance = self._measured(m, a, now, problem.dtype)
        if self.polish:
            tried = (residual <= rows.tol) | _power(now.iterations // self.check)
            now = self._polished(problem, m, a, now, tried & (rows.status == int(Status.RUNNING)))
            x, y = now.x, now.y
            residual = self._measured(m, a, now, problem.dtype)[0]
        # Ever more seldom, at checks 1, 2, 4, 8, ...: a penalty that keeps changing need not converge.
        due = _power(now.iterations // self.check) & ((balance > 2) | (balance < 0.5)) & balance.isfinite()
        other = torch.minimum(torch.maximum(rho * balance.clamp(0.1, 10), 1e-6 * a.size), 1e6 * a.size)
        rho = torch.where(due, other, rho)
        impossible = _infeasible(a, state, now) | _unbounded(a, state, now)
        now = problem.with_penalty(m, now, rho, due)
        at = torch.cat([x * m.columns, y * m.rows], 1)
        after = self.settle(
            rows, at, problem.value(at[:, : x.shape[1]], a), residual, now, now.iterations,
            merit=residual, evaluations=self.check,
        )  # fmt: skip
        impossible &= (rows.status == int(Status.RUNNING)) & (after.status != int(Status.CONVERGED))
        return after._replace(status=torch.where(impossible, int(Status.INFEASIBLE), after.status).to(torch.int32))

    def _polished(
        self, problem: _Programs, m: Matrices, a: Program, now: ADMMState, tried: Tensor, searches: int = 0
    ) -> ADMMState:
        """The state, in rows that are tried and whose active set is proven at their exact solutions."""
        place = tried.nonzero()[:, 0]
        if not len(place):
            return now
        q, lower, upper, ax, y = (leaf[place] for leaf in (a.q, a.lower, a.upper, now.ax, now.y))
        s: Any = problem.schur
        if problem.own:
            s = a.schur if len(place) == len(tried) else take(a.schur, place)
        up, low = search(s, q, lower, upper, *sides(s, lower, upper, ax, y), searches)
        found = exchange(s, q, lower, upper, up, low, steps=EXCHANGES)
        place = place[found.exact]
        if not len(place):
            return now
        m = take(m, place) if problem.own else m
        x, y = found.x[found.exact], found.y[found.exact]
        ax = times(m.a, x)
        exact = {"x": x, "y": y, "ax": ax, "px": times(m.p, x), "aty": times(m.a.mT, y)}
        exact["z"] = torch.clamp(ax, a.lower[place], a.upper[place])
        return now._replace(**{name: getattr(now, name).index_copy(0, place, leaf) for name, leaf in exact.items()})

    def _measured(self, m: Matrices, a: Program, state: ADMMState, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The residual ``(L,)``, and the root of the primal one over the dual, each relative to its terms: ρ is to grow so."""
        primal, dual = _largest((state.ax - state.z) / m.rows), _largest((state.px + a.q + state.aty) / m.columns)
        q = _largest(a.q / m.columns)
        bound = torch.maximum(*(_largest(torch.where(x.isinf(), 0, x) / m.rows) for x in (a.lower, a.upper)))
        tiny = torch.finfo(q.dtype).tiny
        large = torch.maximum(_largest(state.ax / m.rows), _largest(state.z / m.rows)) + tiny
        pull = torch.stack([_largest(state.px / m.columns), _largest(state.aty / m.columns), q]).amax(0) + tiny
        tol = tolerance(self.tol, dtype)
        share = self.rtol / tol if tol else 0.0
        u, w = (torch.where(unit > 0, unit, 1).clamp(max=1) for unit in (bound, q))
        residual = torch.maximum(primal / torch.maximum(u, share * large), dual / torch.maximum(w, share * pull))
        return residual, (primal / large / (dual / pull)).sqrt()


class _Programs:
    """The programs of a batch, scaled: shared matrices factored once, each row's own where ρ changes."""

    def __init__(self, problem: Any, program: QuadraticProgram, b: Tensor, traced: bool, polish: bool) -> None:
        self.problem, self.shape, self.dtype, self.traced = problem, b.shape[1:], b.dtype, traced
        p, _, a, lower, upper = (leaf.double() for leaf in program)
        self.own = p.ndim == 3 or a.ndim == 3
        if self.own:
            p, a = p.expand(len(b), *p.shape[-2:]), a.expand(len(b), *a.shape[-2:])
        equal = lower >= upper
        if not self.own:  # one answer for all rows, in which one that is at fault has no say
            equal = (equal | lower.isnan() | upper.isnan()).all(0)
        p, a, columns, rows = _equilibrated(p, a)
        weight = torch.where(equal, EQUALITY, 1.0).to(p.dtype)
        size, eye = p.abs().amax(-2).mean(-1, keepdim=True), torch.eye(p.shape[-1], dtype=p.dtype, device=p.device)
        # Of a matrix that is not finite no row can be solved; its rows end by their residuals.
        finite = torch.where(size.isfinite().unsqueeze(-1), p, eye)
        definite = torch.linalg.cholesky_ex(finite - 1e-7 * size.nan_to_num().unsqueeze(-1) * eye)[1].unsqueeze(-1) == 0
        sigma = torch.where(definite, 0, PROXIMAL * torch.where(size > 0, size, 1))
        self.all, self.proximal = Matrices(p, a, columns, rows, weight, sigma), not bool(definite.all())
        self.factor = None if self.own else self.factored(self.all._replace(p=finite), None)
        self.schur = schur(p, a, None if self.own else equal) if polish else Nothing()

    def factored(self, m: Matrices, rho: Tensor | None) -> Factor:
        """The factor of matrices that all rows share, or of those of rows with these ρ; NaN where P is not semidefinite."""
        eye = torch.eye(m.p.shape[-1], dtype=m.p.dtype, device=m.p.device)
        kkt = m.p + m.sigma.unsqueeze(-1) * eye
        if rho is not None:
            kkt = kkt + (m.a.mT * (m.weight * rho.unsqueeze(1)).unsqueeze(1)) @ m.a
        lower, failed = torch.linalg.cholesky_ex(kkt)
        turn, s = eye, torch.zeros_like(m.columns)
        if rho is None:
            scaled = torch.linalg.solve_triangular(lower, m.a.mT, upper=False)
            inner = (scaled * m.weight) @ scaled.mT
            s, turn = torch.linalg.eigh(torch.where(inner.isfinite().all(), inner, eye))
        k = torch.linalg.solve_triangular(lower.mT, turn, upper=True)
        k = torch.where((failed == 0)[..., None, None], k, torch.nan)
        gram = m.sigma.unsqueeze(-1) * k.mT @ k if self.proximal else k[..., :0]
        return Factor(k, s.clamp(min=0), m.a @ k, gram)

    def coordinates(self, m: Matrices, factor: Factor, rho: Tensor, x: Tensor, ax: Tensor, px: Tensor) -> Tensor:
        """``v = K⁻¹ x``."""
        image = px + m.sigma * x
        if self.own:
            image = image + times(m.a.mT, m.weight * rho.unsqueeze(1) * ax)
        return times(factor.k.mT, image)

    def started(self, m: Matrices, state: ADMMState, running: Tensor) -> ADMMState:
        """The state with the coordinates of its iterate, and where matrices are each row's own a factor of those that run."""
        if self.factor is not None:
            return state._replace(v=self.coordinates(m, self.factor, state.rho, state.x, state.ax, state.px))
        place = running.nonzero()[:, 0]
        m, some = take(m, place), take(state, place)
        factor = self.factored(m, some.rho)
        v = self.coordinates(m, factor, some.rho, some.x, some.ax, some.px)
        whole = map_leaves(lambda leaf: leaf.new_zeros(len(running), *leaf.shape[1:]), factor)
        return state._replace(v=state.v.index_copy(0, place, v), factor=put(whole, place, factor))

    def with_penalty(self, m: Matrices, state: ADMMState, rho: Tensor, changed: Tensor) -> ADMMState:
        """The state with another ρ, and where matrices are each row's own with factors that fit it."""
        state = state._replace(rho=rho)
        index = changed.nonzero()[:, 0] if self.own else changed[:0]
        if not len(index):
            return state
        m, some = take(m, index), take(state, index)
        factor = self.factored(m, some.rho)
        v = self.coordinates(m, factor, some.rho, some.x, some.ax, some.px)
        return state._replace(v=state.v.index_copy(0, index, v), factor=put(state.factor, index, factor))

    def context(self, a: Context, program: QuadraticProgram) -> Program:
        """What rows are solved by."""
        q, lower, upper = (leaf.double() for leaf in (program.q, program.lower, program.upper))
        m = self.all
        q = q * m.columns
        curvature = m.p.abs().amax(-2).mean(-1).expand(len(q))
        size = torch.maximum(curvature, q.abs().amax(1))
        size = torch.where(size > 0, size, 1)
        own = (m, self.schur) if self.own else (Nothing(), Nothing())
        return Program(a, q, lower * m.rows, upper * m.rows, curvature, size, *own)

    def matrices(self, a: Program) -> Matrices:
        return a.matrices if self.own else self.all

    def value(self, x: Tensor, a: Program) -> Tensor:
        """The objective where someone looks at it; no iterate is chosen by it, so otherwise it can wait for the end."""
        x = x.to(self.dtype)
        if not self.traced:
            return torch.zeros_like(x[:, 0])
        value: Tensor = self.problem.objective(x.reshape(len(x), *self.shape), a.a)
        return value


def _equilibrated(p: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ruiz equilibration: P and A scaled so that the columns of both and the rows of A have size 1; D and E."""
    columns, rows, large_p, large_a = torch.ones_like(p[..., 0]), torch.ones_like(a[..., 0]), p.abs(), a.abs()
    for _ in range(5):
        column = torch.maximum(large_p.amax(-2), large_a.amax(-2) if a.shape[-2] else 0 * columns)
        d, e = (torch.where(x > 0, x, 1).rsqrt() for x in (column, large_a.amax(-1)))
        large_p.mul_(d.unsqueeze(-1)).mul_(d.unsqueeze(-2))
        large_a.mul_(e.unsqueeze(-1)).mul_(d.unsqueeze(-2))
        columns, rows = columns * d, rows * e
    p = columns.unsqueeze(-1) * p * columns.unsqueeze(-2)
    return p, rows.unsqueeze(-1) * a * columns.unsqueeze(-2), columns, rows


def _power(count: Tensor) -> Tensor:
    """Whether a positive number is a power of two."""
    return (count & (count - 1)) == 0


def _largest(x: Tensor) -> Tensor:
    return x.abs().amax(1)


def _infeasible(a: Program, before: ADMMState, now: ADMMState) -> Tensor:
    """Rows whose y runs off along a δ that separates the bounds from what A can reach.

    Every feasible x has ``(Aᵀδ)ᵀx = δᵀAx ≤ upperᵀδ₊ + lowerᵀδ₋``; if that is negative, x is at least so large that
    ``‖Aᵀδ‖∞ ‖x‖₁`` makes up for it.
    """
    change = now.y - before.y
    bound = torch.where(change > 0, a.upper, a.lower)
    terms = torch.where(bound.isinf(), 0, bound * change)
    support, rounding = terms.sum(1), 1e-9 * terms.abs().sum(1)
    return support < -torch.maximum(BEYOND * (1 + now.x.abs().sum(1)) * _largest(now.aty - before.aty), rounding)


def _unbounded(a: Program, before: ADMMState, now: ADMMState) -> Tensor:
    """Rows whose x runs off along a direction without curvature, within the bounds, on which the objective falls."""
    change, move = now.x - before.x, now.ax - before.ax
    nothing = 1e-6 * _largest(change)
    stays = torch.where(a.upper.isinf(), 0, move).clamp(min=0) + torch.where(a.lower.isinf(), 0, -move).clamp(min=0)
    flat = _largest(now.px - before.px) <= nothing * a.curvature
    falls = (a.q * change).sum(1) < -1e-6 * (a.q * change).abs().sum(1)
    return flat & falls & (_largest(stays) <= nothing) & (nothing > 0)
