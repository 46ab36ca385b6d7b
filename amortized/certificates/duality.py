"""Certificates of quadratic programs: a dual function is below every minimum."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from amortized.certificates.base import Certificate
from amortized.contract import Context, QuadraticProgram
from amortized.solvers.engine.rows import times
from amortized.solvers.structured.active_set import Settled, exchange, largest, schur

FLAT = 1e-10
"""Curvature of P up to here, relative to its largest entry, is taken for none: the bound is then lower, never too high."""


class Dual(NamedTuple):
    """A bound of quadratic programs from below."""

    value: Tensor
    """``D(y) ≤ min ½ xᵀPx + qᵀx`` ``(B,)``; −∞ where no y was found that is dual feasible."""
    exact: Tensor
    """Where an active set met the conditions of optimality ``(B,)``: the bound is the minimum, up to rounding."""
    x: Tensor
    """The solution ``(B, n)`` where exact."""


class Duality(Certificate):
    r"""``L(b) − min L ≤ L(b) − D(y)`` for quadratic programs, with multipliers y made dual feasible.

    ``D(y) = −½ cᵀP⁻¹c − upperᵀy₊ + lowerᵀy₋`` with ``c = q + Aᵀy`` is below the minimum for every y that has no force on a
    bound that is not there. The y here are those of the active set of the prediction (constraints within ``near`` of their
    bounds, or past them), exchanged up to ``steps`` times for what violates the conditions of optimality. Where these hold
    in the end the bound is the gap itself, and :meth:`dual` has the solution. Where the problem predicts
    multipliers, ``dual(a) -> (B, m)``, the better bound counts.

    Where P is singular, c has to lie in its range. Multipliers of constraints that have both bounds are shifted so that it
    does; where they cannot the bound is infinite.

    The number is in float64, and of L as the program states it.

    Source: Boyd & Vandenberghe (2004), section 5.2; for the sets, :mod:`amortized.solvers.structured.active_set`.

    Args:
        steps: active sets to try; more make more rows exact, at a linear system each.
        near: distance to a bound, relative to the largest entry of ``A b``, up to which a constraint counts as active.

    Raises:
        ValueError: if ``steps`` is not positive or ``near`` is negative.
    """

    kind = "duality"
    needs = ("program",)

    def __init__(self, steps: int = 5, near: float = 1e-3) -> None:
        if steps < 1 or near < 0:
            raise ValueError(f"steps must be positive and near not negative, got {steps} and {near}")
        self.steps, self.near = steps, near

    @property
    def claim(self) -> Literal["bound"]:
        return "bound"

    def bound(self, problem: Any, b: Tensor, a: Context) -> Tensor:
        self.require(problem)
        with torch.no_grad():
            p, x = _double(problem.program(a)), b.flatten(1).double()
            bound = _value(p, x) - self.dual(problem, b, a).value
            return torch.where(bound.isnan(), torch.inf, bound)

    def dual(self, problem: Any, b: Tensor, a: Context) -> Dual:
        """The best bound from below that there is a way to from predictions ``b``; no graph."""
        self.require(problem)
        with torch.no_grad():
            p, x = _double(problem.program(a)), b.flatten(1).double()
            predicted = problem.dual(a) if hasattr(problem, "dual") else None
            given = [] if predicted is None else [predicted.double()]
            guess, last = self._tried(p, x)
            function = _Function(p)
            values = [function(y) for y in (guess.y, last.y, torch.zeros_like(last.y), *given)]
            value = torch.stack(values).nan_to_num(nan=-torch.inf, posinf=-torch.inf, neginf=-torch.inf).amax(0)
            # By weak duality the last set's own value is the minimum where it is exact, also where P is singular.
            proven = _value(p, last.x) - 10 * FLAT * (largest(times(p.P, last.x)) + largest(p.q)) * last.x.abs().sum(1)
            value = torch.where(last.exact & value.isinf(), proven, value)
            value = torch.where(function.sound, value, -torch.inf)
            return Dual(value, last.exact, last.x)

    def _tried(self, p: QuadraticProgram, x: Tensor) -> tuple[Settled, Settled]:
        """The programs on the active sets of the prediction, and on the last ones exchanged from these."""
        own = p.P.ndim == 3 or p.A.ndim == 3
        matrix, rows = (m.expand(len(x), *m.shape[-2:]) if own else m for m in (p.P, p.A))
        s = schur(matrix, rows, None if own else (p.lower >= p.upper).all(0))
        ax = times(p.A, x)
        near = self.near * largest(ax).unsqueeze(1)
        up = ax >= p.upper - near
        low = ~up & (ax <= p.lower + near)
        guess = exchange(s, p.q, p.lower, p.upper, up, low, 1)
        return guess, exchange(s, p.q, p.lower, p.upper, up, low, self.steps)


def _double(p: QuadraticProgram) -> QuadraticProgram:
    return QuadraticProgram(*(leaf.double() for leaf in p))


def _value(p: QuadraticProgram, x: Tensor) -> Tensor:
    return (x * times(p.P, x)).sum(1) / 2 + (p.q * x).sum(1)


class _Function:
    """The dual function of a batch of programs, of multipliers that are made dual feasible first."""

    def __init__(self, p: QuadraticProgram) -> None:
        self.program = p
        self.size = p.P.abs().amax((-2, -1))
        matrices = [m.isfinite().flatten(-2).all(-1) for m in (p.P, p.A)]
        ends = ~(p.lower.isnan() | p.upper.isnan()).any(1)
        self.sound = p.q.isfinite().all(1) & ends & matrices[0] & matrices[1]
        """Which rows are programs at all: numbers, and convex."""
        eye = torch.eye(p.P.shape[-1], dtype=p.P.dtype, device=p.P.device)
        shift = (FLAT * len(eye) * self.size)[..., None, None] * eye
        definite = torch.linalg.cholesky_ex(p.P - shift)[1] == 0
        if bool(definite.all()):
            half = torch.linalg.solve_triangular(torch.linalg.cholesky_ex(p.P)[0], eye.expand_as(p.P), upper=False)
            self.inverse, self.flat = half.mT @ half, None
        else:
            values, vectors = torch.linalg.eigh(torch.where(matrices[0][..., None, None], p.P, 0))
            none = (FLAT * len(eye) * self.size).unsqueeze(-1)
            curved = values > none
            self.sound &= (values >= -none).all(-1)
            self.inverse = (vectors * torch.where(curved, 1 / values, 0).unsqueeze(-2)) @ vectors.mT
            self.flat = vectors * ~curved.unsqueeze(-2)
            both = (p.lower.isfinite() & p.upper.isfinite() & self.sound.unsqueeze(1)).unsqueeze(2)
            self.back = torch.linalg.pinv(torch.where(both, p.A, 0) @ self.flat, rtol=1e-9)

    def __call__(self, y: Tensor) -> Tensor:
        """``D(y)`` ``(B,)``, less what rounding may have added."""
        p = self.program
        y = self._feasible(y)
        c = p.q + times(p.A.mT, y)
        value = torch.zeros_like(c[:, 0])
        if self.flat is not None:
            y = y - times(self.back.mT, times(self.flat.mT, c))
            c = p.q + times(p.A.mT, y)
            left = largest(times(self.flat.mT, c))
            size = torch.maximum(largest(p.q), largest(times(p.A.mT, y)))
            value = torch.where(left <= 1e-12 * size, 0, -torch.inf)
        x = -times(self.inverse, c)
        x = x - times(self.inverse, times(p.P, x) + c)
        px = times(p.P, x)
        terms = torch.where(y == 0, 0, y * torch.where(y > 0, p.upper, p.lower))
        spread = ((x * px).abs() + 2 * (c * x).abs()).sum(1) + terms.abs().sum(1)
        value = value + (x * px).sum(1) / 2 + (c * x).sum(1) - terms.sum(1)
        return value - 2 * x.shape[1] * torch.finfo(x.dtype).eps * spread

    def _feasible(self, y: Tensor) -> Tensor:
        p = self.program
        return torch.where(torch.where(y > 0, p.upper, p.lower).isinf(), 0, y)
