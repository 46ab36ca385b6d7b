r"""Objective against time: one forward pass of the network beside inner-loop solvers on the same batch of contexts."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from amortized.module import AmortizedModule
from amortized.problem import CommonDraws, Context, Problem, evaluate, is_random, num_rows, take
from amortized.solvers import LBFGS, Adam, Solver


class Curve(NamedTuple):
    """Mean best-so-far objective of a batch after each evaluation."""

    name: str
    seconds: list[float]
    evaluations: list[int]
    objective: list[float]


class Budget(NamedTuple):
    """What :func:`measure_budget` found for one batch of contexts."""

    contexts: int
    network_seconds: float
    """Median time of one forward pass of the batch."""
    network_objective: float
    curves: list[Curve]
    """One for each rival, the network's start excluded: all of them start cold."""
    rival: str
    """The rival that was first to reach the network's mean objective; the best one if none was."""
    solver_seconds: float
    """Time of that rival's whole run."""
    equal_quality_seconds: float
    """When that rival reached the network's mean objective; infinite if it never did."""

    @property
    def equal_quality_ratio(self) -> float:
        """``equal_quality_seconds / network_seconds``."""
        return self.equal_quality_seconds / self.network_seconds


def clock(device: torch.device) -> float:
    """Seconds, after the device has finished what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def default_rivals(solver: Solver) -> dict[str, Solver]:
    """The stated grid: the solver that measures the gap, and Adam at four step sizes, 200 steps each."""
    adams: dict[str, Solver] = {f"Adam {lr:g}": Adam(steps=200, lr=lr) for lr in (0.01, 0.03, 0.1, 0.3)}
    return {type(solver).__name__: solver, **adams}


def measure_budget(problem: AmortizedModule, a: Context, rivals: dict[str, Solver], repeats: int = 7) -> Budget:
    """Time the network and each rival, started cold, on one batch; all warm, one clock, synchronised.

    A random objective has the same fixed draws on all sides, which favours the solvers: they fit those draws, the
    network does not. What the recording itself takes is not counted against the rivals.

    Args:
        problem: the module.
        a: the batch of contexts.
        rivals: solvers by name.
        repeats: forward passes, of which the median counts.
    """
    with torch.no_grad():
        b = problem(a)
        device = b.device
        times = [_seconds(lambda: problem(a), device) for _ in range(repeats)]
    start = problem.initial(a).to(b.dtype)
    search = CommonDraws(problem, seed=0) if is_random(problem, b, a) else problem
    target = float(evaluate(search, b, a).double().mean())
    curves, found = [], []
    for name, solver in rivals.items():
        _trace(name, solver, search, take(a, slice(0, 2)), start[:2])  # warm
        curve, total = _trace(name, solver, search, a, start)
        curves.append(curve)
        reached = next(
            (t for t, value in zip(curve.seconds, curve.objective, strict=True) if value <= target), math.inf
        )
        found.append((reached, curve.objective[-1], name, total))
    reached, _, rival, total = min(found)
    return Budget(len(b), statistics.median(times), target, curves, rival, total, reached)


def _seconds(run: Callable[[], Any], device: torch.device) -> float:
    started = clock(device)
    run()
    return clock(device) - started


def _trace(name: str, solver: Solver, problem: Problem, a: Context, start: Tensor) -> tuple[Curve, float]:
    curve = Curve(name, [], [], [])
    recording = 0.0

    def record(evaluations: int, best: Tensor) -> None:
        nonlocal recording
        now = clock(best.device)
        curve.seconds.append(now - started - recording)
        curve.evaluations.append(evaluations)
        curve.objective.append(float(best.double().mean()))
        recording += clock(best.device) - now

    started = clock(start.device)
    solver.solve(problem, a, start, trace=record)
    return curve, clock(start.device) - started - recording


class BudgetMonitor(Callback):
    """At a test: the time a solver needs to reach the network's quality, on the first contexts of the test.

    Args:
        rivals: solvers by name; ``None``: L-BFGS, and Adam at lr 0.01, 0.03, 0.1, 0.3 (the command line
            takes the solver of the gap in place of L-BFGS).
        contexts: at most so many contexts, in one batch on both sides.
        enabled: whether to measure at all.
    """

    def __init__(self, rivals: dict[str, Solver] | None = None, contexts: int = 128, enabled: bool = True) -> None:
        self.rivals = rivals
        self.contexts, self.enabled = contexts, enabled
        self.budget: Budget | None = None

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        first = batch_idx == dataloader_idx == 0
        if self.enabled and first and trainer.is_global_zero and isinstance(pl_module, AmortizedModule):
            a = take(batch, slice(0, min(self.contexts, num_rows(batch))))
            self.budget = measure_budget(pl_module, a, self.rivals or default_rivals(LBFGS()))
