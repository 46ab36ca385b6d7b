"""Newton steps under equations, for all rows at once: the linear algebra that interior points share."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

ATTEMPTS = 20
"""Times that a matrix is shifted further before its row is given up."""


class NewtonSystem(NamedTuple):
    """``[H + δ, Jᵀ; J, 0]`` of each row, factored, where H + δ is positive definite on the null space of J.

    It has the solutions of ``[M, Jᵀ; J, 0]`` with ``M = H + δ + ρ JᵀJ``, when ``ρ Jᵀ r₂`` is added to the right-hand side; and
    for ρ large enough M is positive definite just where H + δ is on that null space: a Cholesky factor tells.
    """

    h: Tensor
    j: Tensor
    rho: Tensor
    factor: Tensor
    """Of M ``(L, n, n)``."""
    reduced: Tensor
    """``M^{-1/2} Jᵀ`` ``(L, n, p)``."""
    schur: Tensor
    """The factor of ``J M⁻¹ Jᵀ`` ``(L, p, p)``."""
    delta: Tensor
    """δ ``(L,)``, 0 where no shift was needed."""
    sound: Tensor
    """Which rows could be factored ``(L,)``."""

    def solve(self, r1: Tensor, r2: Tensor) -> tuple[Tensor, Tensor]:
        """``(x, y)`` with ``(H + δ) x + Jᵀ y = r₁`` and ``J x = r₂``, refined once."""
        x, y = self._solve(r1, r2)
        left1 = r1 - _times(self.h, x) - _times(self.j.mT, y)
        more_x, more_y = self._solve(left1, r2 - _times(self.j, x))
        return x + more_x, y + more_y

    def _solve(self, r1: Tensor, r2: Tensor) -> tuple[Tensor, Tensor]:
        r1 = r1 + self.rho.unsqueeze(1) * _times(self.j.mT, r2)
        u = torch.linalg.solve_triangular(self.factor, r1.unsqueeze(2), upper=False)
        if self.j.shape[1]:
            right = (self.reduced.mT @ u).squeeze(2) - r2
            y = torch.cholesky_solve(right.unsqueeze(2), self.schur)
            u = u - self.reduced @ y
        else:
            y = r2.unsqueeze(2)
        x = torch.linalg.solve_triangular(self.factor.mT, u, upper=True)
        return x.squeeze(2), y.squeeze(2)


def newton_system(h: Tensor, j: Tensor, size: Tensor, last: Tensor | None = None) -> NewtonSystem:
    """The factored system of rows with Hessians ``h`` ``(L, n, n)`` and Jacobians ``j`` ``(L, p, n)``.

    Args:
        h: symmetric.
        j: of the equations; p may be 0.
        size: of the objective's own curvature ``(L,)``, without that of barriers: what shifts are relative to.
        last: the shift that the row needed last, where the search for one starts ``(L,)``.

    Source: the shifts are those of Wächter & Biegler (2006), IPOPT, algorithm IC, with Cholesky's test of definiteness.
    """
    n, p = h.shape[1], j.shape[1]
    usable = h.flatten(1).isfinite().all(1) & j.flatten(1).isfinite().all(1)
    eye = torch.eye(n, dtype=h.dtype, device=h.device)
    h, j = torch.where(usable[:, None, None], h, eye), torch.where(usable[:, None, None], j, 0)
    size = torch.where(usable & (size > 0), size, 1)
    scale = j.square().sum((1, 2)) / max(p, 1)
    rho = torch.where(scale > 0, 10 * size / scale, 0)
    m = h + rho[:, None, None] * (j.mT @ j)
    factor, info = torch.linalg.cholesky_ex(m)
    delta = torch.zeros_like(size)
    first = 1e-4 * size if last is None else torch.maximum(last / 3, 1e-8 * size)
    for _ in range(ATTEMPTS):
        index = (info > 0).nonzero()[:, 0]
        if not len(index):
            break
        delta[index] = torch.where(delta[index] > 0, 8 * delta[index], first[index])
        factor[index], info[index] = torch.linalg.cholesky_ex(m[index] + delta[index, None, None] * eye)
    failed = info > 0
    factor = torch.where(failed[:, None, None], eye, factor)
    reduced = torch.linalg.solve_triangular(factor, j.mT, upper=False)
    s = reduced.mT @ reduced
    diagonal = s.diagonal(dim1=1, dim2=2)
    s = s + torch.diag_embed(1e-13 * diagonal + 1e-15 * diagonal.sum(1, keepdim=True))
    schur, singular = torch.linalg.cholesky_ex(s)
    if bool((singular > 0).any()):  # equations that repeat each other
        schur, singular = torch.linalg.cholesky_ex(
            s + torch.diag_embed(1e-8 * diagonal + 1e-8 * diagonal.mean(1, keepdim=True))
        )
    sound = usable & ~failed & (singular == 0)
    return NewtonSystem(h + delta[:, None, None] * eye, j, rho, factor, reduced, schur, delta, sound)


def _times(matrix: Tensor, x: Tensor) -> Tensor:
    return torch.bmm(matrix, x.unsqueeze(2)).squeeze(2)
