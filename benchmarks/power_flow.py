"""AC optimal power flow: a network, and the batched interior point, against a loop of Ipopt with exact derivatives.

``python -m benchmarks.power_flow [--quick] [--cases case14 case30] [--json FILE]`` (needs ``casadi``, whose wheel has Ipopt)

Held-out loads (the test contexts of the recipe), 256 of them, ``--quick`` 64. Ipopt is built once for a case, outside the
clock, from casadi's own expressions with sparse exact derivatives, and solves one row after another from the flat start, one
thread, double precision. The network's time is that of one batch of all rows on one thread, completion and corrections included,
median of 7 after a warm-up; the interior point's likewise, median of 3. Both sides in this process, one after the other.

Rows that Ipopt does not solve have no feasible dispatch that anyone found; they are counted apart and left out on both sides.
Cost is relative to Ipopt's. A row is feasible when balance and limits hold within 1e-4 per unit, in double precision.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from amortized import checkpoint
from amortized.contract import map_leaves, take, violation
from amortized.problems import OperatingPoint, PowerFlow, PowerFlowContexts
from amortized.problems.constrained.power_flow import Loads
from amortized.solvers import Completion, InteriorPoint

CHECKPOINTS = Path(__file__).parent.parent / "checkpoints"
MUST = {"case14": (0.2, 50), "case30": (0.2, 50), "case57": (None, None), "case118": (None, None)}
"""Cost above Ipopt's at most, in per cent, and times as fast as its loop at least."""
SOLVER_MS = {"case14": 14.0}
"""What the batched interior point may take a row."""
SOLVER_ROWS = {"case118": 32}
"""In the interior point's batch; all rows where none are named."""


def load(case: str) -> PowerFlow:
    """The trained module of a case's recipe."""
    saved = checkpoint.load(CHECKPOINTS / f"power_flow_{case.removeprefix('case')}.ckpt")
    init = saved[checkpoint.RECIPE]["model"]["init_args"]
    network, refine = OperatingPoint(**init["network"]["init_args"]), Completion(**init["refine"]["init_args"])
    module = PowerFlow(network, case=case, refine=refine)
    module.load_state_dict(saved["state_dict"])
    return module.eval()


def ipopt(problem: PowerFlow) -> Callable[[Loads], tuple[Tensor, Tensor, Tensor]]:
    """Ipopt for a case: cost, whether solved, and seconds of each row of some loads."""
    import casadi as ca
    import numpy as np

    grid, (b0, a0) = problem.grid, problem.nominal()
    n, G, N = b0.shape[1], grid.generators, grid.buses

    def sparse(x: Tensor) -> Any:
        return ca.sparsify(ca.DM(x.numpy()))

    x, load = ca.SX.sym("x", n), ca.SX.sym("load", 2 * N)
    p, q, rest, v = x[:G], x[G : 2 * G], x[2 * G : 2 * G + N - 1], x[2 * G + N - 1 :]
    theta = ca.vertcat(rest[: grid.slack], 0, rest[grid.slack :])
    e, f = v * ca.cos(theta), v * ca.sin(theta)
    g, s = sparse(grid.g), sparse(grid.b)
    real, imaginary = g @ e - s @ f, g @ f + s @ e
    at = sparse(torch.eye(N, dtype=torch.float64)[:, grid.at])
    constraints = [e * real + f * imaginary + load[:N] - at @ p, f * real - e * imaginary + load[N:] - at @ q]
    lowest, rating = [np.zeros(2 * N)], grid.rating.numpy()
    if len(rating):
        for end, buses in (("from", grid.limited_from), ("to", grid.limited_to)):
            g, s = (sparse(getattr(grid, f"{end}_{part}")) for part in "gb")
            current = (g @ e - s @ f) ** 2 + (g @ f + s @ e) ** 2
            there = ca.vertcat(*(v[int(i)] for i in buses))
            constraints.append((there**2 * current / rating - rating) / 2)
            lowest.append(np.full(len(rating), -np.inf))
    cost = ca.sum1(grid.cost_2.numpy() * p**2 + grid.cost_1.numpy() * p + grid.cost_0.numpy())
    quiet = {"ipopt.print_level": 0, "print_time": 0, "ipopt.sb": "yes"}
    program = {"x": x, "p": load, "f": cost, "g": ca.vertcat(*constraints)}
    solve = ca.nlpsol("dispatch", "ipopt", program, quiet)
    upper, lower = problem.limits(b0)
    free = np.full(N - 1, np.inf)
    low, high = (
        np.concatenate([bound[: 2 * G].numpy(), sign * free, bound[2 * G :].numpy()])
        for bound, sign in ((lower, -1), (upper, 1))
    )
    settings = {"lbx": low, "ubx": high, "lbg": np.concatenate(lowest), "ubg": 0, "x0": problem.initial(a0)[0].numpy()}
    solve(p=torch.cat([a0.p[0], a0.q[0]]).numpy(), **settings)

    def loop(a: Loads) -> tuple[Tensor, Tensor, Tensor]:
        costs, solved, seconds = [], [], []
        for row in torch.cat([a.p, a.q], 1).double().numpy():
            begun = time.perf_counter()
            found = solve(p=row, **settings)
            seconds.append(time.perf_counter() - begun)
            costs.append(float(found["f"]))
            solved.append(bool(solve.stats()["success"]))
        return torch.tensor(costs, dtype=torch.float64), torch.tensor(solved), torch.tensor(seconds)

    return loop


def median_seconds(run: Callable[[], Any], repeats: int) -> float:
    """Of a call, after one to warm up."""
    run()
    times = []
    for _ in range(repeats):
        begun = time.perf_counter()
        run()
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


def measure(case: str, rows: int, repeats: int) -> list[dict[str, Any]]:
    """The rows of the table for one case."""
    problem, every = load(case), PowerFlowContexts(case, num_test=rows).contexts("test")
    costs, solved, seconds = ipopt(problem)(every)
    a, costs, seconds = take(every, solved), costs[solved], seconds[solved]
    count = len(costs)

    with torch.inference_mode():
        before, after = (b.double() for b in problem.iterates(a)[1:])
        taken = median_seconds(lambda: problem(a), repeats) / count
    exact = map_leaves(lambda leaf: leaf.double(), a)
    off = violation(problem, after, exact)
    above = 100 * (problem.objective(after, exact) / costs - 1)
    feasible = float((off <= 1e-4).double().mean())
    alone = float((violation(problem, before, exact) <= 1e-4).double().mean())
    times = float(seconds.mean()) / taken

    few = slice(SOLVER_ROWS.get(case, count))
    exact, solver = take(exact, few), InteriorPoint()
    start = problem.initial(exact)
    found = solver.solve(problem, exact, start)
    spent = median_seconds(lambda: solver.solve(problem, exact, start), min(3, repeats)) / len(start)
    apart = 100 * float((found.value / costs[few] - 1).abs().amax())
    cost_must, times_must = MUST[case]
    shown = f"{count} rows that Ipopt solves of {rows}"

    def row(name: str, value: float, goal: float | None, holds: bool | None, detail: str) -> dict[str, Any]:
        return {"id": f"{case}/{name}", "value": value, "goal": goal, "holds": holds, "detail": f"{detail}; {shown}"}

    mean, most = float(above.mean()), float(above.max())
    return [
        row("solvable", float(solved.double().mean()), None, None, "share of contexts that Ipopt solves"),
        row("cost", mean, cost_must, cost_must and mean <= cost_must, f"network above Ipopt, %, mean; largest {most:.3f}"),
        row("feasible", feasible, cost_must and 1.0, cost_must and feasible == 1,
            f"share within 1e-4 p.u.; largest violation {float(off.max()):.1e}; before corrections {alone:.3f}"),
        row("times", times, times_must, times_must and times >= times_must,
            f"Ipopt's loop {1e3 * float(seconds.mean()):.2f} ms a row, network {1e3 * taken:.4f} in one batch"),
        row("solver_ms", 1e3 * spent, SOLVER_MS.get(case), 1e3 * spent <= SOLVER_MS[case] if case in SOLVER_MS else None,
            f"InteriorPoint, ms a row, one batch of {len(start)}; converged {float(found.converged.double().mean()):.3f}, "
            f"cost within {apart:.1e} %"),
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument(
        "--cases", nargs="+", default=[c for c in MUST if (CHECKPOINTS / f"power_flow_{c[4:]}.ckpt").exists()]
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for case in options.cases:
        for found in measure(case, 64 if options.quick else 256, 3 if options.quick else 7):
            rows.append(found)
            mark = {True: "holds", False: "falls short", None: ""}[found["holds"]]
            goal = "" if found["goal"] is None else f"(goal {found['goal']:g})"
            print(f"{found['id']:<20} {found['value']:>10.4g} {goal:<12} {mark:<12} {found['detail']}", flush=True)
    if options.json:
        options.json.write_text(json.dumps({"rows": rows}, indent=1))


if __name__ == "__main__":
    main()
