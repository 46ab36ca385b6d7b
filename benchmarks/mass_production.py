"""Contexts a second of ``amortized solve`` on sphere beside loops of SciPy's L-BFGS over single problems.

``python -m benchmarks.mass_production [--quick] [--json FILE]``

Ours is all of it, on one thread: contexts drawn, predicted, certified, solved where they are above the tolerance, written and
checksummed. SciPy starts where the recipe's solver does, on contexts that are there already, with two gradients: by PyTorch, as
one has it of a problem written in PyTorch, and written by hand in NumPy, the strongest. In turn, the median of 5.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize

import amortized
from amortized.contract import Context, num_rows, take, value_and_grad
from amortized.shipping.production import Plan, described, produce
from amortized.shipping.trained import TrainedSolver

GAMMA, TOL, BATCH = 0.5, 0.1, 4096
GOAL = 50
"""Times a loop."""


def objective(b: np.ndarray, y: np.ndarray, offsets: np.ndarray) -> tuple[float, np.ndarray]:
    """``L(b; a)`` of one function of the sphere, and its gradient."""
    r = np.sqrt(b @ b)
    x = b / r
    c = np.clip(y @ x, -1 + 1e-12, 1 - 1e-12)
    d = np.arccos(c)
    z = -(d * d / 2 + offsets) / GAMMA
    top = z.max()
    w = np.exp(z - top)
    s = w.sum()
    on_x = ((w / s) * (-d / np.sqrt(1 - c * c))) @ y
    return -GAMMA * (np.log(s) + top) + (r - 1) ** 2, (on_x - (on_x @ x) * x) / r + 2 * (r - 1) * x


def rate(rows: int, work: Callable[[], Any]) -> tuple[float, float]:
    """Contexts a second: by the clock on the wall, and by the processor's, which other work on the machine disturbs less."""
    began = time.perf_counter(), time.process_time()
    work()
    return rows / (time.perf_counter() - began[0]), rows / (time.process_time() - began[1])


def write(solver: TrainedSolver, rows: int) -> None:
    """What ``amortized solve`` does, into a folder that is then removed."""
    with tempfile.TemporaryDirectory() as folder, Path(os.devnull).open("w") as nowhere:
        plan = Plan("sphere", "", rows, rows, BATCH, TOL, 0, False, "cpu", "drawn", described(solver.solver))
        with contextlib.redirect_stderr(nowhere):
            produce(solver, Path(folder), plan)


def by_scipy(solver: TrainedSolver, a: Context, by_hand: bool) -> list[float]:
    """The values that a loop over single problems finds."""
    start = solver.module.initial(a).double().numpy()
    y, offsets = a.centres.double().numpy(), a.offsets.double().numpy()
    found = []
    for i, b in enumerate(start):
        row = take(a, slice(i, i + 1))

        def by_torch(x: np.ndarray, row: Any = row) -> tuple[float, np.ndarray]:
            value, gradient = value_and_grad(solver.module, torch.from_numpy(x).float().unsqueeze(0), row)
            return float(value), gradient[0].double().numpy()

        given = (objective, b, (y[i], offsets[i])) if by_hand else (by_torch, b)
        found.append(float(minimize(*given, jac=True, method="L-BFGS-B").fun))
    return found


def stages(solver: TrainedSolver, rows: int) -> dict[str, float]:
    """Microseconds of a context, of one stage after the other."""
    module, a = solver.module, solver.data.produce(0, rows)
    batches = [take(a, slice(at, at + BATCH)) for at in range(0, rows, BATCH)]
    small = [take(a, slice(at, at + solver.data.eval_batch_size)) for at in range(0, rows, solver.data.eval_batch_size)]
    certificate = solver.calibration.network

    def micro(rows: int, work: Callable[[], Any]) -> float:
        return 1e6 / rate(rows, work)[1]

    def predict() -> list[torch.Tensor]:
        with torch.no_grad():
            return [module(part) for part in small]

    b = predict()
    found = {
        "drawing": micro(rows, lambda: [solver.data.produce(1, num_rows(part)) for part in batches]),
        "network": micro(rows, predict),
        "certificate": micro(rows, lambda: [certificate.bound(module, *pair) for pair in zip(b, small, strict=True)]),
        "all but the solver": micro(rows, lambda: [solver.rows(part, TOL, by_network=True) for part in batches]),
        "all": micro(rows, lambda: solver.all_rows(enumerate(batches), TOL, BATCH)),
    }
    return found | {"solver": found["all"] - found["all but the solver"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows, table = 16384 if options.quick else 65536, []
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    solver = amortized.load("sphere")
    few = solver.data.produce(0, 200)
    solver.rows(few, TOL)
    sides: dict[str, tuple[int, Callable[[], Any]]] = {
        "amortized solve": (rows, lambda: write(solver, rows)),
        "SciPy, by PyTorch": (40, lambda: by_scipy(solver, take(few, slice(0, 40)), by_hand=False)),
        "SciPy, by hand": (200, lambda: by_scipy(solver, few, by_hand=True)),
    }
    turns = [{name: rate(*side) for name, side in sides.items()} for _ in range(5)]
    for clock, of in enumerate(("wall", "processor")):
        for name in sides:
            median = statistics.median(turn[name][clock] for turn in turns)
            ratio = statistics.median(turn["amortized solve"][clock] / turn[name][clock] for turn in turns)
            goal = GOAL if "SciPy" in name and of == "processor" else None
            holds = None if goal is None else ratio >= goal
            mark = "" if goal is None else f" (goal {goal}: {'holds' if holds else 'MISSED'})"
            print(f"{of:10s} {name:20s} {median:10,.0f} contexts/s, ours is {ratio:6.1f} times that{mark}")
            detail = f"{median:,.0f} contexts/s, clock of the {of}; the value is what ours is times that"
            table.append({"id": f"{name}, {of}", "value": ratio, "goal": goal, "holds": holds, "detail": detail})
    best = np.array(by_scipy(solver, few, by_hand=True))
    answer = solver.rows(few, TOL)
    value = answer.objective.double().numpy()
    gap = value - np.minimum(best, value)
    print(f"mean gap to SciPy's best of 200: {gap.mean():.4f}; within {TOL}: {(gap <= TOL).mean():.1%}")
    every = [stages(solver, rows) for _ in range(3)]
    shown = ", ".join(f"{name} {statistics.median(one[name] for one in every):.1f}" for name in every[0])
    loop = statistics.median(1e6 / turn["SciPy, by hand"][1] for turn in turns)
    detail = f"microseconds of the processor for a context: {shown}; the loop by hand {loop:.0f}, a 50th of it {loop / 50:.1f}"
    print(detail)
    table.append({"id": "mean gap to SciPy", "value": float(gap.mean()), "goal": None, "holds": None, "detail": detail})
    if options.json:
        options.json.write_text(json.dumps({"rows": table}, indent=1))


if __name__ == "__main__":
    main()
