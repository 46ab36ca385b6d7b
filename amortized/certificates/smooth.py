"""Certificates of unconstrained minima, by the gradient, and of fixed points, by the residual."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from amortized.certificates.base import Certificate
from amortized.contract import Context, map_leaves, value_and_grad
from amortized.solvers.base import ordinary


class Gradient(Certificate):
    r"""``L(b) − min L ≤ ‖∇L(b)‖² / 2μ``, for an objective that is μ-strongly convex in b, without constraints.

    Without ``strong_convexity`` the number is ``‖∇L(b)‖``, a residual.

    Source: Nesterov (2004), theorem 2.1.10.

    Args:
        strong_convexity: μ, in units of L over those of b².

    Raises:
        ValueError: if ``strong_convexity`` is not positive.
    """

    kind = "gradient"

    def __init__(self, strong_convexity: float | None = None) -> None:
        if strong_convexity is not None and strong_convexity <= 0:
            raise ValueError(f"strong_convexity must be positive, or None if it is not known; got {strong_convexity}")
        self.strong_convexity = strong_convexity

    @property
    def claim(self) -> Literal["bound", "residual"]:
        return "residual" if self.strong_convexity is None else "bound"

    def bound(self, problem: Any, b: Tensor, a: Context) -> Tensor:
        self.require(problem)
        with torch.inference_mode(False):
            _, grad = value_and_grad(problem, ordinary(b), map_leaves(ordinary, a))
        square = grad.flatten(1).square().sum(1)
        return square.sqrt() if self.strong_convexity is None else square / (2 * self.strong_convexity)


class FixedPoint(Certificate):
    r"""``‖b − b*‖ ≤ ‖T(b) − b‖ / (1 − q)``, for a map that contracts by q; without ``contraction`` the residual.

    Where the problem has ``fixed_point_error``, that is the residual, in the problem's own units.

    Source: Banach (1922).

    Args:
        contraction: q, below 1, in the Euclidean norm.

    Raises:
        ValueError: if ``contraction`` is not in [0, 1).
    """

    kind = "fixed point"
    needs = ("update",)

    def __init__(self, contraction: float | None = None) -> None:
        if contraction is not None and not 0 <= contraction < 1:
            raise ValueError(f"contraction must be in [0, 1), or None if it is not known; got {contraction}")
        self.contraction = contraction

    @property
    def claim(self) -> Literal["bound", "residual"]:
        return "residual" if self.contraction is None else "bound"

    def bound(self, problem: Any, b: Tensor, a: Context) -> Tensor:
        self.require(problem)
        with torch.no_grad():
            moved = problem.update(b, a)
            if self.contraction is not None:
                return (moved - b).flatten(1).norm(dim=1) / (1 - self.contraction)
            if hasattr(problem, "fixed_point_error"):
                error: Tensor = problem.fixed_point_error(b, moved, a)
                return error
            return (moved - b).flatten(1).norm(dim=1)
