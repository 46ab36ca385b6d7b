"""Inner loops: solvers of B problems at once, one file each."""

from amortized.solvers.adam import Adam
from amortized.solvers.base import GradientSolver, Solution, Solver, Status
from amortized.solvers.bfgs import BFGS
from amortized.solvers.gradient_descent import GradientDescent
from amortized.solvers.lbfgs import LBFGS

__all__ = ["BFGS", "LBFGS", "Adam", "GradientDescent", "GradientSolver", "Solution", "Solver", "Status"]
