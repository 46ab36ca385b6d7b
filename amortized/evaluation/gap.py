"""The gap of a batch of predictions, against a solver started cold and from the prediction."""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import Tensor

from amortized.contract import (
    Context,
    ProblemError,
    better,
    constrained,
    draws,
    evaluate,
    feasibility_tol,
    is_random,
    stream_seed,
    take,
    violation,
)
from amortized.evaluation.best_known import BestKnown
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
    known: BestKnown | None = None,
) -> tuple[GapRows, Tensor]:
    """The gap of predictions ``b`` for contexts ``a``, and the reference solutions.

    The reference of a row is the better of two solver runs, one from ``problem.initial(a)``, one from ``b`` and the multipliers
    that the model predicts, where it does. (Not from those of the first run: where there are several minima they would draw the
    second into the first's.) Better is feasible before infeasible, then lower: :func:`~amortized.contract.better`. A random
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
        known: the best solutions of earlier runs, which are candidates too; what is better than them is added.

    Raises:
        ProblemError: if ``known`` is of another objective, or the objective is random.
    """
    given, (problem, a) = a, at_least_float32(problem, a)
    with torch.no_grad():
        multipliers, a = problem.dual(a), problem.prepare(a)
    b = b.detach().to(torch.promote_types(b.dtype, torch.float32))
    search, choice, value, fresh = (
        stream_seed(0, f"gap {use}", seed) for use in ("search", "choice", "value", "again")
    )
    runs: list[Solution] = []
    for start, dual in ((problem.initial(a), None), (b, multipliers)):
        with draws(search, b.device):
            runs.append(solver.solve(problem, a, start.to(b.dtype), dual=dual))
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

    bound, tol = constrained(problem), feasibility_tol(problem)
    exact_violation = in_float64(problem, violation)

    def candidate(of: Tensor) -> _Candidate:
        if not bound:
            return _Candidate(of, values(of, choice), torch.zeros(len(of), dtype=torch.float64, device=of.device))
        with draws(choice, b.device), torch.no_grad():
            off = exact_violation(of, a)
            off = violation(problem, of, a) if off is None else off
        return _Candidate(of, values(of, choice), off.double())

    on_cold, on_warm, on_network = candidate(cold.b), candidate(warm.b), candidate(b)
    use_warm = ~_beats(on_cold, on_warm, tol)
    chosen = _chosen(use_warm, on_warm, on_cold)
    converged = torch.where(use_warm, warm.converged, cold.converged) & ~(chosen.violation > tol)
    random = len(b) > 0 and is_random(problem, b[:1], take(a, slice(0, 1)))
    if not random:  # the solver's own arithmetic may have taken for lower what is not
        chosen = _chosen(_beats(on_network, chosen, tol), on_network, chosen)
    unknown = torch.full_like(chosen.value, torch.nan)
    stored = unknown
    if known is not None:
        if random:
            raise ProblemError("gap.best_known keeps the solutions of objectives that are not random; this one draws")
        earlier, then = known.look_up(given, chosen.b)
        on_earlier = candidate(earlier)
        _check_stored(then, on_earlier.value, known)
        use_earlier = _beats(on_earlier, chosen, tol)
        known.add(
            given, chosen.b, chosen.value, (chosen.violation <= tol) & (then.isnan() | _beats(chosen, on_earlier, tol))
        )
        chosen, stored = _chosen(use_earlier, on_earlier, chosen), use_earlier.double()
    best = chosen.b
    rows = GapRows(
        index=index,
        network=values(b, value),
        reference=values(best, value),
        cold=values(cold.b, value),
        converged=converged,
        evaluations=cold.evaluations,
    )
    largest = torch.maximum(rows.network.abs(), rows.reference.abs())
    again = values(b, fresh) - values(best, fresh) if random else rows.gap
    rounding = 4 * torch.finfo(precision).eps * largest
    rows = rows._replace(again=again, family=unknown, optimum=unknown, rounding=rounding)
    off = [x.violation if bound else unknown for x in (on_network, chosen, on_cold)]
    impossible = (cold.infeasible | warm.infeasible).double() if bound else unknown
    tolerances = torch.full_like(unknown, tol) if bound else unknown
    rows = rows._replace(
        violation=off[0], reference_violation=off[1], cold_violation=off[2], tolerance=tolerances, impossible=impossible,
        stored=stored,
    )  # fmt: skip
    optimum = _declared(problem, "optimum", a, random) if decompose else None
    if optimum is not None:
        family = _declared(problem, "family_optimum", a, random)
        if family is None:
            with draws(search, b.device):
                further = longer(solver, b.dtype).solve(problem, a, best).b
            lower = ~_beats(chosen, candidate(further), tol)
            family = torch.where(lower, values(further, value), rows.reference)
        rows = rows._replace(family=family.to(unknown), optimum=optimum.to(unknown))
    return rows, best


class _Candidate(NamedTuple):
    """Solutions that may be the reference, with their values on the draws that choose, and their violation."""

    b: Tensor
    value: Tensor
    violation: Tensor


def _beats(one: _Candidate, other: _Candidate, tol: float) -> Tensor:
    return better(one.value, one.violation, other.value, other.violation, tol)


def _chosen(first: Tensor, one: _Candidate, other: _Candidate) -> _Candidate:
    """The first where that is said ``(B,)``, else the other."""
    b = torch.where(first.view(-1, *[1] * (one.b.ndim - 1)), one.b, other.b)
    return _Candidate(b, *(torch.where(first, x, y) for x, y in zip(one[1:], other[1:], strict=True)))


def _check_stored(then: Tensor, now: Tensor, known: BestKnown) -> None:
    """Stored solutions must still have the values they were stored with."""
    off = ~torch.isclose(then, now, rtol=1e-3, atol=1e-5) & ~then.isnan()
    if bool(off.any()):
        row = off.nonzero()[0, 0]
        raise ProblemError(
            f"gap.best_known: {known.path} is of another objective (a value there is {float(then[row]):.6g}, now "
            f"{float(now[row]):.6g}): name another file"
        )


def _declared(problem: AmortizedModule, name: str, a: Context, random: bool) -> Tensor | None:
    """What the problem declares as ``optimum`` or ``family_optimum``, if it does; in float64, unless draws blur it anyway."""
    if not hasattr(problem, name):
        return None
    exact = None if random else in_float64(problem, name)(a)
    declared: Tensor | None = getattr(problem, name)(a) if exact is None else exact
    return declared


def longer(solver: Solver, dtype: torch.dtype, times: int = 10) -> Solver:
    """A copy of a solver with so many times the steps and a hundredth of the tolerance, those inside it too."""
    strong = copy.deepcopy(solver)
    for part in strong.modules():
        if isinstance(part, Solver) and "steps" in vars(part):  # those of MultiStart are its solver's
            part.steps, part.tol = times * part.steps, tolerance(part.tol, dtype) / 100
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
    """Those with the largest gap, the largest first; a gap that is not a number is larger than any.

    With constraints: then infeasible predictions, the largest violation first, then feasible ones by their gap, and last
    contexts without a feasible reference, of which no more could be asked.
    """
    rows = cases.rows
    gap = rows.gap.nan_to_num(nan=torch.inf)
    if rows.constrained and rows.violation is not None:
        gap = torch.where(rows.feasible, gap, rows.violation.nan_to_num(nan=torch.inf))
        level = torch.where(rows.solved, torch.where(rows.feasible, 1, 2), 0)
        level = torch.where(rows.gap.isfinite(), level, 3)
        order = gap.argsort(descending=True, stable=True)
        order = order[level[order].argsort(descending=True, stable=True)]
    else:
        order = gap.argsort(descending=True, stable=True)
    worst: Cases = take(cases, order[:count])
    return worst
