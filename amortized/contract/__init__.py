"""What a solver, a loss or a metric may ask of a problem: ``objective``, and nothing from Lightning.

A problem is any object with ``objective(b, a) -> (B,)``: B independent problems ``min_b L(b; a)`` at once, one to a
row. Contexts ``a`` are a tensor or a ``NamedTuple`` of tensors; solutions ``b`` are one real tensor ``(B, *)``.
"""

from amortized.contract.check import check_constraints, check_context, check_objective, check_support
from amortized.contract.constraints import (
    Bounded,
    best_of,
    better,
    bounded,
    constrained,
    feasibility_tol,
    feasible_value,
    violation,
)
from amortized.contract.draws import CommonDraws, draws, is_random, start_draws
from amortized.contract.error import ProblemError
from amortized.contract.problem import (
    BlackBox,
    Composite,
    Constrained,
    FixedPoint,
    Known,
    LeastSquares,
    LinearlyConstrained,
    Polyhedron,
    Predictor,
    Problem,
    Projectable,
    Quadratic,
    QuadraticProgram,
    differentiable,
    evaluate,
    polyhedron,
    value_and_grad,
)
from amortized.contract.processes import of_every_process
from amortized.contract.rows import Context, concatenate, leaves, map_leaves, num_rows, row_hashes, rows_where, take
from amortized.contract.solved import Solved, check_solved, context_of
from amortized.contract.streams import check_seed, stream_seed

__all__ = [
    "BlackBox",
    "Bounded",
    "CommonDraws",
    "Composite",
    "Constrained",
    "Context",
    "FixedPoint",
    "Known",
    "LeastSquares",
    "LinearlyConstrained",
    "Polyhedron",
    "Predictor",
    "Problem",
    "ProblemError",
    "Projectable",
    "Quadratic",
    "QuadraticProgram",
    "Solved",
    "best_of",
    "better",
    "bounded",
    "check_constraints",
    "check_context",
    "check_objective",
    "check_seed",
    "check_solved",
    "check_support",
    "concatenate",
    "constrained",
    "context_of",
    "differentiable",
    "draws",
    "evaluate",
    "feasibility_tol",
    "feasible_value",
    "is_random",
    "leaves",
    "map_leaves",
    "num_rows",
    "polyhedron",
    "row_hashes",
    "of_every_process",
    "rows_where",
    "start_draws",
    "stream_seed",
    "take",
    "value_and_grad",
    "violation",
]
