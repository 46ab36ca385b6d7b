"""Completion: some unknowns are given, the others follow from the equations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from amortized.contract import Context, feasibility_tol, take
from amortized.solvers.base import Solution, Solver, Status, Trace
from amortized.solvers.engine.rows import times
from amortized.solvers.implicit import root
from amortized.solvers.smooth.newton import jacobian
from amortized.solvers.structured.active_set import exchange, schur, search
from amortized.solvers.structured.interior_point_program import ProgramInteriorPoint, Standard, solve_standard

PROGRESS = 0.5
"""What an iteration by the shared factor must shrink an error by; else the row's own Jacobian takes over."""
NEAR = 10
"""Times tol, within which a row is complete if nothing brings it nearer."""
ADJOINT = 30
"""Iterations by the shared factor for a gradient; rows that need more have theirs from their own Jacobian."""
REACH = 0.2
"""How far one correction may move an unknown, in its units."""
SEARCHES = 6
"""Active sets that are looked through for a correction."""
PRICE = 100.0
"""Of a unit by which a correction leaves linearized inequalities violated, against half the square of its length."""


class Completion(Solver):
    r"""``c(x, w; a) = 0`` solved for the dependent unknowns w by Newton's method, with the others, x, as they are.

    As ``refine`` it turns a prediction of x, and of a start for w, into one that satisfies the equations exactly; gradients
    reach x by the implicit function theorem, ``dw/dx = −(∂c/∂w)⁻¹ ∂c/∂x``, first derivatives only, at the memory of one
    evaluation. Then, outside of training, ``corrections`` steps in rows that violate inequalities: each moves x by the least
    step to where all of them, linearized along the completion, are met, and completes again. Training goes without, so that
    the network learns to need none.

    The problem has ``equality`` of as many equations as it names unknowns in ``dependent``: an index tensor ``(k,)`` into the
    flattened solution. Where it has ``nominal() -> (b, a)`` as well, one solved row, the Jacobian there is factored once for
    all rows: each iteration then costs one evaluation of the equations, and rows on which it shrinks the error too little go on
    with their own. For linear equations that is one factor and one step.

    Source: Donti, Rolnick & Kolter (2021), *DC3*, sections 3.2 and 3.3; the least step, by a program, in
    place of their gradient steps.

    Args:
        steps: iterations at most.
        corrections: of inequalities that are violated by more than half of the problem's ``feasibility_tol``.
        margin: by which corrections aim within the limits.
        tol: largest entry of ``|c|`` at which a row is complete; None chooses by dtype (1e-10, in float32 1e-5).

    Raises:
        TypeError: if the problem lacks ``equality`` or ``dependent``.
        ValueError: if the unknowns are not as many as the equations.
    """

    needs = ("equality", "dependent")

    def __init__(self, steps: int = 12, corrections: int = 0, margin: float = 1e-5, tol: float | None = None) -> None:
        super().__init__(steps, tol)
        if corrections < 0 or margin < 0:
            raise ValueError(f"corrections and margin must not be negative, got {corrections} and {margin}")
        self.corrections, self.margin = corrections, margin

    def _iterates(self, problem: Any, a: Context, b: Tensor) -> Iterator[Tensor]:
        """The completed prediction and, outside of training, the corrected one."""
        rows = _Equations(problem, b.shape)
        x = b.flatten(1)
        done = rows.completed(x, a, self.steps, self._tol(b))[0]
        completed = rows.on_graph(x, done, a)
        yield completed.view(b.shape)
        if not self.training and self.corrections:
            yield self._corrected(rows, completed.detach(), a).view(b.shape)

    def _solve(self, problem: Any, a: Context, b: Tensor, dual: Tensor | None, trace: Trace | None) -> Solution:
        """As :meth:`Solver.solve`, with ``residual`` the largest entry of ``|c|``; the objective has no say."""
        rows, tol = _Equations(problem, b.shape), self._tol(b)
        x, iterations = rows.completed(b.flatten(1), a, self.steps, tol)
        if self.corrections:
            x = self._corrected(rows, x, a)
        residual, value = rows.error(x, a), problem.objective(x.view(b.shape), a)
        finite = residual.isfinite() & value.isfinite()
        status = torch.where(residual <= NEAR * tol, int(Status.CONVERGED), int(Status.LIMIT))
        status = torch.where(finite, status, int(Status.DIVERGED))
        found = Solution(x.view(b.shape), value, residual, iterations, iterations + 1, status)
        if trace is not None:
            trace(int(found.evaluations.max()), found.b, value)
        return found

    def _tol(self, b: Tensor) -> float:
        if self.tol is not None:
            return self.tol
        return {torch.float64: 1e-10, torch.float32: 1e-5}.get(b.dtype, 1e-2)

    def _corrected(self, rows: _Equations, b: Tensor, a: Context) -> Tensor:
        """Rows whose inequalities are violated, moved to where they are not, or as near as the steps came."""
        if not hasattr(rows.problem, "inequality"):
            return b
        allowed, best = feasibility_tol(rows.problem) / 2, b.clone()
        least = rows.worst(b, a)
        place = (least > allowed).nonzero()[:, 0]
        at, here, before = b[place], take(a, place), least[place]
        for _ in range(self.corrections):
            if not len(place):
                break
            at = rows.completed(at + rows.correction(at, here, self.margin), here, self.steps, self._tol(b))[0]
            off = torch.maximum(rows.worst(at, here), rows.error(at, here))
            better = off < least[place]
            best[place[better]], least[place[better]] = at[better], off[better]
            # Rows that a step made worse have, as a rule, nothing feasible in reach; the others it brings there in one or two.
            index = ((off > allowed) & (off < before)).nonzero()[:, 0]
            place, at, here, before = place[index], at[index], take(here, index), off[index]
        return best


class _Equations:
    """A problem's equations as those of its dependent unknowns, on rows ``(L, n)``."""

    def __init__(self, problem: Any, shape: torch.Size) -> None:
        self.problem, self.shape, n = problem, shape[1:], shape[1:].numel()
        self.dependent: Tensor = problem.dependent
        free = torch.ones(n, dtype=torch.bool, device=self.dependent.device)
        free[self.dependent] = False
        self.free, self._shared = free.nonzero()[:, 0], None

    def equality(self, x: Tensor, a: Context) -> Tensor:
        c: Tensor = self.problem.equality(x.view(-1, *self.shape), a).flatten(1)
        if c.shape[1] != len(self.dependent):
            raise ValueError(
                f"{type(self.problem).__name__} has {c.shape[1]} equations and names {len(self.dependent)} dependent unknowns: "
                "as many must follow as there are equations"
            )
        return c

    def inequality(self, x: Tensor, a: Context) -> Tensor:
        d: Tensor = self.problem.inequality(x.view(-1, *self.shape), a).flatten(1)
        return d

    def error(self, x: Tensor, a: Context) -> Tensor:
        return self.equality(x, a).abs().amax(1)

    def worst(self, x: Tensor, a: Context) -> Tensor:
        return self.inequality(x, a).amax(1)

    def jacobians(self, f: Callable[[Tensor, Context], Tensor], x: Tensor, a: Context) -> tuple[Tensor, Tensor]:
        """``∂f/∂w`` and ``∂f/∂x`` of each row."""
        with torch.enable_grad():
            at = x.detach().requires_grad_()
            every = jacobian(f(at, a), at)
        return every[:, :, self.dependent], every[:, :, self.free]

    def shared(self, like: Tensor) -> Tensor | None:
        """``(∂c/∂w)⁻¹`` at the nominal row, where the problem has one."""
        if self._shared is None and hasattr(self.problem, "nominal"):
            b, a = self.problem.nominal()
            # In float64: the error of a factor would be that of every gradient.
            self._shared = torch.linalg.inv_ex(self.jacobians(self.equality, b.flatten(1), a)[0][0])[0]
        return None if self._shared is None else self._shared.to(like)

    def completed(self, x: Tensor, a: Context, steps: int, tol: float) -> tuple[Tensor, Tensor]:
        """Rows that satisfy the equations, and the iterations that it took ``(L,)``."""
        with torch.no_grad():
            x, inverse = x.detach().clone(), self.shared(x)
            c = self.equality(x, a)
            error, iterations = c.abs().amax(1), torch.zeros(len(x), dtype=torch.int64, device=x.device)
            own, done = torch.full_like(error, inverse is None, dtype=torch.bool), error <= tol
            for _ in range(steps):
                going = ~done
                index = going.nonzero()[:, 0]
                if not len(index):
                    break
                iterations += going
                step = torch.zeros_like(c) if inverse is None else times(inverse, c)
                mine = index[own[index]]
                if len(mine):
                    step[mine] = _solved(self.jacobians(self.equality, x[mine], take(a, mine))[0], c[mine])
                x[:, self.dependent] -= torch.where(going.unsqueeze(1), step, 0)
                c = self.equality(x, a)
                now = c.abs().amax(1)
                stalled = ~(now < PROGRESS * error)
                # What stalls this near is rounding: of large networks in float32 it is above tol.
                done, error = done | (now <= tol) | (stalled & (now <= NEAR * tol)), now
                own |= stalled & ~done
        return x, iterations

    def on_graph(self, x: Tensor, done: Tensor, a: Context) -> Tensor:
        """The completed rows on the graph of their independent unknowns."""
        if not torch.is_grad_enabled():
            return done
        free = x[:, self.free]

        def whole(w: Tensor) -> Tensor:
            return torch.zeros_like(x).index_copy(1, self.free, free).index_copy(1, self.dependent, w)

        return whole(
            root(lambda w: self.equality(whole(w), a), done[:, self.dependent], lambda v: self.adjoint(done, a, v))
        )

    def adjoint(self, x: Tensor, a: Context, v: Tensor) -> Tensor:
        """``u`` with ``(∂c/∂w)ᵀ u = v``: by the shared factor where that converges."""
        inverse = self.shared(x)
        if inverse is None:
            return _solved(self.jacobians(self.equality, x, a)[0].mT, v)
        with torch.enable_grad():
            at = x.detach().requires_grad_()
            c = self.equality(at, a)
        u = times(inverse.mT, v)
        aim = (1e-5 if v.dtype == torch.float32 else 1e-11) * v.abs().amax(1)
        for _ in range(ADJOINT):
            (image,) = torch.autograd.grad(c, at, u, retain_graph=True)
            left = v - image[:, self.dependent]
            far = left.abs().amax(1) > aim
            if not bool(far.any()):
                return u
            u = u + times(inverse.mT, left)
        index = far.nonzero()[:, 0]
        u[index] = _solved(self.jacobians(self.equality, x[index], take(a, index))[0].mT, v[index])
        return u

    def correction(self, x: Tensor, a: Context, margin: float) -> Tensor:
        """The least step of the independent unknowns to where linearized inequalities are met, and what follows ``(L, n)``."""
        cw, cx = self.jacobians(self.equality, x, a)
        dw, dx = self.jacobians(self.inequality, x, a)
        follows = -torch.linalg.solve_ex(cw, cx)[0]
        step = _least_step(dx + dw @ follows, self.inequality(x, a) + margin).to(x.dtype)
        whole = torch.zeros_like(x)
        whole[:, self.free], whole[:, self.dependent] = step, times(follows, step)
        return whole


def _least_step(slope: Tensor, d: Tensor) -> Tensor:
    """``argmin_u ½ ‖u‖² + PRICE t`` with ``d + G u ≤ t``, t ≥ 0 and ``|u| ≤ REACH`` in every row ``(L, k)``.

    The price is so high that t is zero wherever it can be: an active set that proves to be right with t = 0, and within reach,
    is looked for first, and is much cheaper than the program.
    """
    slope, d = slope.double(), d.double()
    u, found = _by_active_set(slope, d)
    left = (~found).nonzero()[:, 0]
    return u.index_copy(0, left, _by_interior_point(slope[left], d[left])) if len(left) else u


def _by_active_set(slope: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """The least step, and in which rows it is one."""
    L, m, k = slope.shape
    eye = torch.eye(k, dtype=d.dtype, device=d.device).expand(L, k, k)
    made, q, lower, none = schur(eye, slope), d.new_zeros(L, k), torch.full_like(d, -torch.inf), torch.zeros_like(d) > 0
    up, low = search(made, q, lower, -d, d > 0, none, SEARCHES)
    found = exchange(made, q, lower, -d, up, low)
    return found.x, found.exact & (found.x.abs().amax(1) <= REACH)


def _by_interior_point(slope: Tensor, d: Tensor) -> Tensor:
    """The least step of rows in which it may be that not all inequalities can be met."""
    L, m, k = slope.shape
    eye = torch.eye(k + 1, dtype=d.dtype, device=d.device)
    rows = torch.cat([torch.cat([slope, -torch.ones_like(slope[:, :, :1])], 2), -eye[k:].expand(L, 1, -1)], 1)
    box = torch.cat([eye[:k], -eye[:k]]).expand(L, 2 * k, -1)
    curvature = torch.diag_embed(torch.cat([d.new_ones(L, k), d.new_full((L, 1), 1e-6)], 1))
    q = PRICE * eye[k].expand(L, -1)
    h = torch.cat([-d, d.new_zeros(L, 1), d.new_full((L, 2 * k), REACH)], 1)
    none = d.new_zeros(L, 0, k + 1), d.new_zeros(L, 0)
    program = Standard(curvature, q, *none, torch.cat([rows, box], 1), h)
    found = solve_standard(ProgramInteriorPoint(steps=30, tol=1e-6), program, torch.zeros_like(q), own=True)
    return found.b[:, :k].nan_to_num(0.0)


def _solved(matrix: Tensor, right: Tensor) -> Tensor:
    """``M⁻¹ r`` of each row; zero where M is singular."""
    x, info = torch.linalg.solve_ex(matrix, right)
    return torch.where((info == 0).unsqueeze(1), x, 0).nan_to_num(0.0)
