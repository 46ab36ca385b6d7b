"""The gap of a batch of predictions, against a solver started cold and from the prediction."""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import Tensor

from amortized.contract import (
    Context,
    draws,
    evaluate,
    is_random,
    stream_seed,
    take,
)
from amortized.evaluation.float64 import at_least_float32, in_float64
from amortized.evaluation.metric import GapRows
from amortized.module import AmortizedModule
from amortized.solvers import Solution, Solver
from amortized.solvers.base import tolerance


def measure_gap(
    problem: AmortizedModule,
    a: Context,
    b: Tensor,
    solver: Solver,
    index: Tensor,
    seed: int = 0,
    decompose: bool = False,
) -> tuple[GapRows, Tensor]:
    """The gap of predictions ``b`` for contexts ``a``, and the reference solutions.

    The reference of a row is the better of two solver runs, one from ``problem.initial(a)``, one from ``b``. A random
    objective is searched with fixed draws, chosen between on a second set, and evaluated, all sides alike, on a third, and
    once more on a fourth, to say how much of the gap is noise. One that is not random has the prediction itself among the
    candidates, so that no gap is below 0. Whatever the solver's precision, values are compared in float64 where the problem
    can be evaluated so; ``rounding`` says what they can be off by. A module in half precision is measured in float32.

    Args:
        problem: the module.
        a: B contexts.
        b: predictions, ``(B, *)``.
        solver: the inner loop.
        index: ``(B,)``, the rows' places in the whole set.
        seed: number of the draws of a random objective, in streams of their own.
        decompose: also find the terms of :func:`~amortized.evaluation.metric.decomposition`, where the problem declares its
            ``optimum``; unless it declares ``family_optimum`` too, that costs another solver run, :func:`longer`.
    """
    problem, a = at_least_float32(problem, a)
    with torch.no_grad():
        a = problem.prepare(a)
    b = b.detach().to(torch.promote_types(b.dtype, torch.float32))
    search, choice, value, fresh = (
        stream_seed(0, f"gap {use}", seed) for use in ("search", "choice", "value", "again")
    )
    runs: list[Solution] = []
    for start in (problem.initial(a), b):
        with draws(search, b.device):
            runs.append(solver.solve(problem, a, start.to(b.dtype)))
    cold, warm = runs

    exact = in_float64(problem)
    precision = torch.float64

    def values(of: Tensor, seed: int) -> Tensor:
        nonlocal precision
        if precision == torch.float64:
            with draws(seed, b.device):
                found = exact(of, a)
            if found is not None:
                return found
        with draws(seed, b.device):
            found = evaluate(problem, of, a)
        precision = found.dtype
        return found.double()

    on_cold, on_warm = (values(run.b, choice).nan_to_num(nan=torch.inf) for run in runs)
    use_warm = on_warm <= on_cold
    best = torch.where(_wide(use_warm, b), warm.b, cold.b)
    random = len(b) > 0 and is_random(problem, b[:1], take(a, slice(0, 1)))
    if not random:  # the solver's own arithmetic may have taken for lower what is not
        best = torch.where(_wide(values(b, choice) < torch.minimum(on_warm, on_cold), b), b, best)
    rows = GapRows(
        index=index,
        network=values(b, value),
        reference=values(best, value),
        cold=values(cold.b, value),
        converged=torch.where(use_warm, warm.converged, cold.converged),
        evaluations=cold.evaluations,
    )
    largest = torch.maximum(rows.network.abs(), rows.reference.abs())
    unknown = torch.full_like(rows.network, torch.nan)
    again = values(b, fresh) - values(best, fresh) if random else rows.gap
    rounding = 4 * torch.finfo(precision).eps * largest
    rows = rows._replace(again=again, family=unknown, optimum=unknown, rounding=rounding)
    optimum = _declared(problem, "optimum", a, random) if decompose else None
    if optimum is not None:
        family = _declared(problem, "family_optimum", a, random)
        if family is None:
            with draws(search, b.device):
                further = longer(solver, b.dtype).solve(problem, a, best).b
            lower = values(further, choice) <= values(best, choice)
            family = torch.where(lower, values(further, value), rows.reference)
        rows = rows._replace(family=family.to(unknown), optimum=optimum.to(unknown))
    return rows, best


def _wide(rows: Tensor, b: Tensor) -> Tensor:
    return rows.view(-1, *[1] * (b.ndim - 1))


def _declared(problem: AmortizedModule, name: str, a: Context, random: bool) -> Tensor | None:
    """What the problem declares as ``optimum`` or ``family_optimum``, if it does; in float64, unless draws blur it anyway."""
    if not hasattr(problem, name):
        return None
    exact = None if random else in_float64(problem, name)(a)
    declared: Tensor | None = getattr(problem, name)(a) if exact is None else exact
    return declared


def longer(solver: Solver, dtype: torch.dtype) -> Solver:
    """A copy of a solver with ten times the steps and a hundredth of the tolerance, those inside it too."""
    strong = copy.deepcopy(solver)
    for part in strong.modules():
        if isinstance(part, Solver) and "steps" in vars(part):  # those of MultiStart are its solver's
            part.steps, part.tol = 10 * part.steps, tolerance(part.tol, dtype) / 100
    return strong


class Cases(NamedTuple):
    """Contexts with what was found for them; the rows of all fields belong together."""

    rows: GapRows
    a: Context
    network: Tensor
    """Predictions ``(B, *)``."""
    solver: Tensor
    """Reference solutions ``(B, *)``."""


def worst_of(cases: Cases, count: int) -> Cases:
    """Those with the largest gap, the largest first; a gap that is not a number is larger than any."""
    gap = cases.rows.gap.nan_to_num(nan=torch.inf)
    worst: Cases = take(cases, gap.argsort(descending=True, stable=True)[:count])
    return worst
