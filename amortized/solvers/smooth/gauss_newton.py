"""Gauss–Newton in a trust region, for sums of squares."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from amortized.contract import Context, take
from amortized.solvers.engine.rows import Rows
from amortized.solvers.smooth.newton import Newton, jacobian


class GaussNewton(Newton):
    r"""``b ← b + argmin_p ½ ‖r + J p‖²`` over ``‖p‖ ≤ Δ``, for ``L(b; a) = ½ ‖r(b; a)‖²`` with Jacobian J.

    First derivatives only, and H = JᵀJ is never indefinite: the method for fits with small residuals, where it
    converges as fast as :class:`~amortized.solvers.Newton`. Where residuals stay large it slows down.

    The problem has ``residuals(b, a) -> (B, m)`` (:class:`~amortized.contract.LeastSquares`).

    Source: Moré (1978), with the step of Moré & Sorensen (1983).

    The arguments are those of :class:`~amortized.solvers.Newton`.

    Raises:
        TypeError: from :meth:`solve`, if the problem lacks ``residuals``.
        ValueError: from :meth:`solve`, if ``objective`` is not half the sum of squares.
    """

    needs = ("residuals",)

    def begin(self, problem: Any, a: Context, b: Tensor) -> Rows:
        """Rows that start at ``b``, after a check that objective and residuals agree."""
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
        r, j = jacobian_of(problem, b, a)
        r = r.unsqueeze(2)
        return (r * r).sum((1, 2)) / 2, (j.mT @ r).squeeze(2), j.mT @ j


def jacobian_of(problem: Any, b: Tensor, a: Context) -> tuple[Tensor, Tensor]:
    """The residuals r ``(L, m)`` at ``b`` ``(L, *)`` and their Jacobian ``(L, m, n)``.

    Forward mode takes n passes over the problem, all rows in each, and reverse mode m that cost less: forward mode is
    taken where ``2 n ≤ m`` (two to eight times as fast there), unless an operation has no forward derivative.
    """
    n, kind = b[0].numel(), type(problem)
    if kind not in _REVERSE and 2 * n <= problem.residuals(b[:1], take(a, slice(0, 1))).shape[1]:
        try:
            return _forward(problem, b, a)
        except (NotImplementedError, RuntimeError):
            _REVERSE.add(kind)
    with torch.enable_grad():
        flat = b.detach().flatten(1).requires_grad_()
        r = problem.residuals(flat.view(b.shape), a)
        return r.detach(), jacobian(r, flat)


def _forward(problem: Any, b: Tensor, a: Context) -> tuple[Tensor, Tensor]:
    def along(direction: Tensor) -> Any:
        tangent = direction.view(1, *b.shape[1:]).expand_as(b)
        return torch.func.jvp(lambda b: problem.residuals(b, a), (b,), (tangent,))

    unit, out_dims = torch.eye(b[0].numel(), dtype=b.dtype, device=b.device), (None, 2)
    found: tuple[Tensor, Tensor] = torch.func.vmap(along, out_dims=out_dims, randomness="same")(unit)  # type: ignore[arg-type]
    return found


_REVERSE: set[type] = set()
"""Kinds of problems with an operation that has no forward derivative, or cannot be batched over."""
