"""What a trained model's answers lack, calibrated on validation contexts: for its predictions and for what solvers make of them.

An answer is the network's prediction, or what the solver makes of it (*refined*), or the better of that and what the solver
finds from the cold start (*solver*). Each has a certificate of its own, the last two one for rows whose solver met its
tolerance and one for others, so that each bound is for contexts that take that path.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from amortized.certificates import Certificate, Duality
from amortized.certificates.conformal import ASSUMPTION, Conformal, calibrate, squared_gradient
from amortized.certificates.likeness import Likeness, features, fit_likeness
from amortized.contexts.data_module import ContextDataModule, in_precision
from amortized.contract import (
    Context,
    concatenate,
    context_of,
    draws,
    evaluate,
    feasible_value,
    num_rows,
    stream_seed,
    take,
)
from amortized.evaluation.float64 import at_least_float32, in_float64
from amortized.evaluation.gap import longer
from amortized.module import AmortizedModule
from amortized.solvers import Solution, Solver

ALPHA, CONTEXTS = 0.1, 512
"""Rows on which a bound may fail; validation contexts that are solved for it, at most."""


class Calibration(NamedTuple):
    """The certificates of a trained model's answers, and which contexts they are for."""

    network: Conformal
    refined: Conformal
    refined_unfinished: Conformal
    """Where the solver did not meet its tolerance."""
    solver: Conformal
    solver_unfinished: Conformal
    likeness: Likeness
    gap: float
    """Mean gap of the predictions, in the objective's unit; infinite where no row had one."""

    def state(self) -> dict[str, Any]:
        """As plain values and tensors, for a checkpoint."""
        parts = {name: dataclasses.asdict(part) for name, part in self._asdict().items() if isinstance(part, Conformal)}
        return {"assumption": ASSUMPTION, "gap": self.gap, "likeness": self.likeness._asdict()} | parts

    @classmethod
    def of(cls, state: dict[str, Any]) -> Calibration:
        """From :meth:`state`."""
        parts = {name: Conformal(**state[name]) for name in cls._fields if name not in ("likeness", "gap")}
        return cls(**parts, likeness=Likeness(**state["likeness"]), gap=state["gap"])


def proof_for(problem: AmortizedModule) -> Certificate | None:
    """A certificate of the problem's own, which holds for every context: that of its structure, if it has one."""
    return Duality() if hasattr(problem, "program") else None


class _Gaps(NamedTuple):
    """Of each context, in the objective's unit, against the best that is known."""

    network: Tensor
    squared: Tensor
    """Squared gradient of the prediction."""
    refined: Tensor
    refined_converged: Tensor
    solver: Tensor
    solver_converged: Tensor


def calibrate_model(
    module: AmortizedModule, data: ContextDataModule, solver: Solver, alpha: float = ALPHA, contexts: int = CONTEXTS
) -> Calibration:
    """Calibrate a trained model on the validation contexts of its data.

    The reference of each is the best of the solver from the cold start, from the prediction, and once more from the better of
    those, at a hundredth of its tolerance. What contexts are like is fitted to training contexts, to what the model sees of
    them.

    Args:
        module: trained.
        data: set up.
        solver: that of the gap.
        alpha: the fraction of rows on which a bound may fail.
        contexts: validation contexts to solve, at most: their first.
    """
    training = module.training
    module.eval()
    try:
        with torch.no_grad(), draws(stream_seed(data.seed, "check", 1), module.device):
            return _calibrate(module, data, solver, alpha, contexts)
    finally:
        module.train(training)


def _calibrate(
    module: AmortizedModule, data: ContextDataModule, solver: Solver, alpha: float, contexts: int
) -> Calibration:
    train, held_out = (_observed(data, split, 4 * contexts, module) for split in ("train", "val"))
    rows = [_gaps(module, a, solver, number) for number, a in enumerate(_batches(data, "val", contexts, module))]
    found = _Gaps(*map(torch.cat, zip(*rows, strict=True)))
    # The unit is fixed on contexts of its own: those that the bound is calibrated on must not have chosen it.
    few = len(found.network) // 8
    unit = 0.1 * float(found.squared[: max(few, 1)].double().nanmedian())
    found = _Gaps(*(column[few:] for column in found))

    known = found.network[found.network.isfinite()]

    def stage(gap: Tensor, chosen: Tensor) -> Conformal:
        return calibrate(gap[chosen], None, alpha)

    return Calibration(
        network=calibrate(found.network, found.squared, alpha, max(unit, 1e-30)),
        refined=stage(found.refined, found.refined_converged),
        refined_unfinished=stage(found.refined, ~found.refined_converged),
        solver=stage(found.solver, found.solver_converged),
        solver_unfinished=stage(found.solver, ~found.solver_converged),
        likeness=_likeness(train, held_out),
        gap=float(known.mean()) if len(known) else math.inf,
    )


def _likeness(train: Context, held_out: Context) -> Likeness:
    if features(train).shape[1:] == features(held_out).shape[1:]:
        return fit_likeness(train, held_out)
    half = num_rows(held_out) // 2  # those of training are of another size
    return fit_likeness(take(held_out, slice(0, half)), take(held_out, slice(half, None)))


def _gaps(module: AmortizedModule, a: Context, solver: Solver, number: int) -> _Gaps:
    """What each stage lacks on a batch."""
    b = module(a)
    squared = squared_gradient(module, b, a)
    problem, a = at_least_float32(module, a)
    a = problem.prepare(a)
    b = b.to(torch.promote_types(b.dtype, torch.float32))
    exact = in_float64(problem)

    def value(of: Tensor) -> Tensor:
        with draws(stream_seed(0, "gap value", number), of.device):
            found = exact(of, a)
        if found is None:
            with draws(stream_seed(0, "gap value", number), of.device):
                found = evaluate(problem, of, a).double()
        return feasible_value(problem, of, found.nan_to_num(nan=torch.inf), a)

    def solved(by: Solver, start: Tensor) -> Solution:
        with draws(stream_seed(0, "gap search", number), start.device):
            return by.solve(problem, a, start)

    warm, cold = solved(solver, b), solved(solver, problem.initial(a).to(b.dtype))
    warmer = value(warm.b) <= value(cold.b)
    both = torch.where(warmer.view(-1, *[1] * (b.ndim - 1)), warm.b, cold.b)
    last = solved(longer(solver, b.dtype, times=1), both).b
    values = torch.stack([value(of) for of in (b, warm.b, both, last)])
    network, refined, solver_, _ = values - values.min(0).values
    return _Gaps(
        network, squared, refined, warm.converged, solver_, torch.where(warmer, warm.converged, cold.converged)
    )


def _batches(data: ContextDataModule, split: str, most: int, module: AmortizedModule) -> Iterator[Context]:
    """The first contexts of a split, in its batches."""
    number, stop = 0, data.num_batches(split) if split != "train" else 10**9
    while most > 0 and number < stop:
        a = take(data.batch(split, number, module.device), slice(0, most))
        yield a if module.dtype == torch.float32 else in_precision(a, module.dtype)  # type: ignore[arg-type]
        most -= num_rows(a)
        number += 1


def _observed(data: ContextDataModule, split: str, most: int, module: AmortizedModule) -> Context:
    """What the model sees of the first contexts of a split, a batch at a time: it may be less than there is."""
    return concatenate([module.observe(context_of(a)) for a in _batches(data, split, most, module)])
