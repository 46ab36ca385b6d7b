"""Sets with a projection in closed form, as the last layer of a network or as ``refine``: no constraint has to be stated."""

from __future__ import annotations

import abc
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from amortized.contract import Context
from amortized.solvers.feasible.correction import Correction
from amortized.solvers.structured import proximal


class Onto(Correction):
    """``C(b)``, the nearest point of a set to ``b``: a layer, ``nn.Sequential(network, Simplex())``, and a solver."""

    @abc.abstractmethod
    def forward(self, b: Tensor) -> Tensor:
        """The nearest point, in the shape of ``b``."""

    def correct(self, problem: Any, a: Context, b: Tensor) -> Tensor:
        return self(b)


class Simplex(Onto):
    """``x ≥ 0`` and ``Σ x = 1`` along the last dimension; exact zeros are within reach, as they are not by a softmax."""

    def forward(self, b: Tensor) -> Tensor:
        return proximal.simplex(b)


class Box(Onto):
    """``lower ≤ x ≤ upper``.

    Args:
        lower: the least of every entry.
        upper: the largest.
    """

    def __init__(self, lower: float = 0.0, upper: float = 1.0) -> None:
        super().__init__()
        if lower > upper:
            raise ValueError(f"Box: lower must not be above upper, got {lower} and {upper}")
        self.lower, self.upper = lower, upper

    def forward(self, b: Tensor) -> Tensor:
        return proximal.box(b, self.lower, self.upper)


class Ball(Onto):
    """``‖x‖₂ ≤ radius`` in each row.

    Args:
        radius: of the ball.
    """

    def __init__(self, radius: float = 1.0) -> None:
        super().__init__()
        if radius <= 0:
            raise ValueError(f"Ball: radius must be positive, got {radius}")
        self.radius = radius

    def forward(self, b: Tensor) -> Tensor:
        return proximal.ball(b, self.radius)


class SecondOrderCone(Onto):
    """``‖x‖₂ ≤ t`` for ``b = (x, t)`` along the last dimension, t the last number."""

    def forward(self, b: Tensor) -> Tensor:
        return proximal.second_order_cone(b)


class Semidefinite(Onto):
    """Symmetric positive semidefinite matrices ``(*, k, k)``; the derivative is exact where eigenvalues coincide, too."""

    def forward(self, b: Tensor) -> Tensor:
        projected: Tensor = _Semidefinite.apply(b)
        return projected


class _Semidefinite(torch.autograd.Function):
    """``U max(λ, 0) Uᵀ``; backwards ``U (W ∘ Uᵀ g U) Uᵀ``, ``W_ij = (λ_i⁺ − λ_j⁺) / (λ_i − λ_j)``."""

    @staticmethod
    def forward(ctx: Any, b: Tensor) -> Tensor:
        values, u = torch.linalg.eigh((b + b.mT) / 2)
        ctx.save_for_backward(values, u)
        return (u * values.clamp(min=0).unsqueeze(-2)) @ u.mT

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        values, u = ctx.saved_tensors
        up, size = values.clamp(min=0), values.abs()
        # |λ_i| + |λ_j| in place of λ_i − λ_j: they differ in sign where the quotient is neither 0 nor 1.
        both = size.unsqueeze(-1) + size.unsqueeze(-2)
        weight = torch.where(
            both > 0, (up.unsqueeze(-1) + up.unsqueeze(-2)) / both.clamp(min=torch.finfo(both.dtype).tiny), 1
        )
        inner = u.mT @ ((grad + grad.mT) / 2) @ u
        return u @ (weight * inner) @ u.mT
