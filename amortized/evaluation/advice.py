"""Whether the gap that was measured means what it seems to, told from what was found."""

from __future__ import annotations

from typing import Any

from amortized.solvers import InteriorPoint, MultiStart, Solver
from amortized.solvers.structure import structure


def advice(problem: Any, solver: Solver, gap: dict[str, float]) -> str | None:
    """What to change first, in one line; ``None`` where nothing speaks against the measurement.

    Args:
        problem: whose gap was measured.
        solver: the reference.
        gap: the statistics of :class:`~amortized.evaluation.metric.AmortizationGap`.
    """
    if gap["unbounded"] > 0:
        return f"the objective seems unbounded below on {gap['unbounded']:.1%} of the rows: is a constraint missing?"
    used = solver.solver if isinstance(solver, MultiStart) else solver
    methods, better = structure(problem)
    if used.needs == Solver.needs != methods and not isinstance(used, better):
        return f"the problem has {' and '.join(methods)}, which {type(used).__name__} ignores: --gap.solver {better.__name__}"
    if gap.get("unsolved", 0) - gap.get("impossible", 0) > 0.05:
        return (
            f"the solver found nothing feasible on {gap['unsolved']:.1%} of the rows, and has no proof that there is nothing "
            f"on {gap['unsolved'] - gap['impossible']:.1%}: more --gap.solver.steps, or --gap.solver MultiStart"
        )
    if gap.get("feasible", 1) < 0.5 * gap.get("reference_feasible", 1):
        return (
            f"only {gap['feasible']:.1%} of the predictions are feasible: a loss that knows the constraints (--model.loss "
            "PenaltyLoss), or a model that meets them (--model.refine Projection, Gauge, Seek)"
        )
    if abs(gap["mean"]) <= gap["rounding"] and gap["rounding"] > 1e-9 * abs(gap["network"]):
        return (
            f"float32 does not resolve this gap: differences below {gap['rounding']:.1g} are rounding of the objective, "
            "which could not be evaluated in float64; --trainer.precision 64-true does"
        )
    if gap["lost"] > 0.05 and not isinstance(solver, MultiStart):
        return (
            f"the solver started cold lost to the network on {gap['lost']:.1%} of the rows: if there are many minima, "
            f"--gap.solver MultiStart --gap.solver.solver {type(solver).__name__}"
        )
    if gap["converged"] < 0.5:
        kinks = (
            "where objective or constraints have kinks, --gap.solver AugmentedLagrangian"
            if isinstance(used, InteriorPoint)
            else "for an objective with kinks, smooth and prox (FISTA), or Adam"
        )
        return (
            f"the solver converged on {gap['converged']:.1%} of the rows only, so the true gap may be larger: more "
            f"--gap.solver.steps, a larger --gap.solver.tol; {kinks}"
        )
    return None
