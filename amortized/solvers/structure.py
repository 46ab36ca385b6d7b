"""The solver that a problem's structure asks for."""

from __future__ import annotations

from typing import Any

from amortized.contract import differentiable
from amortized.solvers.base import Solver
from amortized.solvers.cma_es import CMAES
from amortized.solvers.smooth.gauss_newton import GaussNewton
from amortized.solvers.smooth.lbfgs import LBFGS
from amortized.solvers.structured.admm import ADMM
from amortized.solvers.structured.fista import FISTA
from amortized.solvers.structured.interior_point import InteriorPoint
from amortized.solvers.structured.projected_gradient import ProjectedGradient

STRUCTURES: tuple[tuple[tuple[str, ...], type[Solver]], ...] = (
    (("program",), ADMM),
    (("equality",), InteriorPoint),
    (("inequality",), InteriorPoint),
    (("smooth", "prox"), FISTA),
    (("project",), ProjectedGradient),
    (("residuals",), GaussNewton),
    (("objective",), LBFGS),
)
"""What a problem may have, and the solver that uses it; the first that it has counts."""


def structure(problem: Any) -> tuple[tuple[str, ...], type[Solver]]:
    """The methods that a problem is best solved by, and the class of the solver that calls them; a black box has its values."""
    if not differentiable(problem):
        return ("objective",), CMAES
    return next((names, kind) for names, kind in STRUCTURES if all(hasattr(problem, name) for name in names))


def solver_for(problem: Any) -> Solver:
    """The solver of a problem where none is named, with its default settings: that of its :func:`structure`.

    >>> class Bowl:
    ...     def objective(self, b, a):
    ...         return (b - a).square().sum(1)
    >>> type(solver_for(Bowl())).__name__
    'LBFGS'
    """
    return structure(problem)[1]()
