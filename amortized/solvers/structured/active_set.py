r"""Quadratic programs on an active set: what an equality-constrained one has for an answer, and which set is the right one.

With the constraints in S held at bounds c, ``min ½ xᵀPx + qᵀx`` subject to ``A_S x = c_S`` is a linear system,

    ``P x + q + A_Sᵀ y = 0,   A_S x = c_S``,

solved here by the Schur complement ``A_S P⁻¹ A_Sᵀ``, batched over rows that each have a set of their own. Where y has the
signs of its bounds and x keeps the others, that is the solution of the program itself, and proves to be: the conditions of
Karush, Kuhn and Tucker hold. Where not, they say what to exchange.

Source: Nocedal & Wright (2006), section 16.2; Hintermüller, Ito & Kunisch (2003) for the exchange.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from amortized.contract import take
from amortized.solvers.engine.rows import put, times

FLAT = 1e-6
"""What is added to a P that is not definite, relative to its size; refinement takes out what it does."""
REDUNDANT = 1e-12
"""What is added to Schur complements, whose diagonals are 1, for active constraints that depend on each other."""
EDGE = 1e-10
"""Multipliers and violations up to here, relative to the largest, count as none."""


class Schur(NamedTuple):
    """Matrices of programs made ready: those that all rows share, or one of each row's own, the rows of A scaled.

    ``x = −K (q + Aᵀy) + X e`` solves the program of the equalities that are eliminated, with bounds e, at multipliers y of the
    other constraints; ``G = A K Aᵀ`` has a diagonal of ones.
    """

    p: Tensor
    a: Tensor
    scale: Tensor
    """Of each row of A ``(m,)`` or ``(B, m)``: what G's diagonal was, to the power −½."""
    k: Tensor
    g: Tensor
    out: Tensor
    """Which rows of A are eliminated ``(m,)``: those are zero in ``g``."""
    x: Tensor
    """``(n, m)``; zero in the columns of constraints that are not eliminated."""


def schur(p: Tensor, a: Tensor, out: Tensor | None = None) -> Schur:
    """What :func:`on_set` needs of P and A; NaN where P is not semidefinite.

    Args:
        p: ``(n, n)``, or ``(B, n, n)``.
        a: ``(m, n)``, or ``(B, m, n)``.
        out: equalities of all rows ``(m,)``, to be eliminated once for all; only where matrices are shared.
    """
    eye = torch.eye(p.shape[-1], dtype=p.dtype, device=p.device)
    size = p.abs().amax(-2).mean(-1)
    factor, failed = torch.linalg.cholesky_ex(p)
    flat = (failed != 0) | ~(factor.diagonal(dim1=-2, dim2=-1).square().amin(-1) > FLAT * size)
    if bool(flat.any()):
        shift = torch.where(flat, FLAT * torch.where(size > 0, size, 1), 0)
        factor, failed = torch.linalg.cholesky_ex(p + shift[..., None, None] * eye)
    half = torch.linalg.solve_triangular(factor, eye.expand_as(p), upper=False)
    half = torch.where((failed == 0)[..., None, None], half, torch.nan)
    k = half.mT @ half
    out = torch.zeros_like(a[..., 0], dtype=torch.bool) if out is None else out
    x = torch.zeros_like(a.mT)
    if a.ndim == 2 and bool(out.any()):
        equal = a[out]
        w = k @ equal.mT
        inner = equal @ w
        level = inner.diagonal().rsqrt().nan_to_num(posinf=1)
        one = torch.eye(len(inner), dtype=p.dtype, device=p.device)
        inner = level.unsqueeze(1) * inner * level + REDUNDANT * one
        x[:, out] = torch.linalg.solve_ex(inner, (w * level).mT)[0].mT * level
        k = k - x[:, out] @ w.mT
        k = (k + k.mT) / 2
    ak = a @ k
    scale = (ak * a).sum(-1)
    scale = torch.where(scale > 1e-12 * scale.amax(-1, keepdim=True), scale.rsqrt(), 1).masked_fill(out, 1)
    kept = (scale * ~out).unsqueeze(-1)
    return Schur(p, a, scale, k, (kept * ak) @ (kept * a).mT, out, x)


def on_set(s: Schur, q: Tensor, bound: Tensor, active: Tensor, refine: int = 1) -> tuple[Tensor, Tensor]:
    """``x`` ``(B, n)`` and multipliers ``y`` ``(B, m)`` of the programs with the active constraints held at their bounds.

    Where more constraints are active than are independent, y is one of many, and bounds that contradict each other are met
    as nearly as they can be.

    Args:
        s: the matrices.
        q: ``(B, n)``.
        bound: ``(B, m)``; read where ``active``.
        active: ``(B, m)``; what is eliminated is active whatever this says.
        refine: rounds of iterative refinement.
    """
    active = active | s.out
    bound = torch.where(active, bound, 0)
    system = _gathered(s, active & ~s.out)
    x, y = _once(s, system, q, bound)
    for _ in range(refine):
        above = times(s.p, x) + q + times(s.a.mT, y)
        beside = torch.where(active, bound - times(s.a, x), 0)
        dx, dy = _once(s, system, above, beside)
        x, y = x + dx, y + dy
    return x, y


class _System(NamedTuple):
    """The Schur complements of active constraints, factored, and which constraints those are."""

    place: Tensor
    there: Tensor
    factor: Tensor


def _gathered(s: Schur, active: Tensor) -> _System:
    most = int(active.sum(1).amax()) if len(active) else 0
    index = active.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :most]
    there = active.gather(1, index)
    m = s.g.shape[-1]
    first = (
        torch.zeros_like(index[:, :1]) if s.g.ndim == 2 else m * torch.arange(len(index), device=index.device)[:, None]
    )
    rows = s.g.reshape(-1, m).index_select(0, (first + index).flatten()).view(len(index), most, m)
    g = rows.gather(2, index.unsqueeze(1).expand(-1, most, -1))
    g.masked_fill_(~(there.unsqueeze(2) & there.unsqueeze(1)), 0)
    g.diagonal(dim1=1, dim2=2).add_(torch.where(there, REDUNDANT, 1.0))
    return _System(index, there, torch.linalg.cholesky_ex(g)[0])


def _multipliers(system: _System, off: Tensor) -> Tensor:
    """``ŷ`` with ``G_SS ŷ_S = off_S``, zero outside S ``(B, m)``."""
    right = torch.where(system.there, off.gather(1, system.place), 0)
    found = torch.cholesky_solve(right.unsqueeze(2), system.factor).squeeze(2)
    return torch.zeros_like(off).scatter(1, system.place, torch.where(system.there, found, 0))


def _once(s: Schur, system: _System, q: Tensor, bound: Tensor) -> tuple[Tensor, Tensor]:
    """As :func:`on_set`, up to the shifts."""
    x = times(s.x, bound) - times(s.k, q)
    y = _multipliers(system, s.scale * (times(s.a, x) - bound)) * s.scale
    push = times(s.a.mT, y)
    return x - times(s.k, push), y + _eliminated(s, q + push, bound)


def _eliminated(s: Schur, force: Tensor, bound: Tensor) -> Tensor:
    """Multipliers of the eliminated equalities, from the force ``q + Aᵀy`` that they have to balance."""
    if not bool(s.out.any()):
        return torch.zeros_like(bound)
    x = times(s.x, bound)
    return -times(s.x.mT, force + times(s.p, x))


class Settled(NamedTuple):
    """Programs on the last active set that was tried."""

    x: Tensor
    y: Tensor
    exact: Tensor
    """Rows ``(B,)`` where the conditions of Karush, Kuhn and Tucker hold up to rounding: x is the solution."""


def sides(s: Schur, lower: Tensor, upper: Tensor, ax: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Which constraints a primal and dual guess has at their upper bounds, and which at their lower ones ``(B, m)``.

    At the upper where ``y + d² (A x − upper) > 0``, with 1 / d² its place on the diagonal of ``A P⁻¹ Aᵀ``, and likewise at
    the lower; equalities are at neither.
    """
    equal, hat = lower >= upper, y / s.scale
    up = ~equal & (hat + s.scale * (ax - upper) > 0)
    return up, ~equal & ~up & (hat + s.scale * (ax - lower) < 0)


def search(
    s: Schur, q: Tensor, lower: Tensor, upper: Tensor, up: Tensor, low: Tensor, steps: int
) -> tuple[Tensor, Tensor]:
    """A better active set to begin :func:`exchange` with: the same exchanges in multipliers alone, much cheaper, unproven.

    With the equalities alone active ``A x`` is some ``c``; multipliers ŷ of the others move it to ``c − G ŷ``, in the units
    in which G's diagonal is 1, so a step costs a linear system of the active constraints and a product with G.

    Arguments are those of :func:`exchange`. Returns the constraints at their upper bounds and at their lower ones, both
    ``(B, m)``.
    """
    level = times(s.a, times(s.x, torch.where(s.out, lower, 0)) - times(s.k, q))
    going, part = torch.arange(len(q), device=q.device), s
    for _ in range(steps):
        here_up, here_low, low_end, high_end, c = (leaf[going] for leaf in (up, low, lower, upper, level))
        active = (here_up | here_low | (low_end >= high_end)) & ~part.out
        off = torch.where(active, part.scale * (c - torch.where(here_up, high_end, low_end)), 0)
        hat = _multipliers(_gathered(part, active), off)
        next_up, next_low = sides(part, low_end, high_end, c - times(part.g, hat) / part.scale, hat * part.scale)
        moved = ((next_up != here_up) | (next_low != here_low)).any(1)
        # More active constraints than unknowns: such a row has lost its way.
        moved &= (next_up | next_low | (low_end >= high_end)).sum(1) <= q.shape[1]
        place = moved.nonzero()[:, 0]
        if not len(place):
            break
        if s.p.ndim == 3 and len(place) < len(going):  # all that is read of it
            part = part._replace(g=part.g[place], scale=part.scale[place], out=part.out[place])
        going = going[place]
        up, low = up.index_copy(0, going, next_up[place]), low.index_copy(0, going, next_low[place])
    return up, low


def exchange(
    s: Schur, q: Tensor, lower: Tensor, upper: Tensor, up: Tensor, low: Tensor, steps: int = 1, refine: int = 1
) -> Settled:
    """Programs on active sets, exchanged for what violates the conditions of optimality until nothing does.

    Semismooth Newton steps on these conditions: from a good guess few of them find the set; from a bad one they may wander,
    and such rows are not exact.

    Args:
        s: the matrices.
        q: ``(B, n)``.
        lower: ``(B, m)``.
        upper: ``(B, m)``.
        up: constraints to try at their upper bounds ``(B, m)``.
        low: and at their lower ones; equalities hold anyway.
        steps: sets to try at most.
        refine: rounds of refinement of each.
    """
    found, ax = _tried(s, q, lower, upper, up, low, refine)
    for _ in range(steps - 1):
        going = (~found.exact).nonzero()[:, 0]
        if not len(going):
            break
        part = s if s.p.ndim == 2 else take(s, going)
        low_end, high_end = lower[going], upper[going]
        up, low = sides(part, low_end, high_end, ax[going], found.y[going])
        again, further = _tried(part, q[going], low_end, high_end, up, low, refine)
        found, ax = put(found, going, again), ax.index_copy(0, going, further)
    return found


def _tried(
    s: Schur, q: Tensor, lower: Tensor, upper: Tensor, up: Tensor, low: Tensor, refine: int
) -> tuple[Settled, Tensor]:
    x, y = on_set(s, q, torch.where(up, upper, lower), up | low | (lower >= upper), refine)
    ax, aty, px = times(s.a, x), times(s.a.mT, y), times(s.p, x)
    # Beyond rounding, nothing may lie outside its bounds, pull instead of push, or be out of balance. Scaled, A x
    # and y are in one unit, the root of the objective's.
    reach = [largest(s.scale * torch.where(end.isinf(), 0, end)) for end in (ax, lower, upper)]
    hat = y / s.scale
    outside = largest(s.scale * torch.maximum(ax - upper, lower - ax).clamp(min=0))
    pull = largest(torch.where(up, -hat, torch.where(low, hat, 0)).clamp(min=0))
    exact = outside <= EDGE * torch.stack([*reach, FLAT * largest(hat)]).amax(0)
    exact &= pull <= EDGE * largest(hat)
    force = torch.stack([largest(px), largest(aty), largest(q)]).amax(0)
    exact &= (px + q + aty).abs().amax(1) <= EDGE * force
    return Settled(x, torch.where(up, y.clamp(min=0), torch.where(low, y.clamp(max=0), y)), exact), ax


def largest(x: Tensor) -> Tensor:
    """``‖x‖∞`` of rows ``(B, m)``; 0 where m is 0."""
    return x.abs().amax(1) if x.shape[1] else x.new_zeros(len(x))
