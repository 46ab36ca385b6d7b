"""The equalities of a polyhedron, factored once: a particular solution, and the directions that keep it one."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from amortized.contract import Context, Polyhedron, polyhedron
from amortized.solvers.engine.rows import times
from amortized.solvers.feasible.correction import Correction


class Factor(NamedTuple):
    """Of ``lower ≤ A b ≤ upper`` with rows E of A for the equalities and rows G for the others, in float64."""

    equal: Tensor
    """Which rows are E ``(m,)``."""
    pinv: Tensor
    """``E⁺``, ``(n, p)``."""
    null: Tensor
    """``Π = 1 − E⁺E``, onto the directions that no equality sees, ``(n, n)``."""
    a: Tensor
    """``G``, ``(m - p, n)``."""


class LinearCorrection(Correction):
    """A map onto a polyhedron: the problem has ``polyhedron(a)`` or ``program(a)``.

    Matrices that all contexts share are factored once, as long as the problem gives the same tensor A, and which of its rows
    are equalities is then read from the first batch. Matrices of each row's own are factored in every call. The arithmetic is in
    float64 whatever the dtype of predictions, which loses no more than the rounding of the result.
    """

    def __init__(self) -> None:
        super().__init__()
        self._known: tuple[Tensor, int, Factor] | None = None

    def require(self, problem: Any) -> None:
        """Raises ``TypeError`` unless the problem's constraints are linear."""
        if not hasattr(problem, "polyhedron") and not hasattr(problem, "program"):
            raise TypeError(
                f"{type(self).__name__} needs linear constraints: {type(problem).__name__} has neither polyhedron(a) nor "
                "program(a) (see amortized.contract); Seek takes constraints of any shape"
            )

    def stated(self, problem: Any, a: Context) -> tuple[Polyhedron, Factor]:
        """The bounds in float64, and the factor of the matrix."""
        A, lower, upper = polyhedron(problem, a)
        fixed = not (A.ndim == 3 or A.requires_grad or A.is_inference())
        if fixed and self._known is not None and self._known[0] is A and self._known[1] == A._version:
            found = self._known[2]
        else:
            found = factored(A, (lower == upper).all(0))
            self._known = (A, A._version, found) if fixed else None
        return Polyhedron(A, lower.double(), upper.double()), found

    def __getstate__(self) -> dict[str, Any]:
        """Copies factor anew: their problem has tensors of its own."""
        return {**super().__getstate__(), "_known": None}


def factored(A: Tensor, equal: Tensor) -> Factor:
    """The factor of a matrix ``(m, n)``, or of each row's own ``(B, m, n)``, whose rows ``equal`` are equalities."""
    A = A.double()
    e, g = A[..., equal, :], A[..., ~equal, :]
    pinv = torch.linalg.pinv(e)
    eye = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    return Factor(equal, pinv, eye - pinv @ e, g)


def particular(factor: Factor, at: Polyhedron) -> Tensor:
    """``E⁺ e``, the shortest point that meets the equalities ``(B, n)``."""
    return times(factor.pinv, at.upper[:, factor.equal])
