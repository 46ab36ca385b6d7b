r"""Objective against time and against evaluations: the network's forward pass beside inner-loop solvers, cold and warm.

All sides have the same batch of contexts, warm caches and one synchronised clock. Two questions are answered, in the
mean and row by row:

* *When is a solver, started cold, as good as the network?* Its time to ``L(f(a); a)``, as a ratio to one forward pass.
* *What is the prediction worth as a warm start?* The evaluations that a solver needs, from the cold start ``b_0`` and
  from ``f(a)``, to close all but a fraction ``tol`` of what the cold start lacks,

    ``L(b; a) <= L* + tol (L(b_0; a) - L*)``,

  ``L*`` the lowest value that anyone found for the row. Source of this test: Moré & Wild (2009), section 2.

A row that never gets there counts as infinite: it is in every median and share, and in the pictures. Where the problem has
constraints the value of a point that is not feasible is infinite, whoever found it.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from amortized.contract import (
    CommonDraws,
    Context,
    Problem,
    constrained,
    differentiable,
    evaluate,
    feasible_value,
    is_random,
    stream_seed,
    take,
)
from amortized.evaluation.float64 import at_least_float32
from amortized.module import AmortizedModule
from amortized.solvers import Adam, Solver

ROUNDING = 1e-6
"""Values that differ by less, relatively, are the same."""


class Curve(NamedTuple):
    """A solver on a batch of B rows: what it had at its start, after one evaluation, and after each of its rounds."""

    name: str
    warm: bool
    """Whether it started from the prediction; its time then includes the network's."""
    seconds: Tensor
    """``(R,)``."""
    evaluations: Tensor
    """``(R,)``, of the objective (with its gradient where the solver uses one), for each row."""
    values: Tensor
    """The best values so far, ``(R, B)``; infinite in rows that are not feasible yet."""


class Budget(NamedTuple):
    """What :func:`measure_budget` found for one batch of B contexts."""

    network_seconds: float
    """Median time of one forward pass of the batch."""
    network: Tensor
    """``L`` of the prediction, ``(B,)``; infinite where it is not feasible."""
    start: Tensor
    """``L`` of the cold start, ``(B,)``; infinite where it is not feasible."""
    cold: list[Curve]
    """One for each rival."""
    warm: list[Curve]
    """The same rivals from the prediction."""
    rival: str
    """The cold rival that was first to reach the network's mean objective; the best one if none was."""
    solver_seconds: float
    """Time of that rival's whole run."""
    tol: float
    """What the goal of the warm start leaves open."""

    @property
    def finite(self) -> Tensor:
        """The rows ``(B,)`` on which the network and every run ended with a finite value: those of the means.

        A run that ended so on no row at all has no mean, and no say.
        """
        runs = [curve.values[-1] for curve in self.cold + self.warm]
        return torch.stack([self.network, *(end for end in runs if end.isfinite().any())]).isfinite().all(0)

    def mean(self, values: Tensor) -> Tensor:
        """Mean over the finite rows of values ``(..., B)``."""
        return values[..., self.finite].mean(-1)

    @property
    def equal_quality_ratio(self) -> float:
        """When the rival reached the network's mean objective, over the network's time; infinite if it never did."""
        return _time_to_mean(self, _named(self.cold, self.rival)) / self.network_seconds

    @property
    def row_ratios(self) -> Tensor:
        """When the rival reached the network's objective on each row ``(B,)``, over the network's time for the batch."""
        curve = _named(self.cold, self.rival)
        target = self.network + ROUNDING * self.network.abs()
        return first(curve.seconds, curve.values, target.nan_to_num(nan=torch.inf)) / self.network_seconds

    @property
    def best(self) -> Tensor:
        """``L*``, the lowest value that anyone found ``(B,)``."""
        ends = torch.stack([self.network, *(curve.values[-1] for curve in self.cold + self.warm)])
        return ends.nan_to_num(nan=torch.inf).amin(0)

    @property
    def resolved(self) -> bool:
        """Whether the network or the start is above the lowest value by more than rounding, on half of the rows at least."""
        between = torch.maximum(self.network, self.start) - self.best
        return bool((~(between <= ROUNDING * self.best.abs())).double().mean() >= 0.5)

    @property
    def goal(self) -> Tensor:
        """The value ``(B,)`` at which a row counts as solved; see the module's docstring."""
        best = self.best
        scale = torch.where(self.start.isfinite(), (self.start - best).clamp(min=0), best.abs())
        return best + self.tol * scale + ROUNDING * best.abs()

    @property
    def warm_rival(self) -> str:
        """The rival that, cold, solves the most rows, with the fewest evaluations."""

        def rank(curve: Curve) -> tuple[float, float]:
            needed = self.needed(curve)
            return float(needed.isinf().double().mean()), quantile(needed, 0.5)

        return min(self.cold, key=rank).name

    def needed(self, curve: Curve) -> Tensor:
        """Evaluations to the goal ``(B,)``; infinite where it was never reached."""
        return first(curve.evaluations.double(), curve.values, self.goal)

    @property
    def saved(self) -> Tensor:
        """Evaluations of ``warm_rival`` that the warm start saves ``(B,)``: infinite if only that got there, 0 if neither."""
        cold, warm = (self.needed(_named(curves, self.warm_rival)) for curves in (self.cold, self.warm))
        return torch.where(cold.isinf() & warm.isinf(), 0.0, cold - warm)

    def summary(self) -> dict[str, Any]:
        """The numbers of ``results.json``, as :class:`~amortized.evaluation.results.Time` explains them."""

        def never(x: Tensor) -> float:
            return float(x.isinf().double().mean())

        rows = self.row_ratios
        cold, warm = (self.needed(_named(curves, self.warm_rival)) for curves in (self.cold, self.warm))
        return {
            "network": self.network_seconds,
            "solver": self.solver_seconds,
            "equal_quality_ratio": self.equal_quality_ratio,
            "contexts": len(self.network),
            "rival": self.rival,
            "not_finite": 1 - float(self.finite.double().mean()),
            "row_ratio_median": quantile(rows, 0.5),
            "row_ratio_p95": quantile(rows, 0.95),
            "rows_never_reached": never(rows),
            "warm_rival": self.warm_rival,
            "tolerance": self.tol,
            "evaluations_cold": quantile(cold, 0.5),
            "evaluations_warm": quantile(warm, 0.5),
            "evaluations_saved": quantile(self.saved, 0.5),
            "rows_never_solved_cold": never(cold),
            "rows_never_solved_warm": never(warm),
        }


def first(at: Tensor, values: Tensor, target: Tensor) -> Tensor:
    """``at`` ``(R,)`` of the first round at which each column of ``values`` ``(R, B)`` is finite and at most ``target``.

    >>> first(torch.tensor([1.0, 2.0]), torch.tensor([[5.0, 5.0], [3.0, 4.0]]), torch.tensor([3.0, 3.0]))
    tensor([2., inf])
    """
    hit = values.isfinite() & (values <= target)
    return torch.where(hit.any(0), at[hit.int().argmax(0)], torch.inf)


def quantile(x: Tensor, q: float) -> float:
    """The nearest of the values, so that infinite ones do no harm."""
    return float(x.quantile(q, interpolation="nearest"))


def _named(curves: list[Curve], name: str) -> Curve:
    return next(curve for curve in curves if curve.name == name)


def _time_to_mean(budget: Budget, curve: Curve) -> float:
    target = budget.mean(budget.network)
    return float(first(curve.seconds, budget.mean(curve.values)[:, None], target))


def clock(device: torch.device) -> float:
    """Seconds, after the device has finished what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def default_rivals(problem: Problem, solver: Solver) -> dict[str, Solver]:
    """The stated grid: the solver that measures the gap, and Adam at four step sizes, 200 steps each.

    Where the problem has constraints, or no gradient, the solver alone: what ignores them, or needs one, is no rival.
    """
    if constrained(problem) or not differentiable(problem):
        return {type(solver).__name__: solver}
    adams: dict[str, Solver] = {f"Adam {lr:g}": Adam(steps=200, lr=lr) for lr in (0.01, 0.03, 0.1, 0.3)}
    return {type(solver).__name__: solver, **adams}


def measure_budget(
    problem: AmortizedModule, a: Context, rivals: dict[str, Solver], repeats: int = 5, tol: float = 1e-3
) -> Budget:
    """Time the network and each rival, cold and from the prediction, on one batch; all warmed up, one synchronised clock.

    A rival started from the prediction has the multipliers that the model predicts, where it does; their time counts.

    A random objective has the same fixed draws on all sides, which favours the solvers: they fit those draws, the
    network does not. What the recording itself takes is not counted against the rivals. One that will not win is given up
    (:func:`beaten`). A recorded solver keeps the rows
    that it has finished, which an unrecorded one drops (unless the objective is random); so the rival's whole run is
    timed unrecorded, and no time to equal quality counts for more than that. A module in half precision is timed and searched
    in float32, on both sides.

    Args:
        problem: the module.
        a: the batch of contexts.
        rivals: solvers by name.
        repeats: runs of the network and of the rival, of which the median counts; other solvers run once.
        tol: what a solved row may lack, as a fraction of what the cold start lacks.
    """
    problem, a = at_least_float32(problem, a)
    with torch.no_grad():
        b, dual = problem(a), problem.dual(a)
        device = b.device
        forward = statistics.median(_seconds(lambda: problem(a), device) for _ in range(repeats))
        more = (
            statistics.median(_seconds(lambda: problem.dual(a), device) for _ in range(repeats))
            if dual is not None
            else 0.0
        )
        a = problem.prepare(a)
    b = b.to(torch.promote_types(b.dtype, torch.float32))
    start = problem.initial(a).to(b.dtype)
    search = CommonDraws(problem, stream_seed(0, "budget", 0)) if is_random(problem, b, a) else problem
    network, begun = (feasible_value(search, x, evaluate(search, x, a), a).double().cpu() for x in (b, start))
    look = statistics.median(_seconds(lambda: evaluate(search, start, a), device) for _ in range(repeats))
    cold: list[Curve] = []
    warm: list[Curve] = []
    budget = Budget(forward, network, begun, cold, warm, "", math.nan, tol)
    for name, solver in rivals.items():
        _trace(solver, search, take(a, slice(0, 2)), start[:2], hopeless=_warm)
        for curves, point, y, value, before in (
            (cold, start, None, begun, 0.0),
            (warm, b, dual, network, forward + more),
        ):
            hopeless = beaten(budget, curves) if curves else None
            run = Curve(name, curves is warm, *_trace(solver, search, a, point, y, hopeless))
            curves.append(_begin(run, value, look, before))

    def rank(curve: Curve) -> tuple[float, float]:
        return _time_to_mean(budget, curve), float(budget.mean(curve.values[-1]).nan_to_num(nan=torch.inf))

    fastest = min(cold, key=rank)
    at, solver = cold.index(fastest), rivals[fastest.name]
    runs = [_trace(solver, search, a, start) for _ in range(repeats)]  # whole ones, whether or not it was given up
    longest = max(runs, key=lambda run: len(run[0]))
    seconds = torch.stack([run[0] for run in runs if len(run[0]) == len(longest[0])]).median(0).values
    whole = float(seconds[-1])
    if search is problem:
        unrecorded = [_seconds(lambda: solver.solve(problem, a, start), device) for _ in range(repeats)]
        whole = min(whole, statistics.median(unrecorded))
    curve = _begin(Curve(fastest.name, False, seconds, *longest[1:]), begun, look)
    cold[at] = curve._replace(seconds=curve.seconds.clamp(max=whole))
    return budget._replace(rival=fastest.name, solver_seconds=whole)


Hopeless: TypeAlias = Callable[[float, int, Tensor], bool]
"""Whether to give a run up, from its seconds, its evaluations and its best values ``(B,)`` so far."""

PATIENCE = 5
"""Times what the leader needed: so much each rival may take."""


def beaten(budget: Budget, curves: list[Curve]) -> Hopeless:
    """When a run beside these is given up, as one that will not win.

    One of them reached the network's mean objective in a fifth of the time, one of them solved all rows that anyone solved
    with a fifth of the evaluations, and the new run is on no row lower than the lowest value known.
    """
    goal = budget.goal
    ends = torch.stack([budget.network, *(curve.values[-1] for curve in budget.cold + budget.warm)])
    best = ends.nan_to_num(nan=torch.inf).amin(0)
    reached = min(_time_to_mean(budget, curve) for curve in curves)
    solved = torch.stack([first(curve.evaluations.double(), curve.values, goal) for curve in curves])
    needed = float(solved[:, solved.isfinite().any(0)].amax(1).min()) if solved.isfinite().any() else math.inf

    def hopeless(seconds: float, evaluations: int, values: Tensor) -> bool:
        late = seconds > PATIENCE * reached and evaluations > PATIENCE * needed
        return late and not bool((values < best - ROUNDING * best.abs()).any())

    return hopeless


def _warm(seconds: float, evaluations: int, values: Tensor) -> bool:
    """Whether a run has warmed up what the next one needs."""
    return evaluations > 10


class _Beaten(Exception):
    """Ends a run that is given up."""


def _seconds(run: Callable[[], Any], device: torch.device) -> float:
    started = clock(device)
    run()
    return clock(device) - started


def _trace(
    solver: Solver,
    problem: Problem,
    a: Context,
    start: Tensor,
    dual: Tensor | None = None,
    hopeless: Hopeless | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Seconds ``(R,)``, evaluations ``(R,)`` and values ``(R, B)`` after each of R rounds, the last where it is hopeless."""
    seconds: list[float] = []
    evaluations: list[int] = []
    values: list[Tensor] = []
    recording = 0.0

    def record(count: int, b: Tensor, value: Tensor) -> None:
        nonlocal recording
        now = clock(b.device)
        seconds.append(now - started - recording)
        evaluations.append(count)
        values.append(feasible_value(problem, b, value, a).double().cpu())
        if hopeless is not None and hopeless(seconds[-1], count, values[-1]):
            raise _Beaten
        recording += clock(b.device) - now

    started = clock(start.device)
    with contextlib.suppress(_Beaten):
        found = solver.solve(problem, a, start, dual=dual, trace=record)
        if not values:  # no round was needed
            record(int(found.evaluations.max()), found.b, found.value)
    return torch.tensor(seconds, dtype=torch.float64), torch.tensor(evaluations), torch.stack(values)


def _begin(curve: Curve, start: Tensor, look: float, before: float = 0.0) -> Curve:
    """The curve from its start on, whose value a solver knows after one look; all of it moved by the time before that.

    A solver that says it has nothing as good as its start does not accept it (it is infeasible): that row begins later.
    """
    begun = torch.where(curve.values[0] <= start, start, torch.inf)
    return curve._replace(
        seconds=before + torch.cat([curve.seconds.new_tensor([look]), curve.seconds]),
        evaluations=torch.cat([curve.evaluations.new_tensor([1]), curve.evaluations]),
        values=torch.cat([begun[None], curve.values]),
    )
