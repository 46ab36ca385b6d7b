"""L-BFGS, every row with its own curvature, line search and end."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from amortized.contract import Context, Problem
from amortized.solvers.base import Solution, Trace
from amortized.solvers.engine.rows import times
from amortized.solvers.smooth.bfgs import BFGS
from amortized.solvers.smooth.quasi_newton import Pair, QuasiNewton, QuasiNewtonState


class Pairs(NamedTuple):
    """The last m steps s and gradient changes y of each row, and what their products give; slots are in no order.

    With R the upper triangle of SᵀY (in order of time), D its diagonal: ``inverse`` is R⁻¹ and ``gram`` is YᵀY.
    """

    history: Tensor
    """S and Y ``(L, 2m, n)``."""
    inverse: Tensor
    gram: Tensor
    diagonal: Tensor
    products: Tensor
    """[SᵀgYᵀg] at the accepted point ``(L, 2m)``."""
    scale: Tensor
    """γ = sᵀy / yᵀy of the latest pair ``(L,)``."""
    slot: Tensor
    """Where the next pair goes ``(L,)``."""


class LBFGS(QuasiNewton):
    r"""L-BFGS: ``b ← b − t H ∇L(b; a)``, H from the last ``memory`` steps, t from a line search of each row's own.

    The default inner loop. Where it is weak: kinks (ℓ1 terms: use a proximal method), noise in the objective (use
    :class:`~amortized.solvers.Adam`), and batches so small that the dispatch of its operations is all the time it
    takes. It finds a local minimum. One flat ``torch.optim.LBFGS`` on the summed objective can be faster on rows that
    are alike and well conditioned; it cannot tell which rows converged.

    In :meth:`iterates`, step lengths and curvature are constants to autograd; the gradients they multiply are followed.

    Source: Liu & Nocedal (1989); the compact form, Byrd, Nocedal & Schnabel (1994), theorem 2.2.

    Args:
        steps: evaluations after the first, at most; in :meth:`iterates`, the number of iterates.
        memory: m, the number of pairs kept. More save evaluations on ill-conditioned rows, and cost time on all.
        dense: up to this many unknowns :meth:`solve` keeps H in full (:class:`~amortized.solvers.BFGS`), which is
            faster there; 0 never does.
        tol: gradient norm at which a row is finished; None chooses by dtype.
        noise: relative rounding of the objective that the line search allows for; None chooses by dtype (ε^⅔: 4e-11
            in float64, 2e-5 in float32). Much smaller values stall on ill-conditioned rows.
        first_step: length of the first trial, in units of b; see :class:`~amortized.solvers.smooth.quasi_newton.QuasiNewton`.
        unroll: last steps whose gradients are differentiated; None all, 0 none (first-order).
        chunk: rows at work at a time; None chooses so that the state stays in cache on a CPU, and takes all on a GPU.
        compile: fuse each round with ``torch.compile``; see :class:`~amortized.solvers.GradientSolver`.

    Raises:
        ValueError: if ``memory`` is less than 1, or ``first_step`` is not positive.
    """

    def __init__(
        self,
        steps: int = 1000,
        memory: int = 8,
        dense: int = 30,
        tol: float | None = None,
        noise: float | None = None,
        first_step: float = 2.0,
        unroll: int | None = None,
        chunk: int | None = None,
        compile: bool = False,
    ) -> None:
        super().__init__(steps, tol, noise, first_step, unroll, chunk, compile)
        if memory < 1:
            raise ValueError(f"memory must be at least 1, got {memory}")
        self.memory, self.dense = memory, dense

    def _solve(self, problem: Problem, a: Context, b: Tensor, dual: Tensor | None, trace: Trace | None) -> Solution:
        """As :meth:`Solver.solve`; with few unknowns by :class:`~amortized.solvers.BFGS` with the same settings."""
        if b[0].numel() > self.dense:
            return super()._solve(problem, a, b, dual, trace)
        full = BFGS(self.steps, self.tol, self.noise, self.first_step, self.unroll, self.chunk, self.compiled)
        return full._solve(problem, a, b, dual, trace)

    def chunk_size(self, b: Tensor) -> int:
        """Rows whose history takes 12 MB, enough of them to pay for a round's dispatch; 4 MB where rounds are compiled."""
        if self.chunk or b.is_cuda:
            return self.chunk or len(b)
        size = b[0].numel() * 2 * self.memory * b.element_size()
        return max(64, (4 if self.compiled else 12) * 2**20 // size)

    def init_hessian(self, b: Tensor) -> Pairs:
        """No pairs: slots without weight."""
        (size, n), m, new = b.shape, self.memory, b.new_zeros
        slot = torch.zeros(size, dtype=torch.int64, device=b.device)
        none = new(size, m, m)
        return Pairs(new(size, 2 * m, n), none, none, new(size, m), new(size, 2 * m), new(size) + 1, slot)

    def update_hessian(
        self, state: QuasiNewtonState, pair: Pair, grad: Tensor, accepted: Tensor, paired: Tensor
    ) -> tuple[Pairs, Tensor]:
        """The pair in place of the oldest; -H grad from two passes over the history.

        The slot of the oldest belongs to the pair of the row's next accepted trial, and has no weight until then.
        """
        m, (history, inverse, gram, diagonal, old, scale, slot) = self.memory, state.hessian
        products = times(history, grad)

        here = torch.arange(m, device=grad.device) == slot.unsqueeze(1)
        row, column = here.unsqueeze(2), here.unsqueeze(1)
        # R loses the oldest row and column, and gains the new column [Sᵀy; sᵀy]; so does R⁻¹, in closed form.
        inverse = torch.where(row | column, 0, inverse)
        change = products.detach() - old
        s_y = torch.where(here, 0, change[:, :m])
        y_y = torch.where(here, pair.yy.unsqueeze(1), change[:, m:])
        sy = torch.where(paired, pair.sy, torch.inf).unsqueeze(1)
        new = torch.where(here, 1.0, -times(inverse, s_y)) / sy
        inverse = torch.where(column, new.unsqueeze(2), inverse)
        gram = torch.where(row, y_y.unsqueeze(1), torch.where(column, y_y.unsqueeze(2), gram))
        diagonal = torch.where(here, pair.sy.unsqueeze(1), diagonal)
        scale = torch.where(paired, pair.sy / pair.yy, scale)
        p = torch.where(here, pair.sg.unsqueeze(1), products[:, :m])
        q = torch.where(here, self.layout.dot(pair.y, grad).unsqueeze(1), products[:, m:])
        history = _replace(history, slot, pair, here, paired)

        alpha = times(inverse, p)
        inner = diagonal * alpha + scale.unsqueeze(1) * (times(gram, alpha) - q)
        delta = times(inverse.mT, inner)
        coefficients = torch.cat([-delta, scale.unsqueeze(1) * alpha], 1)
        downhill = times(history.mT, coefficients)
        downhill = torch.addcmul(downhill, scale.unsqueeze(1), grad, value=-1)

        products = torch.where(accepted.unsqueeze(1), torch.cat([p, q], 1).detach(), old)
        slot = torch.where(paired, (slot + 1) % m, slot)
        return Pairs(history, inverse, gram, diagonal, products, scale, slot), downhill

    def reset(self, hessian: Pairs, rows: Tensor) -> Pairs:
        """The pairs stay, without weight."""
        one, two = rows.unsqueeze(1), rows[:, None, None]
        return hessian._replace(
            inverse=torch.where(two, 0, hessian.inverse),
            gram=torch.where(two, 0, hessian.gram),
            diagonal=torch.where(one, 0, hessian.diagonal),
            scale=torch.where(rows, 1, hessian.scale),
        )


def _replace(history: Tensor, slot: Tensor, pair: Pair, here: Tensor, paired: Tensor) -> Tensor:
    """The history with the pair in the slots that ``here`` ``(L, m)`` names, in place where nothing is differentiated."""
    latest = torch.stack([pair.s, pair.y], 1)
    if torch.is_grad_enabled():
        # Nothing of a trial that was not accepted: a NaN in it would spoil gradients, which multiply it by zero.
        here = here & paired.unsqueeze(1)
        return torch.where(here[:, None, :, None], latest.unsqueeze(2), history.unflatten(1, (2, -1))).flatten(1, 2)
    # One write, not two: of two, the compiler makes a copy of the history in between.
    row, slots = torch.arange(len(slot), device=slot.device).unsqueeze(1), torch.stack([slot, slot + here.shape[1]], 1)
    history[row, slots] = latest
    return history
