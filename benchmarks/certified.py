"""Predict, certify, refine, fall back, beside the solver alone: on contexts like those of training, and on shifted ones.

``python -m benchmarks.certified [--quick] [--only CASE ...] [--json FILE]``

Each case is a reference checkpoint (or, where there is none, the recipe's last run under ``runs/``) with a tolerance. Of the test
contexts, and of as many shifted ones:

* *met*: rows that truly lack at most the tolerance against the best of the answer, the solver and the solver at a hundredth of
  its tolerance; *said*: rows whose certificate says so; *wrong*: rows that say so and do not; *silent*: rows solved without a
  certificate, of contexts unlike those of training; *none*: rows that say they are not solved;
* *ratio*: the time of the solver alone over that of the answer, both in one batch, warm, in turn, the median of 5 turns.

And how often the conformal bound holds over 100 calibrations, each on contexts of its own, beside what it promises.
``--quick`` takes 64 contexts, one turn and 20 calibrations.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import math
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import amortized
from amortized.certificates.conformal import calibrate, squared_gradient
from amortized.cli.ship import checkpoint_of
from amortized.contexts import ContextDataModule
from amortized.contract import concatenate, draws, evaluate, feasible_value, num_rows, take
from amortized.shipping.trained import TrainedSolver
from amortized.solvers.base import tolerance


class Case(NamedTuple):
    """A trained solver by its recipe's name, what its answers may lack, and other contexts of the same kind."""

    recipe: str
    tol: float
    shift: Callable[[Any], Any]
    shifted: str
    """What the shift is, in words."""


CASES = [
    Case("sphere", 0.1, lambda a: a._replace(offsets=3 * a.offsets), "offsets three times as large"),
    Case("vae_digits", 1.0, lambda a: 1 - a, "white digits on black"),
    Case("dc3_convex", 0.05, lambda a: 1.3 * a, "right-hand sides 1.3 times as large"),
    Case("power_flow_30", 1.0, lambda a: 1.1 * a, "all loads 1.1 times as large"),
]


def seconds(f: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    found = f()
    return time.perf_counter() - began, found


def value(solver: TrainedSolver, b: Tensor, a: Any) -> Tensor:
    """The objective of feasible solutions, on the same draws for all."""
    with draws(2**31 + 1, b.device), torch.no_grad():
        found = evaluate(solver.module, b, a).double()
    return feasible_value(solver.module, b, found, a)


def alone(solver: TrainedSolver, a: Any) -> Tensor:
    with torch.no_grad(), draws(2**31 + 2, solver.module.device):
        return solver.solver.solve(solver.module, a, solver.module.initial(a)).b


def best_known(solver: TrainedSolver, a: Any, *solutions: Tensor) -> Tensor:
    """The lowest objective that is known, with the solver at a hundredth of its tolerance from the best of these."""
    values = torch.stack([value(solver, b, a).nan_to_num(nan=math.inf) for b in solutions])
    which = values.argmin(0)
    start = torch.stack(solutions)[which, torch.arange(len(which))]
    strict = copy.deepcopy(solver.solver)
    strict.tol = tolerance(strict.tol, start.dtype) / 100
    with torch.no_grad(), draws(2**31 + 2, start.device):
        further = strict.solve(solver.module, a, start).b
    return torch.minimum(values.min(0).values, value(solver, further, a).nan_to_num(nan=math.inf))


def measure(solver: TrainedSolver, a: Any, tol: float, turns: int) -> dict[str, Any]:
    rows = num_rows(a)
    solver.solve(a, tol, batch_size=rows), alone(solver, a)
    times: list[tuple[float, float]] = []
    for _ in range(turns):
        ours, answer = seconds(lambda: solver.solve(a, tol, batch_size=rows))
        theirs, b = seconds(lambda: alone(solver, a))
        times.append((ours, theirs))
    found = torch.where(answer.b.isfinite(), answer.b, b)
    gap = value(solver, found, a) - best_known(solver, a, found, b)
    solver_gap = value(solver, b, a) - best_known(solver, a, found, b)
    said = answer.certificate <= tol
    paths = {path: float((answer.path == path).mean()) for path in ("network", "refined", "solver", "none")}
    return {
        "contexts": rows,
        "paths": paths,
        "met": float((gap <= tol).float().mean()),
        "solver_alone_met": float((solver_gap <= tol).float().mean()),
        "said": float(said.float().mean()),
        "wrong": float((said & ~(gap <= tol)).float().mean()),
        "silent": float((torch.from_numpy(answer.solved) & answer.certificate.isnan()).float().mean()),
        "seconds": statistics.median(ours for ours, _ in times),
        "seconds_solver": statistics.median(theirs for _, theirs in times),
        "ratio": statistics.median(theirs / ours for ours, theirs in times),
    }


def calibrations(solver: TrainedSolver, number: int, alpha: float = 0.1) -> dict[str, float]:
    """How often the bound holds on contexts of its own, over so many calibrations on other contexts."""
    sampled = type(solver.data).sample is not ContextDataModule.sample
    if sampled:
        each = 200
        pool = concatenate([solver.data.produce(k, 512) for k in range(-(-2 * each * number // 512))])
    else:
        batches = [solver.data.batch(s, k) for s in ("val", "test") for k in range(solver.data.num_batches(s))]
        pool = concatenate(batches)
        each = num_rows(pool) // 2
    gaps, squares = [], []
    for at in range(0, num_rows(pool), 1024):
        a = take(pool, slice(at, at + 1024))
        with torch.no_grad():
            b = solver.module(a)
        with draws(2**31 + 2, b.device), torch.no_grad():
            warm = solver.solver.solve(solver.module, a, b).b
        gaps.append(value(solver, b, a) - best_known(solver, a, b, warm, alone(solver, a)))
        squares.append(squared_gradient(solver.module, b, a))
    gap, square = torch.cat(gaps), torch.cat(squares).double()
    unit = solver.calibration.network.unit or 1e-30
    held = []
    for k in range(number):
        order = torch.randperm(len(gap), generator=torch.Generator().manual_seed(k))
        if sampled:
            order = torch.arange(2 * each * k, 2 * each * (k + 1))
        one, other = order[:each], order[each : 2 * each]
        found = calibrate(gap[one], square[one], alpha, unit)
        held.append(float((gap[other] <= found.quantile * (unit + square[other])).double().mean()))
    mean, error = statistics.mean(held), statistics.stdev(held) / math.sqrt(number)
    return {
        "calibrations": number,
        "calibrated_on": each,
        "promised": 1 - alpha,
        "expected": math.ceil((each + 1) * (1 - alpha) - 1e-9) / (each + 1),
        "coverage": mean,
        "low": mean - 1.96 * error,
        "high": mean + 1.96 * error,
        "pooled": float(not sampled),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", nargs="*", default=[case.recipe for case in CASES])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    for case in CASES:
        if case.recipe not in options.only:
            continue
        try:
            solver = amortized.load(checkpoint_of(case.recipe, None))
        except ValueError as error:
            print(f"{case.recipe}: left out, {error}")
            continue
        solver.like  # noqa: B018  (its data are set up)
        a = concatenate([solver.data.batch("test", k) for k in range(solver.data.num_batches("test"))])
        a = take(a, slice(0, 64 if options.quick else 1024))
        turns = 1 if options.quick else 5
        rows = {
            "in distribution": measure(solver, a, case.tol, turns),
            case.shifted: measure(solver, case.shift(a), case.tol, turns),
        }
        print(f"\n{case.recipe}, tolerance {case.tol:g}")
        for name, row in rows.items():
            paths = " ".join(f"{path} {share:.1%}" for path, share in row["paths"].items() if share)
            print(
                f"  {name} ({row['contexts']}): {paths}; met {row['met']:.1%} (solver alone {row['solver_alone_met']:.1%}), "
                f"said {row['said']:.1%}, wrong {row['wrong']:.1%}, silent {row['silent']:.1%}; "
                f"{1e3 * row['seconds']:.1f} ms, solver alone {1e3 * row['seconds_solver']:.1f} ms: ratio {row['ratio']:.2f}"
            )
        if solver.proof is None:
            held = calibrations(solver, 20 if options.quick else 100)
            print(
                f"  conformal bound, {held['calibrations']} calibrations on {held['calibrated_on']}: holds "
                f"{held['coverage']:.2%} ({held['low']:.2%} to {held['high']:.2%}), expected {held['expected']:.2%}"
            )
            rows["conformal"] = held
        found[case.recipe] = rows
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
