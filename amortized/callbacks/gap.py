"""The amortization gap at every validation and test, against a solver started cold and from the prediction."""

from __future__ import annotations

import copy
import time
from typing import Any, NamedTuple

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from amortized.metrics import AmortizationGap, GapRows
from amortized.module import AmortizedModule
from amortized.problem import Context, concatenate, draws, evaluate, is_random, map_leaves, take
from amortized.solvers import LBFGS, Solution, Solver
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
    once more on a fourth, to say how much of the gap is noise.

    Args:
        problem: the module.
        a: B contexts.
        b: predictions, ``(B, *)``.
        solver: the inner loop.
        index: ``(B,)``, the rows' places in the whole set.
        seed: of the draws of a random objective.
        decompose: also find the terms of :func:`~amortized.metrics.decomposition`, where the problem declares its
            ``optimum``; unless it declares ``family_optimum`` too, that costs another solver run, :func:`longer`.
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
    fresh = seed + 2**31  # far from the seeds of other batches, which are neighbours
    random = len(b) > 0 and is_random(problem, b[:1], take(a, slice(0, 1)))
    rows = GapRows(
        index=index,
        network=values(b, seed + 2),
        reference=values(best, seed + 2),
        cold=values(cold.b, seed + 2),
        converged=torch.where(use_warm, warm.converged, cold.converged),
        evaluations=cold.evaluations,
    )
    unknown = torch.full_like(rows.network, torch.nan)
    again = values(b, fresh) - values(best, fresh) if random else rows.gap
    rows = rows._replace(again=again, family=unknown, optimum=unknown)
    optimum = problem.optimum(a) if decompose and hasattr(problem, "optimum") else None
    if optimum is not None:
        if hasattr(problem, "family_optimum"):
            family = problem.family_optimum(a)
        else:
            with draws(seed, b.device):
                further = longer(solver, b.dtype).solve(problem, a, best).b
            lower = values(further, seed + 1) <= values(best, seed + 1)
            family = torch.where(lower, values(further, seed + 2), rows.reference)
        rows = rows._replace(family=family.to(unknown), optimum=optimum.to(unknown))
    return rows, best


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


class GapMonitor(Callback):
    """Logs the statistics of :class:`~amortized.metrics.AmortizationGap` as ``val/gap/*`` and ``test/gap/*``.

    Every process solves the contexts that it was dealt; each context counts once. During training the monitor spends at most
    a fraction of the time, by measuring only as many of the first contexts as it can afford: ``val/gap/total`` says how many.
    Outside training it measures all of them, finds the terms of :func:`~amortized.metrics.decomposition` where the problem
    declares its ``optimum``, and measures the same on the shifted contexts, where the data have some: ``test/shifted/gap/*``.
    At a test it keeps the contexts with the largest gap, of all processes; not of the shifted ones.

    Args:
        solver: the inner loop to measure against; ``None``: L-BFGS.
        max_fraction: of the training time so far to spend on the gap, in [0, 1]; 1 measures every context.
        keep_worst: how many contexts of a test to keep, those with the largest gap.
    """

    def __init__(self, solver: Solver | None = None, max_fraction: float = 0.05, keep_worst: int = 8) -> None:
        if not 0 <= max_fraction <= 1:
            raise ValueError(f"gap.max_fraction must be in [0, 1]; got {max_fraction}")
        self.solver = solver if solver is not None else LBFGS()
        self.max_fraction, self.keep_worst = max_fraction, keep_worst
        self.metric, self.shifted_metric = AmortizationGap(), AmortizationGap()
        self.results: dict[str, float] = {}
        self.shifted: dict[str, float] = {}
        self.example: tuple[Context, Tensor, Tensor] | None = None
        self.worst: Cases | None = None
        """After a test, on every process; the index of its rows is the context's place in the test set."""
        self.seconds = 0.0
        self._started = 0.0
        self._seconds_for: dict[int, float] = {}
        """The longest that so many rows took."""
        self._least = 1

    @property
    def table(self) -> GapRows:
        """The rows of the last measurement, from all processes."""
        return self.metric.table

    @property
    def shifted_table(self) -> GapRows:
        """The same of the shifted contexts; no rows where there are none."""
        return self.shifted_metric.table

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not isinstance(pl_module, AmortizedModule):
            raise TypeError(f"GapMonitor measures an AmortizedModule; got {type(pl_module).__name__}")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.seconds, self._started, self._seconds_for = 0.0, time.perf_counter(), {}

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for metric in (self.metric, self.shifted_metric):
            metric.to(pl_module.device).reset()
            metric.update(GapRows(*torch.empty(len(GapRows._fields), 0, device=pl_module.device)))
        self.example, self.worst, self.shifted, self._least = None, None, {}, 1

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        metric = self.shifted_metric if dataloader_idx else self.metric
        number = batch_idx * trainer.world_size + trainer.global_rank
        index = number * 2**20 + torch.arange(len(outputs), device=outputs.device)
        at = 0
        while at < len(outputs) and (n := self._affordable(trainer, len(outputs) - at)):
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
            )
            metric.update(rows)
            if self.example is None and not dataloader_idx:
                self.example = (a, b.to(best.dtype), best)  # b may be of mixed precision
            if trainer.testing and self.keep_worst and not dataloader_idx:
                cases = Cases(rows, a, b.to(best.dtype), best)
                self.worst = worst_of(
                    cases if self.worst is None else concatenate([self.worst, cases]), self.keep_worst
                )
            spent = time.perf_counter() - started
            self.seconds += spent
            self._seconds_for[n], self._least = max(spent, self._seconds_for.get(n, 0.0)), n

    def _affordable(self, trainer: Trainer, rows: int) -> int:
        """How many of so many further rows to measure now: all outside training; one, if it is not known what a row costs.

        Rows are solved together until the slowest has ended. So n rows take no longer than more, nor n / k times k of them; but
        a few, without a slow one among them, may have been quick by luck: within a validation each part is as large as the last,
        and half as much again must be left as a part is expected to take.
        """
        if trainer.sanity_checking:
            return 0
        if trainer.state.fn != "fit" or self.max_fraction == 1:
            return rows
        left = self.max_fraction * (time.perf_counter() - self._started) - self.seconds
        if not self._seconds_for:
            return 1 if left > 0 else 0
        sizes = (rows, *(n for k in reversed(range((rows - 1).bit_length())) if (n := 2**k) >= self._least))
        return next((n for n in sizes if min(s * max(1, n / k) for k, s in self._seconds_for.items()) <= left / 1.5), 0)

    def _finish(self, module: LightningModule, split: str) -> None:
        for metric, name in ((self.metric, split), (self.shifted_metric, f"{split}/shifted")):
            statistics = metric.compute()
            if statistics["total"] == 0:
                continue
            found = {key: float(value) for key, value in statistics.items()}
            if metric is self.metric:
                self.results = found
            else:
                self.shifted = found
            module.log_dict({f"{name}/gap/{key}": value.float() for key, value in statistics.items()})

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        started = time.perf_counter()
        self._finish(pl_module, "val")
        self.seconds += time.perf_counter() - started

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._finish(pl_module, "test")
        self._gather_worst(trainer, pl_module.device)

    def _gather_worst(self, trainer: Trainer, device: torch.device) -> None:
        parts: list[Any] = [self.worst]
        if trainer.world_size > 1:
            mine = None if self.worst is None else map_leaves(lambda leaf: leaf.cpu(), self.worst)
            parts = [None] * trainer.world_size
            torch.distributed.all_gather_object(parts, mine)
        parts = [map_leaves(lambda leaf: leaf.to(device), part) for part in parts if part is not None]
        if parts:
            worst = worst_of(concatenate(parts), self.keep_worst)
            place = torch.searchsorted(self.table.index.contiguous(), worst.rows.index.to(self.table.index))
            self.worst = worst._replace(rows=worst.rows._replace(index=place))

    on_test_epoch_start, on_test_batch_end = on_validation_epoch_start, on_validation_batch_end
