"""The amortization gap at every validation and test, against a solver started cold and from the prediction."""

from __future__ import annotations

import time
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from amortized.metrics import AmortizationGap, GapRows
from amortized.module import AmortizedModule
from amortized.problem import Context, draws, evaluate
from amortized.solvers import LBFGS, Solution, Solver


def measure_gap(
    problem: AmortizedModule, a: Context, b: Tensor, solver: Solver, index: Tensor, seed: int = 0
) -> tuple[GapRows, Tensor]:
    """The gap of predictions ``b`` for contexts ``a``, and the reference solutions.

    The reference of a row is the better of two solver runs, one from ``problem.initial(a)``, one from ``b``. A random
    objective is searched with fixed draws, chosen between on a second set, and evaluated, all sides alike, on a third.

    Args:
        problem: the module.
        a: B contexts.
        b: predictions, ``(B, *)``.
        solver: the inner loop.
        index: ``(B,)``, the rows' places in the whole set.
        seed: of the draws of a random objective.
    """
    b = b.detach().to(torch.promote_types(b.dtype, torch.float32))
    runs: list[Solution] = []
    for start in (problem.initial(a), b):
        with draws(seed, b.device):
            runs.append(solver.solve(problem, a, start.to(b.dtype)))
    cold, warm = runs

    def values(of: Tensor, seed: int) -> Tensor:
        with draws(seed, b.device):
            return evaluate(problem, of, a).double()

    on_cold, on_warm = (values(run.b, seed + 1).nan_to_num(nan=torch.inf) for run in runs)
    use_warm = on_warm <= on_cold
    best = torch.where(use_warm.view(-1, *[1] * (b.ndim - 1)), warm.b, cold.b)
    rows = GapRows(
        index=index,
        network=values(b, seed + 2),
        reference=values(best, seed + 2),
        cold=values(cold.b, seed + 2),
        converged=torch.where(use_warm, warm.converged, cold.converged),
        evaluations=cold.evaluations,
    )
    return rows, best


class GapMonitor(Callback):
    """Logs the statistics of :class:`~amortized.metrics.AmortizationGap` as ``val/gap/*`` and ``test/gap/*``.

    Every process solves the contexts that it was dealt; each context counts once.

    Args:
        solver: the inner loop to measure against; ``None``: L-BFGS.
        every_n_validations: measure at every n-th validation (at every test in any case).
    """

    def __init__(self, solver: Solver | None = None, every_n_validations: int = 1) -> None:
        self.solver = solver if solver is not None else LBFGS()
        self.every_n_validations = every_n_validations
        self.metric = AmortizationGap()
        self.results: dict[str, float] = {}
        self.example: tuple[Context, Tensor, Tensor] | None = None
        self.seconds = 0.0
        self._validations = 0

    @property
    def table(self) -> GapRows:
        """The rows of the last measurement, from all processes."""
        return self.metric.table

    def _start(self, trainer: Trainer, module: LightningModule) -> None:
        if not isinstance(module, AmortizedModule):
            raise TypeError(f"GapMonitor measures an AmortizedModule; got {type(module).__name__}")
        self.metric.to(module.device).reset()
        self.example = None

    def _skips(self, trainer: Trainer) -> bool:
        return trainer.sanity_checking or (
            trainer.state.fn == "fit" and self._validations % self.every_n_validations > 0
        )

    def _measure(self, trainer: Trainer, module: Any, b: Tensor, a: Context, number: int, size: int) -> None:
        started = time.perf_counter()
        index = torch.arange(len(b), device=b.device) + number * size
        rows, best = measure_gap(module, a, b, self.solver, index, seed=number)
        self.metric.update(rows)
        if self.example is None:
            self.example = (a, b, best)
        self.seconds += time.perf_counter() - started

    def _finish(self, trainer: Trainer, module: LightningModule, split: str) -> None:
        statistics = self.metric.compute()
        self.results = {name: float(value) for name, value in statistics.items()}
        module.log_dict(
            {f"{split}/gap/{name}": value.float() for name, value in statistics.items()}, rank_zero_only=False
        )

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start(trainer, pl_module)

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start(trainer, pl_module)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if not self._skips(trainer):
            self._measure(
                trainer, pl_module, outputs, batch, batch_idx * trainer.world_size + trainer.global_rank, 2**20
            )

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._measure(trainer, pl_module, outputs, batch, batch_idx * trainer.world_size + trainer.global_rank, 2**20)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._skips(trainer):
            self._finish(trainer, pl_module, "val")
        self._validations += trainer.state.fn == "fit" and not trainer.sanity_checking

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._finish(trainer, pl_module, "test")
