"""Inner loops: solvers of B problems at once, one file each."""

from amortized.solvers.adam import Adam
from amortized.solvers.admm import ADMM
from amortized.solvers.augmented_lagrangian import AugmentedLagrangian
from amortized.solvers.base import GradientSolver, Solution, Solver, Status
from amortized.solvers.bfgs import BFGS
from amortized.solvers.cma_es import CMAES
from amortized.solvers.fista import FISTA
from amortized.solvers.fixed_point import Anderson
from amortized.solvers.gauss_newton import GaussNewton
from amortized.solvers.gradient_descent import GradientDescent
from amortized.solvers.lbfgs import LBFGS
from amortized.solvers.multistart import Exploration, MultiStart
from amortized.solvers.newton import Newton
from amortized.solvers.projected_gradient import ProjectedGradient
from amortized.solvers.tune import tune

__all__ = [
    "ADMM",
    "BFGS",
    "CMAES",
    "FISTA",
    "LBFGS",
    "Adam",
    "Anderson",
    "AugmentedLagrangian",
    "Exploration",
    "GaussNewton",
    "GradientDescent",
    "GradientSolver",
    "MultiStart",
    "Newton",
    "ProjectedGradient",
    "Solution",
    "Solver",
    "Status",
    "tune",
]
