"""Inner loops: solvers of B problems at once, one file each.

============================================  =====================================================================
what the problem has                          solver
============================================  =====================================================================
only ``objective``, smooth                    :class:`LBFGS`, the default (:class:`BFGS` up to 30 unknowns by itself)
many minima                                   :class:`MultiStart` around it
noise or kinks in ``objective``               :class:`Adam`, its step size chosen by :func:`tune`
no useful gradient                            :class:`CMAES`
few unknowns, twice differentiable            :class:`Newton`
``residuals``: a sum of squares               :class:`GaussNewton`
``smooth`` and ``prox``                       :class:`FISTA`, with the maps of :mod:`amortized.solvers.structured.proximal`
``project``: a convex set                     :class:`ProjectedGradient`
``program``: a quadratic program              :class:`ADMM`
``equality``, ``inequality``                  :class:`InteriorPoint`; :class:`AugmentedLagrangian` for kinks, many unknowns
``update``: a fixed point                     :class:`Anderson`
============================================  =====================================================================

:func:`solver_for` chooses by what the problem has.

To make a prediction feasible inside ``forward``: :class:`Gauge`, exact for linear constraints and cheap; :class:`Projection`;
:class:`LinearCompletion`; :class:`Seek` for any constraints; :class:`Simplex`, :class:`Box`, :class:`Ball`,
:class:`SecondOrderCone`, :class:`Semidefinite`; and a :class:`Sequence` of such.

To refine a prediction inside ``forward``: :class:`LearnedUpdate`, :class:`GradientDescent`, :class:`Adam`,
:class:`FISTA`, :class:`Anderson`, or the quasi-Newton solvers; or any solver at all inside :class:`Implicit`, which
differentiates where it ends instead of the way there. For a single problem (B = 1) use
:class:`amortized.solvers.external.SciPy`: a round costs mostly the dispatch of its operations, which only many rows pay
back. On many rows that are alike and well conditioned, one ``torch.optim.LBFGS`` on the sum of their objectives can be
as fast; it does not say which rows converged.
"""

from amortized.solvers.base import Solution, Solver, Status
from amortized.solvers.cma_es import CMAES
from amortized.solvers.engine.gradient import GradientSolver
from amortized.solvers.feasible.gauge import Gauge
from amortized.solvers.feasible.linear_completion import LinearCompletion
from amortized.solvers.feasible.projection import Projection
from amortized.solvers.feasible.seek import Seek
from amortized.solvers.feasible.sets import Ball, Box, SecondOrderCone, Semidefinite, Simplex
from amortized.solvers.implicit import Implicit
from amortized.solvers.multistart import Exploration, MultiStart
from amortized.solvers.sequence import Sequence
from amortized.solvers.smooth.adam import Adam
from amortized.solvers.smooth.bfgs import BFGS
from amortized.solvers.smooth.gauss_newton import GaussNewton
from amortized.solvers.smooth.gradient_descent import GradientDescent
from amortized.solvers.smooth.lbfgs import LBFGS
from amortized.solvers.smooth.learned_update import LearnedUpdate
from amortized.solvers.smooth.newton import Newton
from amortized.solvers.structure import solver_for
from amortized.solvers.structured.admm import ADMM
from amortized.solvers.structured.augmented_lagrangian import AugmentedLagrangian
from amortized.solvers.structured.completion import Completion
from amortized.solvers.structured.fista import FISTA
from amortized.solvers.structured.fixed_point import Anderson, LearnedAnderson
from amortized.solvers.structured.interior_point import InteriorPoint
from amortized.solvers.structured.projected_gradient import ProjectedGradient
from amortized.solvers.tune import tune

__all__ = [
    "Sequence",
    "Simplex",
    "Semidefinite",
    "SecondOrderCone",
    "Box",
    "Ball",
    "Seek",
    "Projection",
    "LinearCompletion",
    "ADMM",
    "BFGS",
    "CMAES",
    "FISTA",
    "LBFGS",
    "Adam",
    "Anderson",
    "AugmentedLagrangian",
    "Completion",
    "Exploration",
    "Gauge",
    "GaussNewton",
    "GradientDescent",
    "GradientSolver",
    "Implicit",
    "InteriorPoint",
    "LearnedAnderson",
    "LearnedUpdate",
    "MultiStart",
    "Newton",
    "ProjectedGradient",
    "Solution",
    "Solver",
    "Status",
    "solver_for",
    "tune",
]
