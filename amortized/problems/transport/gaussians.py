r"""The potential between two Gaussians, in closed form: a start for Sinkhorn's algorithm that costs nothing.

For ``alpha = N(m, S)``, ``beta = N(n, R)``, the cost ``|x - y|^2`` and a temperature ``epsilon`` the potential is quadratic,

    ``f(x) = |x|^2 - (x - m)^T A (x - m) - 2 n^T x``   up to a constant,
    ``A = S^(-1/2) ((S^(1/2) R S^(1/2) + (epsilon / 4)^2 I)^(1/2) - epsilon / 4 I) S^(-1/2)``,

where ``x -> n + A (x - m)`` is the barycentric map. Source: Janati, Muzellec, Peyré & Cuturi (2020), *Entropic optimal transport
between unbalanced Gaussian measures has a closed form*, theorem 1; as a start, Thornton & Cuturi (2023), *Rethinking
initialization of the Sinkhorn algorithm*.
"""

from __future__ import annotations

import torch
from torch import Tensor


def moments(weights: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    """Mean ``(B, d)`` and covariance ``(B, d, d)`` of measures ``(B, n)`` on points ``(n, d)`` or ``(B, n, d)``."""
    mean = (weights.unsqueeze(2) * points).sum(1)
    apart = points - mean.unsqueeze(1)
    return mean, (weights.unsqueeze(2) * apart).mT @ apart


def square_root(matrix: Tensor) -> Tensor:
    """The positive square root of symmetric positive semidefinite matrices ``(B, d, d)``."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp_min(0).sqrt().unsqueeze(1)) @ vectors.mT


def gaussian_potential(alpha: Tensor, x: Tensor, beta: Tensor, y: Tensor, epsilon: float) -> Tensor:
    """``f(x_i)`` between the Gaussians with the moments of two measures, ``(B, n)``.

    Args:
        alpha: weights ``(B, n)``.
        x: points ``(n, d)`` or ``(B, n, d)``.
        beta: weights ``(B, m)``.
        y: points ``(m, d)`` or ``(B, m, d)``.
        epsilon: the temperature.
    """
    (m, S), (n, R) = moments(alpha, x), moments(beta, y)
    identity = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    # A measure on a line, or a point, has no inverse: it is given a width that matters to nothing.
    width = 1e-4 * (S + R).diagonal(dim1=1, dim2=2).sum(1) + torch.finfo(x.dtype).tiny ** 0.5
    root = square_root(S + width[:, None, None] * identity)
    inverse = torch.linalg.inv(root)
    A = inverse @ (square_root(root @ R @ root + (epsilon / 4) ** 2 * identity) - epsilon / 4 * identity) @ inverse
    apart = x - m.unsqueeze(1)
    return x.square().sum(-1) - ((apart @ A) * apart).sum(2) - 2 * (x * n.unsqueeze(1)).sum(2)
