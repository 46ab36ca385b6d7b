"""What solvers need to reach the network's quality, at a test."""

from __future__ import annotations

from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from amortized.callbacks.gap import GapMonitor
from amortized.contract import (
    ProblemError,
    num_rows,
    take,
)
from amortized.evaluation.budget import Budget, default_rivals, measure_budget
from amortized.module import AmortizedModule
from amortized.solvers import Solver, solver_for


class BudgetMonitor(Callback):
    """At a test: what solvers need to reach the network's quality, and what the prediction saves them as a start.

    On the first contexts of the test.

    Args:
        rivals: solvers by name; ``None``: the solver of the gap (without a :class:`~amortized.callbacks.GapMonitor` the one that
            the problem's structure asks for), and Adam at lr 0.01, 0.03, 0.1, 0.3 where there are no constraints, which it
            ignores.
        contexts: at most so many contexts, in one batch on both sides.
        enabled: whether to measure at all.
    """

    def __init__(self, rivals: dict[str, Solver] | None = None, contexts: int = 128, enabled: bool = True) -> None:
        self.rivals = rivals
        self.contexts, self.enabled = contexts, enabled
        self.budget: Budget | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for name, solver in (self.rivals or {}).items() if self.enabled else ():
            try:
                solver.require(pl_module)
            except TypeError as error:
                raise ProblemError(f"budget.rivals, {name}: {error}") from error

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
            monitors = (c for c in trainer.callbacks if isinstance(c, GapMonitor))  # type: ignore[attr-defined]
            solver = next((monitor.solver for monitor in monitors), None) or solver_for(pl_module)
            found = measure_budget(pl_module, a, self.rivals or default_rivals(pl_module, solver))
            self.budget = found if found.resolved else None
            if not found.resolved:
                rank_zero_warn(
                    "no times to equal quality: beside the objective's size, its differences are within rounding"
                )
