"""BFGS with the full inverse Hessian of every row, for few unknowns."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from amortized.solvers.quasi_newton import QuasiNewton, Walk


class Matrix(NamedTuple):
    """H as ``keep K + one 1 + s vᵀ + v sᵀ``: the last terms wait, so that one pass over K adds them and multiplies."""

    k: Tensor
    """``(n, n, L)``, symmetric: with rows last, sums over a small n run along whole rows of memory."""
    keep: Tensor
    one: Tensor
    s: Tensor
    v: Tensor


class BFGS(QuasiNewton):
    r"""BFGS: ``H ← H + s vᵀ + v sᵀ``, ``v = ½ (1 + yᵀHy / sᵀy) s / sᵀy − H y / sᵀy``, with H ``(n, n)`` in full.

    Costs n² numbers a row, in memory and for each step: faster than :class:`~amortized.solvers.LBFGS` up to some 30
    unknowns, and in fewer steps. :class:`~amortized.solvers.LBFGS` uses it by itself there.

    Source: Nocedal & Wright (2006), (6.17) and (6.20) for the scale of the first H.

    The arguments are those of :class:`~amortized.solvers.quasi_newton.QuasiNewton`.
    """

    axis = -1

    def num_lanes(self, b: Tensor) -> int:
        """Rows whose matrices take 2 MB: many enough that leaving the compiled code costs little, few enough for a cache."""
        if self.lanes or b.is_cuda:
            return self.lanes or len(b)
        return min(4096, max(64, 2**21 // (b[0].numel() ** 2 * b.element_size())))

    def ignorant(self, b: Tensor) -> Matrix:
        """H = 1."""
        n, size = b.shape
        nothing, zero = torch.zeros_like(b), b.new_zeros(size)
        return Matrix(b.new_zeros(n, n, size), zero, zero + 1, nothing, nothing)

    def learn(
        self, walk: Walk, s: Tensor, y: Tensor, grad: Tensor, accepted: Tensor, paired: Tensor
    ) -> tuple[Matrix, Tensor]:
        """Add the waiting terms to K, multiply, and let the new ones wait."""
        k, keep, one, u, w = walk.curvature
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            eye = torch.eye(len(k), dtype=k.dtype, device=k.device).unsqueeze(2)
            k = keep * k + one * eye + u.unsqueeze(1) * w + w.unsqueeze(1) * u
        else:
            k.mul_(keep).addcmul_(u.unsqueeze(1), w).addcmul_(w.unsqueeze(1), u)
            k.diagonal().add_(one.unsqueeze(1))
        h_grad = (k * grad).sum(1)
        sy = torch.where(paired, self.dot(s, y), 1)
        scale = torch.where(paired & walk.steepest, sy / self.dot(y, y), 1)
        h_grad = scale * h_grad
        # H y is the change of H g, and H g was minus the direction at the point before.
        h_y = h_grad.detach() + scale * walk.direction.detach()
        v = (0.5 * (1 + self.dot(y, h_y) / sy) / sy) * s - h_y / sy
        s, v = torch.where(paired, s, 0), torch.where(paired, v, 0)
        h_grad = h_grad + s * self.dot(v, grad) + v * self.dot(s, grad)
        return Matrix(k, scale, torch.zeros_like(one), s, v), h_grad

    def forget(self, curvature: Matrix, rows: Tensor) -> Matrix:
        """H = 1 in the named rows."""
        k, keep, one, s, v = curvature
        return Matrix(
            k, torch.where(rows, 0, keep), torch.where(rows, 1, one), torch.where(rows, 0, s), torch.where(rows, 0, v)
        )
