"""Projected gradient: an objective over a set that rows can be projected on."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from amortized.contract import Composite, Context, Projectable
from amortized.solvers.structured.fista import FISTA


class _Indicator:
    """The objective over the set, as smooth + indicator, whose proximal map is the projection."""

    def __init__(self, problem: Projectable) -> None:
        self.problem = problem
        self.objective = self.smooth = problem.objective

    def prox(self, b: Tensor, t: Tensor, a: Context) -> Tensor:
        return self.problem.project(b, a)


class ProjectedGradient(FISTA):
    r"""``b ← Π(y − s ∇L(y; a))``, accelerated as :class:`~amortized.solvers.FISTA`; Π is the problem's ``project``.

    For boxes, balls, simplices: convex sets that are cheap to project on. A start outside the set is projected first,
    and it is that projection that is never worsened.

    Source: Beck & Teboulle (2009), with the indicator of the set as r.

    The arguments are those of :class:`~amortized.solvers.FISTA`.

    Raises:
        TypeError: from :meth:`solve`, if the problem lacks ``project``.
    """

    needs = ("project",)

    def composite(self, problem: Any) -> Composite:
        """The problem with the projection as its proximal map."""
        if isinstance(problem, _Indicator):
            return problem
        return _Indicator(problem)

    def begin(self, problem: Any, a: Context, b: Tensor) -> Any:
        """Rows at the projection of ``b``."""
        problem = self.composite(problem)
        return super().begin(problem, a, problem.prox(b, b.flatten(1)[:, 0], a))
