"""The amortization gap at every validation and test, against a solver started cold and from the prediction."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from amortized.contexts.data_module import evaluation_names
from amortized.contract import (
    Context,
    ProblemError,
    concatenate,
    map_leaves,
    of_every_process,
    take,
)
from amortized.evaluation.best_known import BestKnown
from amortized.evaluation.gap import Cases, measure_gap, worst_of
from amortized.evaluation.metric import AmortizationGap, GapRows
from amortized.module import AmortizedModule
from amortized.solvers import LBFGS, Solver, solver_for

LEAST = 30
"""Rows, at least, of a gap that is reported during training."""


def numbered(trainer: Trainer, batch_idx: int, outputs: Tensor) -> tuple[int, Tensor]:
    """The number of a process's batch among those of all processes, and numbers of its rows that order the whole set ``(B,)``."""
    number = batch_idx * trainer.world_size + trainer.global_rank
    return number, number * 2**20 + torch.arange(len(outputs), device=outputs.device)


class GapMonitor(Callback):
    """Logs the statistics of :class:`~amortized.evaluation.metric.AmortizationGap` as ``val/gap/*`` and ``test/gap/*``.

    Every process solves the contexts that it was dealt; each context counts once. During training the monitor spends at most
    a fraction of the time, on a fixed subset of the validation contexts: the first so many of each process, as many as it could
    afford at its first validations, the same in all later ones and after a resume, so that the curve is of one thing.
    ``val/gap/total`` says how many. Fewer than 30 (or all, if there are fewer) are not reported; a validation for which there
    was too little time has no gap.
    Outside training it measures all of them, finds the terms of :func:`~amortized.evaluation.metric.decomposition` where the
    problem declares its ``optimum``, and measures the same on each further set of the data's ``evaluations``:
    ``test/NAME/gap/*``.
    At a test it keeps the contexts with the largest gap, of all processes; of the data's own alone.

    Args:
        solver: the inner loop to measure against; ``None``: the one that the problem's structure asks for, with its default
            settings: :func:`~amortized.solvers.solver_for`.
        max_fraction: of the training time so far to spend on the gap, in [0, 1]; 1 measures every context.
        keep_worst: how many contexts of a test to keep, those with the largest gap.
        best_known: a file of the best solutions that any run has found, made if it is not there, so that models of a problem
            that is not convex are judged by one reference: see :class:`~amortized.evaluation.best_known.BestKnown`.
    """

    def __init__(
        self,
        solver: Solver | None = None,
        max_fraction: float = 0.05,
        keep_worst: int = 8,
        best_known: str | Path | None = None,
    ) -> None:
        if not 0 <= max_fraction <= 1:
            raise ValueError(f"gap.max_fraction must be in [0, 1]; got {max_fraction}")
        self.named, self.solver = solver is not None, solver if solver is not None else LBFGS()
        self.max_fraction, self.keep_worst, self.best_known = max_fraction, keep_worst, best_known
        self.known: BestKnown | None = None
        self.metrics = {"": AmortizationGap()}
        """By the names of :func:`~amortized.contexts.data_module.evaluation_names`."""
        self.results: dict[str, float] = {}
        self.evaluations: dict[str, dict[str, float]] = {}
        """The results on each further set of contexts."""
        self.example: tuple[Context, Tensor, Tensor] | None = None
        self.worst: Cases | None = None
        """After a test, on every process; the index of its rows is the context's place in the test set."""
        self._begin()

    def _begin(self) -> None:
        self.count: int | None = None
        """Contexts of each process that the validations of this run measure; ``None``: not chosen yet."""
        self.seconds = 0.0
        """Spent on them so far."""
        self._trained = 0.0
        self._started: float | None = None
        self._cost = 0.0
        self._seconds_for: dict[int, float] = {}
        """The longest that so many rows took."""
        self._least = 1
        self._limit: int | None = None
        self._measured = self._seen = 0
        self._full, self._before = False, 0.0

    def state_dict(self) -> dict[str, Any]:
        trained = self._time()
        return {"count": self.count, "seconds": self.seconds, "cost": self._cost, "trained": trained}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.count, self.seconds, self._cost = (state_dict[name] for name in ("count", "seconds", "cost"))
        self._trained = state_dict["trained"]

    def _time(self) -> float:
        """Seconds of training so far, before a resume too."""
        return self._trained + (0.0 if self._started is None else time.perf_counter() - self._started)

    @property
    def metric(self) -> AmortizationGap:
        """Of the data's own contexts."""
        return self.metrics[""]

    @property
    def table(self) -> GapRows:
        """The rows of the last measurement, from all processes."""
        return self.metric.table

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not isinstance(pl_module, AmortizedModule):
            raise TypeError(f"GapMonitor measures an AmortizedModule; got {type(pl_module).__name__}")
        if not self.named:
            self.solver = solver_for(pl_module)
        if self.best_known is not None:
            self.known = BestKnown(self.best_known)
        try:
            self.solver.require(pl_module)
        except TypeError as error:
            raise ProblemError(f"gap.solver: {error}") from error
        if stage == "fit":
            self._begin()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._started = time.perf_counter()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._trained, self._started = self._time(), None

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.metrics = {name: AmortizationGap().to(pl_module.device) for name in evaluation_names(trainer)}
        for metric in self.metrics.values():  # those that are given no rows must not warn of it
            metric.update(GapRows(*torch.empty(len(GapRows._fields), 0, device=pl_module.device)))
        self.example, self.worst, self.evaluations, self._least = None, None, {}, 1
        self._measured = self._seen = 0
        self._limit, self._full, self._before = None, False, self.seconds
        if trainer.sanity_checking:
            self._limit = 0
        elif self._rations(trainer) and self.count is not None:
            affordable = self.max_fraction * self._time() - self.seconds >= self._cost
            self._limit = self.count if trainer.strategy.broadcast(affordable) else 0

    def _rations(self, trainer: Trainer) -> bool:
        return trainer.state.fn == "fit" and self.max_fraction < 1

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        metric = list(self.metrics.values())[dataloader_idx]
        number, index = numbered(trainer, batch_idx, outputs)
        at = 0
        self._seen += len(outputs)
        while not self._full and at < len(outputs) and (n := self._affordable(trainer, len(outputs) - at)):
            started = time.perf_counter()
            a, b, at = take(batch, slice(at, at + n)), outputs[at : at + n], at + n
            rows, best = measure_gap(
                pl_module,  # type: ignore[arg-type]
                a,
                b,
                self.solver,
                index[at - n : at],
                seed=number,
                decompose=trainer.state.fn != "fit",
                known=self.known,
            )
            metric.update(rows)
            if self.example is None and not dataloader_idx:
                self.example = (a, b.to(best.dtype), best)  # b may be of mixed precision
            if trainer.testing and self.keep_worst and not dataloader_idx:
                cases = Cases(rows, a, b.to(best.dtype), best)
                self.worst = worst_of(
                    cases if self.worst is None else concatenate([self.worst, cases]), self.keep_worst
                )
            self._measured += n
            spent = time.perf_counter() - started
            self.seconds += spent
            self._seconds_for[n], self._least = max(spent, self._seconds_for.get(n, 0.0)), n
        self._full = self._full or at < len(outputs)  # it is the first rows that are measured

    def _affordable(self, trainer: Trainer, rows: int) -> int:
        """How many of so many further rows to measure now: all outside training; one, if it is not known what a row costs.

        Where the subset is being chosen: rows are solved together until the slowest has ended. So n rows take no longer than
        more, nor n / k times k of them; but a few, without a slow one among them, may have been quick by luck: within a
        validation each part is as large as the last, and half as much again must be left as a part is expected to take. While
        there is no time for as many rows as are reported, parts of twice the size tell what those will cost.
        """
        if self._limit is not None:
            return min(rows, self._limit - self._measured)
        if not self._rations(trainer):
            return rows
        left = self.max_fraction * self._time() - self.seconds
        if not self._seconds_for:
            return 1 if left > 0 else 0

        def paid(n: int) -> bool:
            return min(s * max(1, n / k) for k, s in self._seconds_for.items()) <= left / 1.5

        lacking = min(math.ceil(LEAST / trainer.world_size) - self._measured, rows)
        if lacking > 0 and not paid(lacking):
            probe = min(2 * max(self._seconds_for), lacking)
            return probe if paid(probe) else 0
        sizes = (rows, *(n for k in reversed(range((rows - 1).bit_length())) if (n := 2**k) >= self._least))
        return next((n for n in sizes if paid(n)), 0)

    def _choose(self, trainer: Trainer) -> None:
        """Keep to what this validation measured from now on, the same number on all processes, if it is enough."""
        mine = (self._measured, self._seen)
        every = of_every_process(mine, trainer.world_size)
        rows = sum(seen for _, seen in every)
        count = min((measured for measured, seen in every if measured < seen), default=rows)
        if sum(min(count, seen) for _, seen in every) < min(LEAST, rows):
            count = 0
        else:
            self.count = count
        self.metric.parts = [torch.cat(self.metric.parts)[:count]]  # in the order in which they were measured

    def _finish(self, trainer: Trainer, module: LightningModule, split: str) -> None:
        if self.known is not None:
            self.known.save(trainer.world_size, trainer.is_global_zero)
        for name, metric in self.metrics.items():
            statistics = metric.compute()
            if statistics["total"] == 0:
                continue
            found = {key: float(value) for key, value in statistics.items()}
            if name:
                self.evaluations[name] = found
            else:
                self.results = found
            where = f"{split}/{name}/gap".replace("//", "/")
            module.log_dict({f"{where}/{key}": value.float() for key, value in statistics.items()})

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        started = time.perf_counter()
        if self._rations(trainer) and self._limit is None:
            self._choose(trainer)
        self._finish(trainer, pl_module, "val")
        self.seconds += time.perf_counter() - started
        if self.count is not None and self._measured:
            self._cost = self.seconds - self._before

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._finish(trainer, pl_module, "test")
        self._gather_worst(trainer, pl_module.device)

    def _gather_worst(self, trainer: Trainer, device: torch.device) -> None:
        mine: Any = self.worst
        if mine is not None and trainer.world_size > 1:
            mine = map_leaves(lambda leaf: leaf.cpu(), mine)
        parts = of_every_process(mine, trainer.world_size)
        parts = [map_leaves(lambda leaf: leaf.to(device), part) for part in parts if part is not None]
        if parts:
            worst = worst_of(concatenate(parts), self.keep_worst)
            place = torch.searchsorted(self.table.index.contiguous(), worst.rows.index.to(self.table.index))
            self.worst = worst._replace(rows=worst.rows._replace(index=place))

    on_test_epoch_start, on_test_batch_end = on_validation_epoch_start, on_validation_batch_end
