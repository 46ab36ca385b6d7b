"""BFGS with the full inverse Hessian of every row, for few unknowns."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from amortized.solvers.engine.rows import Layout
from amortized.solvers.smooth.quasi_newton import Pair, QuasiNewton, QuasiNewtonState


class Matrix(NamedTuple):
    """H as ``keep K + one 1 + sum_i (s_i v_iᵀ + v_i s_iᵀ)``: the last terms wait, as each pass over K takes long."""

    k: Tensor
    """``(n, n, L)``, symmetric: with rows last, sums over a small n run along whole rows of memory."""
    keep: Tensor
    one: Tensor
    s: Tensor
    """``(p, n, L)``: the latest p."""
    v: Tensor


class BFGS(QuasiNewton):
    r"""BFGS: ``H ← H + s vᵀ + v sᵀ``, ``v = ½ (1 + yᵀHy / sᵀy) s / sᵀy − H y / sᵀy``, with H ``(n, n)`` in full.

    Costs n² numbers a row, in memory and for each step: faster than :class:`~amortized.solvers.LBFGS` up to some 30
    unknowns, and in fewer steps. :class:`~amortized.solvers.LBFGS` uses it by itself there.

    Source: Nocedal & Wright (2006), (6.17) and (6.20) for the scale of the first H.

    The arguments are those of :class:`~amortized.solvers.smooth.quasi_newton.QuasiNewton`.
    """

    layout = Layout(-1)

    def chunk_size(self, b: Tensor) -> int:
        """Rows whose matrices take 8 MB, enough of them to pay for a round's dispatch.

        2 MB where rounds are compiled, which a cache then holds; half of that where a call makes two rounds of them.
        """
        if self.chunk or b.is_cuda:
            return self.chunk or len(b)
        n = b[0].numel()
        size = 2**21 // self.waiting(n) if self.compiled else 2**23
        return min(4096, max(64, size // (n**2 * b.element_size())))

    def together(self, n: int) -> int:
        """As in the base class; two at least, so that a larger K is read more often than written."""
        return max(2, super().together(n))

    def waiting(self, n: int) -> int:
        """How many pairs wait before they are added to K: those of the rounds compiled together, if K is large."""
        return self.together(n) if self.compiled and not self.tiny(n) else 1

    def init_hessian(self, b: Tensor) -> Matrix:
        """H = 1."""
        n, size = b.shape
        nothing, zero = b.new_zeros(self.waiting(n), n, size), b.new_zeros(size)
        return Matrix(b.new_zeros(n, n, size), zero, zero + 1, nothing, nothing)

    def update_hessian(
        self, state: QuasiNewtonState, pair: Pair, grad: Tensor, accepted: Tensor, paired: Tensor
    ) -> tuple[Matrix, Tensor]:
        """Add the pairs that wait to K, if they are as many as may; multiply, and let the new one wait."""
        H = state.hessian
        if len(H.s) == self.waiting(len(grad)):
            H = _added(H)
            h_grad = (H.k * grad).sum(1)
        else:
            h_grad = H.keep * (H.k * grad).sum(1) + H.one * grad
        for u, w in zip(H.s, H.v, strict=True):
            h_grad = h_grad + u * self.layout.dot(w, grad) + w * self.layout.dot(u, grad)
        inverse = 1 / torch.where(paired, pair.sy, 1)
        scale = torch.where(paired & state.steepest, pair.sy / pair.yy, 1)
        h_grad = scale * h_grad
        # H y is the change of H g, and H g was minus the direction at the point before.
        h_y = h_grad.detach() + scale * state.direction.detach()
        v = inverse * ((0.5 + 0.5 * inverse * self.layout.dot(pair.y, h_y)) * pair.s - h_y)
        s, v = torch.where(paired, pair.s, 0), torch.where(paired, v, 0)
        h_grad = h_grad + s * self.layout.dot(v, grad) + v * pair.sg
        # What is scaled is H = 1, with no pair waiting.
        s, v = torch.cat([H.s, s.unsqueeze(0)]), torch.cat([H.v, v.unsqueeze(0)])
        return Matrix(H.k, scale * H.keep, scale * H.one, s, v), -h_grad

    def reset(self, hessian: Matrix, rows: Tensor) -> Matrix:
        """H = 1 in the named rows."""
        k, keep, one, s, v = hessian
        return Matrix(
            k, torch.where(rows, 0, keep), torch.where(rows, 1, one), torch.where(rows, 0, s), torch.where(rows, 0, v)
        )


def _added(H: Matrix) -> Matrix:
    """H with nothing waiting: in K, in place where it can be."""
    k, keep, one, s, v = H
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        eye = torch.eye(len(k), dtype=k.dtype, device=k.device).unsqueeze(2)
        k = keep * k + one * eye
        for u, w in zip(s, v, strict=True):
            k = k + u.unsqueeze(1) * w + w.unsqueeze(1) * u
    else:
        k.mul_(keep).diagonal().add_(one.unsqueeze(1))
        for u, w in zip(s, v, strict=True):
            k.addcmul_(u.unsqueeze(1), w).addcmul_(w.unsqueeze(1), u)
    return Matrix(k, torch.ones_like(keep), torch.zeros_like(one), s[:0], v[:0])
