"""Gauss–Newton in a trust region, for sums of squares."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from amortized.problem import Context
from amortized.solvers.base import require
from amortized.solvers.newton import Newton, jacobian
from amortized.solvers.rows import Rows


class GaussNewton(Newton):
    r"""``b ← b + argmin_p ½ ‖r + J p‖²`` over ``‖p‖ ≤ Δ``, for ``L(b; a) = ½ ‖r(b; a)‖²`` with Jacobian J.

    First derivatives only, and H = JᵀJ is never indefinite: the method for fits with small residuals, where it
    converges as fast as :class:`~amortized.solvers.Newton`. Where residuals stay large it slows down.

    The problem has ``residuals(b, a) -> (B, m)`` (:class:`~amortized.problem.LeastSquares`).

    Source: Moré (1978), with the step of Moré & Sorensen (1983).

    The arguments are those of :class:`~amortized.solvers.Newton`.

    Raises:
        TypeError: from :meth:`solve`, if the problem lacks ``residuals``.
        ValueError: from :meth:`solve`, if ``objective`` is not half the sum of squares.
    """

    needs = ("residuals",)

    def begin(self, problem: Any, a: Context, b: Tensor) -> Rows:
        """Rows that start at ``b``, after a look whether objective and residuals agree."""
        require(self, problem, "residuals")
        value, half = problem.objective(b, a), problem.residuals(b, a).square().sum(1) / 2
        off = (value - half).abs() > 1e-3 * (half.abs() + 1e-6)
        if bool(off.any()):
            i = int(off.nonzero()[0])
            raise ValueError(
                f"GaussNewton minimizes half the sum of squared residuals, {float(half[i]):.6g} in row {i}, but "
                f"objective returned {float(value[i]):.6g}; scale one of them."
            )
        return super().begin(problem, a, b)

    def model(self, problem: Any, b: Tensor, a: Context) -> tuple[Tensor, Tensor, Tensor]:
        """``½ ‖r‖²``, ``Jᵀr`` and ``JᵀJ``."""
        with torch.enable_grad():
            flat = b.detach().flatten(1).requires_grad_()
            r = problem.residuals(flat.view(b.shape), a)
            j = jacobian(r, flat)
        r = r.detach().unsqueeze(2)
        return (r * r).sum((1, 2)) / 2, (j.mT @ r).squeeze(2), j.mT @ j
