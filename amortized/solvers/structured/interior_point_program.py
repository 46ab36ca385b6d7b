"""A primal-dual interior point for quadratic programs, all rows at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from amortized.contract import Context, QuadraticProgram, take
from amortized.solvers.base import Solution, Status, Trace
from amortized.solvers.engine.rows import Rows, RowSolver, times
from amortized.solvers.structured.newton_system import newton_system

BEYOND = 1e3
"""How much farther than the iterate no feasible point may lie before a row counts as infeasible."""


class Standard(NamedTuple):
    """``min ½ xᵀPx + qᵀx`` subject to ``J x = c`` and ``D x ≤ h``: matrices of all rows, or of each its own."""

    p: Tensor
    q: Tensor
    j: Tensor
    c: Tensor
    d: Tensor
    h: Tensor


class Vectors(NamedTuple):
    """What each row has of a program of which all rows share the matrices."""

    q: Tensor
    c: Tensor
    h: Tensor


class Pair(NamedTuple):
    """A primal and dual pair with the slacks ``s = h − D x``; y of the equations, z of the inequalities."""

    x: Tensor
    s: Tensor
    y: Tensor
    z: Tensor


class ProgramState(NamedTuple):
    """The pair and the steps taken."""

    at: Pair
    iterations: Tensor


class ProgramInteriorPoint(RowSolver):
    r"""``min ½ bᵀPb + qᵀb`` subject to ``lower ≤ A b ≤ upper``, by Mehrotra's predictor and corrector.

    Each round factors one system for each row and takes two steps by it: one towards s ∘ z = 0, which says how far μ can go
    down and what the linearization missed, and one with both taken into account. Some ten rounds to 1e-9, whatever the start,
    which is why none is used. :class:`~amortized.solvers.InteriorPoint` takes it for problems with ``program``.

    ``residual`` is the largest of the violation, the largest entry of ``Pb + q + Aᵀy`` over max(1, ‖q‖∞), and ``s·z`` over
    max(1, |value|). ``dual`` is y ``(B, m)``, in the order of the rows of A.

    A row ends as ``INFEASIBLE`` where a bound contradicts another, where its multipliers prove that no point within 1,000
    times the iterate's size meets the constraints, or where b runs off in a direction in which the objective falls for ever.

    Source: Mehrotra (1992); Nocedal & Wright (2006), algorithm 16.4; the start is that of Vandenberghe (2010), *CVXOPT*.

    Args:
        steps: rounds at most.
        tol: residual at which a row is finished; None chooses by dtype.
        chunk: rows at work at a time; None for all.
    """

    relative = False
    needs = ("program",)

    def __init__(self, steps: int = 60, tol: float | None = None, chunk: int | None = None) -> None:
        super().__init__(steps, tol, chunk)

    def _solve(self, problem: Any, a: Context, b: Tensor, dual: Tensor | None, trace: Trace | None) -> Solution:
        """As :meth:`Solver.solve`; rows with the same pattern of equalities and of bounds that are there go together."""
        program = problem.program(a)
        lower, upper = program.lower, program.upper
        kind = torch.stack([lower == upper, upper.isfinite(), lower.isfinite()], 1).flatten(1)
        kinds, which = torch.unique(kind, dim=0, return_inverse=True)
        parts = []
        for number in range(len(kinds)):
            index = (which == number).nonzero()[:, 0]
            rows = QuadraticProgram(
                *(leaf if leaf.ndim == 2 and k in (0, 2) else leaf[index] for k, leaf in enumerate(program))
            )
            parts.append(
                (index, self._alike(problem, take(a, index), b[index], rows, None if len(kinds) > 1 else trace))
            )
        if len(parts) == 1:
            return parts[0][1]
        order = torch.cat([index for index, _ in parts]).argsort()
        whole = Solution(
            *(torch.cat([getattr(part, name) for _, part in parts])[order] for name in Solution._fields[:6])
        )
        whole = whole._replace(dual=torch.cat([part.dual for _, part in parts if part.dual is not None])[order])
        if trace is not None:
            trace(int(whole.evaluations.max()), whole.b, whole.value)
        return whole

    def _alike(self, problem: Any, a: Context, b: Tensor, program: QuadraticProgram, trace: Trace | None) -> Solution:
        p, q, matrix, lower, upper = (leaf.double() for leaf in program)
        n = b[0].numel()
        equal, above, below = lower[0] == upper[0], upper[0].isfinite(), lower[0].isfinite()
        above, below = above & ~equal, below & ~equal
        own = p.ndim == 3 or matrix.ndim == 3
        if own:
            p, matrix = p.expand(len(b), n, n), matrix.expand(len(b), -1, n)
        d = torch.cat([matrix[..., above, :], -matrix[..., below, :]], -2)
        h = torch.cat([upper[:, above], -lower[:, below]], 1)
        standard = Standard(p, q, matrix[..., equal, :], lower[:, equal], d, h)
        k = int(equal.sum())

        def primal(evaluations: int, every: Tensor, value: Tensor) -> None:
            if trace is not None:
                x = every[:, :n].reshape(b.shape).to(b.dtype)
                trace(evaluations, x, problem.objective(x, a))

        found = solve_standard(self, standard, b.flatten(1).double(), own, trace and primal)
        x, y, z = found.b[:, :n], found.b[:, n : n + k], found.b[:, n + k :]
        dual = torch.zeros_like(lower)
        dual[:, equal], up = y, int(above.sum())
        dual[:, above] += z[:, :up]
        dual[:, below] -= z[:, up:]
        contradictory = (lower > upper).any(1)
        status = torch.where(contradictory, int(Status.INFEASIBLE), found.status)
        x = x.reshape(b.shape).to(b.dtype)
        value, residual = problem.objective(x, a), found.residual.to(b.dtype)
        return found._replace(b=x, value=value, residual=residual, status=status, dual=dual.to(b.dtype))

    def begin(self, problem: Any, a: Context, b: Tensor) -> Rows:
        """Rows at the start ``b`` ``(L, n + p + m)``, which is what no row may end worse than, and at a pair of their own."""
        f: Standard = problem(a)
        n, k = f.q.shape[1], f.c.shape[1]
        given = Pair(b[:, :n], (f.h - times(f.d, b[:, :n])).clamp(min=0), b[:, n : n + k], b[:, n + k :])
        residual, value = _residual(f, given)
        system = newton_system(_wide(f.p, b) + f.d.mT @ f.d, _wide(f.j, b), _size(f, b))
        x, y = system.solve(times(f.d.mT, f.h) - f.q, f.c)
        x, y = (torch.where(system.sound.unsqueeze(1), part, 0) for part in (x, y))
        slack = f.h - times(f.d, x)
        at = Pair(x, _inside(slack), y, _inside(-slack))
        none = torch.zeros_like(value, dtype=torch.int32)
        return self.enter(b, value, residual, ProgramState(at, none), merit=residual)

    def advance(self, problem: Any, a: Context, rows: Rows, shape: torch.Size) -> Rows:
        """One factor, a predictor and a corrector for every row."""
        f, at = problem(a), rows.state.at
        x, s, y, z = at
        count = max(s.shape[1], 1)
        rx, rc = times(f.p, x) + f.q + times(f.j.mT, y) + times(f.d.mT, z), times(f.j, x) - f.c
        rs, mu = times(f.d, x) + s - f.h, (s * z).sum(1, keepdim=True) / count
        sigma = z / s
        matrix = _wide(f.p, x) + f.d.mT @ (sigma.unsqueeze(2) * f.d)
        system = newton_system(matrix, _wide(f.j, x), _size(f, x))

        def step(rz: Tensor) -> Pair:
            dx, dy = system.solve(-rx - times(f.d.mT, sigma * rs - rz / s), -rc)
            ds = -rs - times(f.d, dx)
            return Pair(dx, ds, dy, -(rz + z * ds) / s)

        ahead = step(s * z)
        far = _room(s, ahead.s, 1.0), _room(z, ahead.z, 1.0)
        least = ((s + far[0] * ahead.s) * (z + far[1] * ahead.z)).sum(1, keepdim=True) / count
        centre = (least / mu.clamp(min=1e-300)).clamp(0, 1) ** 3
        move = step(s * z + ahead.s * ahead.z - centre * mu)
        sound = system.sound.unsqueeze(1)
        alpha, beta = _room(s, move.s, 0.995), _room(z, move.z, 0.995)
        if bool((f.p != 0).any()):  # x enters the dual residual
            alpha = beta = torch.minimum(alpha, beta)
        moved = Pair(x + alpha * move.x, s + alpha * move.s, y + beta * move.y, z + beta * move.z)
        at = Pair(
            *(
                torch.where(sound & new.isfinite().all(1, keepdim=True), new, old)
                for new, old in zip(moved, at, strict=True)
            )
        )
        residual, value = _residual(f, at)
        iterations = rows.state.iterations + 1
        tiny = (torch.maximum(alpha, beta).squeeze(1) < 1e-10) | ~system.sound
        after = self.settle(
            rows, torch.cat([at.x, at.y, at.z], 1), value, residual, ProgramState(at, iterations), iterations,
            merit=residual, stalled=tiny, recovers=True,
        )  # fmt: skip
        proved = (_infeasible(f, at) | _unbounded(f, at)) & (rows.status == int(Status.RUNNING))
        proved &= after.status != int(Status.CONVERGED)
        return after._replace(status=torch.where(proved, int(Status.INFEASIBLE), after.status).to(torch.int32))


def solve_standard(
    solver: ProgramInteriorPoint, f: Standard, x: Tensor, own: bool, trace: Trace | None = None
) -> Solution:
    """The solution ``(B, n + p + m)``, with its multipliers, of programs in standard form.

    Args:
        solver: the settings.
        f: the programs.
        x: what no row may end worse than ``(B, n)``.
        own: whether matrices are each row's own.
        trace: as of :meth:`Solver.solve`.
    """
    start = torch.cat([x, torch.zeros_like(f.c), torch.zeros_like(f.h)], 1)
    whole: Callable[[Any], Standard] = (lambda a: a) if own else (lambda a: Standard(f.p, a.q, f.j, a.c, f.d, a.h))
    a = f if own else Vectors(f.q, f.c, f.h)
    return RowSolver._solve(solver, whole, a, start, None, trace)  # type: ignore[arg-type]


def _wide(matrix: Tensor, x: Tensor) -> Tensor:
    """A matrix for each row."""
    return matrix.expand(len(x), *matrix.shape[-2:])


def _size(f: Standard, x: Tensor) -> Tensor:
    """What shifts and penalties are relative to ``(L,)``."""
    n, m = f.p.shape[-1], max(f.d.shape[-2], 1)
    size = f.p.square().sum((-2, -1)).sqrt() / n**0.5 + f.d.square().sum((-2, -1)) / m
    return size.expand(len(x))


def _inside(x: Tensor) -> Tensor:
    """Rows shifted until they are positive, if they are not."""
    if not x.shape[1]:
        return x
    least = x.amin(1, keepdim=True)
    shifted = torch.where(least <= 1e-8, x - least + 1, x)
    return shifted.clamp(min=1e-8)


def _room(x: Tensor, step: Tensor, part: float) -> Tensor:
    """How far positive rows can go along a step, ``(L, 1)``: at most 1, and ``part`` of the way to zero."""
    if not x.shape[1]:
        return torch.ones_like(x.sum(1, keepdim=True))
    return (part * x / (-step).clamp(min=1e-300)).amin(1, keepdim=True).clamp(max=1)


def _residual(f: Standard, at: Pair) -> tuple[Tensor, Tensor]:
    """What a row is finished by, and its value, both ``(L,)``."""
    px = times(f.p, at.x)
    value = (at.x * px).sum(1) / 2 + (f.q * at.x).sum(1)
    dual = _largest(px + f.q + times(f.j.mT, at.y) + times(f.d.mT, at.z)) / _largest(f.q).clamp(min=1)
    over = (times(f.d, at.x) - f.h).clamp(min=0)
    gap = (at.s * at.z).sum(1) / value.abs().clamp(min=1)
    return torch.stack([_largest(times(f.j, at.x) - f.c), _largest(over), dual, gap]).amax(0), value


def _largest(x: Tensor) -> Tensor:
    return x.abs().amax(1) if x.shape[1] else torch.zeros_like(x.sum(1))


def _infeasible(f: Standard, at: Pair) -> Tensor:
    """Rows whose multipliers separate what J and D reach from c and h.

    Every feasible x has ``(Jᵀy + Dᵀz)ᵀx ≤ cᵀy + hᵀz``; if that is negative, x is at least so large that
    ``‖Jᵀy + Dᵀz‖∞ ‖x‖₁`` makes up for it.
    """
    terms = torch.cat([f.c * at.y, f.h * at.z], 1)
    support, rounding = terms.sum(1), 1e-9 * terms.abs().sum(1)
    reach = _largest(times(f.j.mT, at.y) + times(f.d.mT, at.z))
    return support < -torch.maximum(BEYOND * (1 + at.x.abs().sum(1)) * reach, rounding)


def _unbounded(f: Standard, at: Pair) -> Tensor:
    """Rows whose x runs off in a direction without curvature, within the constraints, in which the objective falls."""
    length = _largest(at.x)
    x = at.x / length.clamp(min=1).unsqueeze(1)
    stays = torch.maximum(_largest(times(f.j, x)), _largest(times(f.d, x).clamp(min=0)))
    falls = (f.q * x).sum(1) < -1e-6 * (f.q * x).abs().sum(1)
    return (length > 1e6) & (_largest(times(f.p, x)) <= 1e-6) & (stays <= 1e-6) & falls
