"""Feasible predictions against exact solvers: DC3's two families and portfolio choice.

``python -m benchmarks.constrained [--quick] [--json FILE]``

Networks are the reference checkpoints; contexts are held out (DC3: the source's own 833 test rows), all rows in one batch, one
thread. A suboptimality is the mean over rows of what a prediction costs above the best known, relative to the mean of that; a
violation the largest of all rows, in float64 on the source's own numbers, whatever the prediction's precision. Every solver's
suboptimality and violation stand beside its time: all are exact, to 1e-6 or better. Set-up (matrices, factors that a solver
keeps, compilation) is outside the clock; the sides take turns, and each time is the median of several. ADMM's penalty is the best
of a grid on these very rows. The floor is affine regression of the solutions, made feasible by the same gauge.

Rivals that are not installed are left out by name: ``pip install --no-deps moreau moreau-cpu piqp osqp casadi``.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("RAYON_NUM_THREADS", "1")  # of moreau, before it is imported

import numpy as np
import torch
from torch import Tensor, nn

from amortized import checkpoint
from amortized.contract import Context, QuadraticProgram, evaluate, map_leaves, num_rows, take, violation
from amortized.networks import MessagePassing, ResidualMLP
from amortized.problems import ConvexDC3, DC3Contexts, FactorMarkets, NonconvexDC3, Portfolio
from amortized.solvers import ADMM, Gauge, ProjectedGradient, Simplex, Solver

CHECKPOINTS = Path(__file__).parent.parent / "checkpoints"
PENALTIES = (0.01, 0.03, 0.1, 0.3)
"""ρ of ADMM, tried."""
SLOW = 1.0
"""Seconds from which a call is timed once: what makes a first call slower is nothing beside them."""
Solve = Callable[[], Tensor]


class Side(NamedTuple):
    """What was timed: seconds for all rows, and what was found."""

    seconds: float
    suboptimality: float
    violation: float

    def __str__(self) -> str:
        return f"{1e3 * self.seconds:.2f} ms ({self.suboptimality:.1e}, violation {self.violation:.1e})"


def row(name: str, value: float, goal: float | None, detail: str, least: bool = False) -> dict[str, Any]:
    """A line of the table; ``goal`` is the most that the value may be, or the ``least``."""
    holds = None if goal is None else bool(value >= goal if least else value <= goal)
    return {
        "id": f"constrained: {name}",
        "value": float(f"{value:.4g}"),
        "goal": goal,
        "holds": holds,
        "detail": detail,
    }


def exact(kind: type, **settings: Any) -> Any:
    """The problem in float64, from its own numbers."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        return kind(nn.Identity(), **settings)
    finally:
        torch.set_default_dtype(before)


def load(name: str, kind: type, network: type, refine: Solver) -> Any:
    """The module of a reference checkpoint."""
    saved = checkpoint.load(CHECKPOINTS / f"{name}.ckpt")
    init = saved[checkpoint.RECIPE]["model"]["init_args"]
    module = kind(network(**init["network"]["init_args"]), refine=refine)
    module.load_state_dict(saved["state_dict"])
    return module.eval()


def sides(problem: Any, a: Context, best: Tensor, calls: dict[str, Solve], repeats: int) -> dict[str, Side]:
    """Each call timed, in turns, after one that counts only where it took a second; ``best`` ``(B,)`` are the reference's."""
    spent: dict[str, list[float]] = {}
    found: dict[str, Tensor] = {}

    def timed(name: str) -> None:
        started = time.perf_counter()
        found[name] = calls[name]().double()
        spent.setdefault(name, []).append(time.perf_counter() - started)

    for name in calls:
        timed(name)
    quick = [name for name in calls if spent[name][0] < SLOW]
    for name in quick:
        spent[name].clear()
    for _ in range(repeats):
        for name in quick:
            timed(name)
    return {
        name: Side(
            statistics.median(spent[name]),
            float((evaluate(problem, b, a) - best).mean() / best.mean().abs()),
            float(violation(problem, b, a).max()),
        )
        for name, b in found.items()
    }


# ---- rivals


def there_is(package: str) -> bool:
    try:
        importlib.import_module(package)
    except ImportError:
        print(f"{package} is not installed: left out", file=sys.stderr)
        return False
    return True


def admm(problem: Any, a: Context) -> Solve:
    """Ours, with the best of the penalties."""
    start = problem.initial(a)
    times = {}
    for rho in PENALTIES:
        solver = ADMM(rho=rho, tol=1e-6)
        started = time.perf_counter()
        solver.solve(problem, a, start)
        times[rho] = time.perf_counter() - started
    solver = ADMM(rho=min(times, key=lambda rho: times[rho]), tol=1e-6)
    return lambda: solver.solve(problem, a, start).b


def split(program: QuadraticProgram) -> tuple[np.ndarray, ...]:
    """P, q, equalities E b = e and inequalities G b ≤ h of all rows, as arrays; matrices as ``program`` has them."""
    equal = (program.lower == program.upper).all(0)
    above, below = program.upper.isfinite().all(0) & ~equal, program.lower.isfinite().all(0) & ~equal
    A, lower, upper = program.A, program.lower, program.upper
    G = torch.cat([A[..., above, :], -A[..., below, :]], -2)
    h = torch.cat([upper[:, above], -lower[:, below]], 1)
    parts = (program.P, program.q, A[..., equal, :], upper[:, equal], G, h)
    return tuple(x.double().numpy() for x in parts)


def moreau(program: QuadraticProgram, kind: str) -> Solve:
    """Moreau's batched solver, ``active_set`` or ``ipm``."""
    import moreau as package
    from scipy.sparse import csr_array

    P, q, E, e, G, h = split(program)
    B, n = q.shape
    rows = np.concatenate([E, G], -2)
    m = rows.shape[-2]
    P, rows = np.broadcast_to(P, (B, n, n)), np.broadcast_to(rows, (B, m, n))
    shape_p, shape_a = (csr_array((np.abs(x).max(0) > 0).astype(float)) for x in (P, rows))
    solver = package.CompiledSolver(
        n=n, m=m,
        P_row_offsets=shape_p.indptr.tolist(), P_col_indices=shape_p.indices.tolist(),
        A_row_offsets=shape_a.indptr.tolist(), A_col_indices=shape_a.indices.tolist(),
        cones=package.Cones(num_zero_cones=e.shape[1], num_nonneg_cones=h.shape[1]),
        settings=package.Settings(batch_size=B, solver=kind, device="cpu"),
    )  # fmt: skip

    def values(matrices: np.ndarray, shape: Any) -> np.ndarray:
        at = np.repeat(np.arange(shape.shape[0]), np.diff(shape.indptr)), shape.indices
        return np.ascontiguousarray(matrices[:, at[0], at[1]])

    solver.setup(values(P, shape_p), values(rows, shape_a))
    right = np.concatenate([e, h], 1)
    return lambda: torch.from_numpy(np.asarray(solver.solve(q, right).x))


def piqp(program: QuadraticProgram) -> Solve:
    """PIQP's dense solver, row after row; where matrices are shared they are set up once."""
    import piqp as package

    P, q, E, e, G, h = split(program)
    own = P.ndim == 3

    def made(i: int) -> Any:
        solver = package.DenseSolver()
        solver.settings.eps_abs = solver.settings.eps_rel = 1e-9
        solver.setup(P[i] if own else P, q[i], E[i] if E.ndim == 3 else E, e[i], G[i] if G.ndim == 3 else G, None, h[i])
        return solver

    solvers = [made(i) for i in range(len(q))] if own else [made(0)]

    def solve() -> Tensor:
        found = []
        for i in range(len(q)):
            solver = solvers[i] if own else solvers[0]
            if not own:
                solver.update(c=q[i], b=e[i], h_u=h[i])
            solver.solve()
            found.append(np.array(solver.result.x))
        return torch.from_numpy(np.stack(found))

    return solve


def osqp(program: QuadraticProgram) -> Solve:
    """OSQP at 1e-6 with polishing off, row after row; shared matrices are set up once."""
    import osqp as package
    from scipy.sparse import csc_matrix

    P, q, A, lower, upper = (x.double().numpy() for x in program)
    own = P.ndim == 3

    def made(i: int) -> Any:
        solver = package.OSQP()
        solver.setup(
            csc_matrix(np.triu(P[i] if own else P)), q[i], csc_matrix(A[i] if A.ndim == 3 else A), lower[i], upper[i],
            eps_abs=1e-6, eps_rel=1e-6, verbose=False, max_iter=20000,
        )  # fmt: skip
        return solver

    solvers = [made(i) for i in range(len(q))] if own else [made(0)]

    def solve() -> Tensor:
        found = []
        for i in range(len(q)):
            solver = solvers[i] if own else solvers[0]
            if not own:
                solver.update(q=q[i], l=lower[i], u=upper[i])
            found.append(solver.solve().x)
        return torch.from_numpy(np.stack(found))

    return solve


def ipopt(problem: NonconvexDC3, a: Tensor) -> Solve:
    """Ipopt with exact derivatives, compiled once, row after row, from E⁺ a as in the source."""
    import casadi

    A, q, p, h = (x.double().numpy() for x in (problem.A, problem.q, problem.p, problem.h))
    b = casadi.MX.sym("b", len(q))
    nlp = {"x": b, "f": 0.5 * casadi.dot(q * b, b) + casadi.dot(casadi.DM(p), casadi.sin(b)), "g": casadi.DM(A) @ b}
    quiet = {"print_time": False, "ipopt.print_level": 0, "ipopt.sb": "yes", "ipopt.tol": 1e-8}
    solver = casadi.nlpsol("dc3", "ipopt", nlp, quiet)
    pinv, right = np.linalg.pinv(A[: a.shape[1]]), a.double().numpy()

    def solve() -> Tensor:
        found = []
        for e in right:
            lower = np.concatenate([e, np.full_like(h, -np.inf)])
            found.append(np.array(solver(x0=pinv @ e, lbg=lower, ubg=np.concatenate([e, h]))["x"])[:, 0])
        return torch.from_numpy(np.stack(found))

    return solve


def programs(problem: Any, a: Context) -> dict[str, Solve]:
    """Every exact solver of quadratic programs that is here."""
    program, calls = problem.program(a), {"ADMM": admm(problem, a)}
    if there_is("moreau") and there_is("scipy"):
        calls |= {"Moreau, active set": moreau(program, "active_set"), "Moreau, ipm": moreau(program, "ipm")}
    if there_is("piqp"):
        calls["PIQP"] = piqp(program)
    if there_is("osqp") and there_is("scipy"):
        calls["OSQP"] = osqp(program)
    return calls


# ---- the table


def predictions(module: nn.Module, a: Context) -> Solve:
    def predict() -> Tensor:
        with torch.no_grad():
            found: Tensor = module(a)
        return found

    return predict


def affine(solver: Solver, problem: Any, seen: Tensor, a: Tensor) -> Solve:
    """Least squares of the solutions of training contexts, and the gauge."""
    targets = solver.solve(problem, seen, problem.initial(seen)).b
    ones = torch.ones_like(seen[:, :1])
    weights = torch.linalg.lstsq(torch.cat([seen, ones], 1), targets).solution
    gauge = Gauge()
    return lambda: gauge.correct(problem, a, torch.cat([a, torch.ones_like(a[:, :1])], 1) @ weights)


def training_seconds(module: Any, data: Any, steps: int, probe: int = 60) -> float:
    """CPU time of so many updates, of which a few are made here: without validation."""
    optimizer = torch.optim.Adam(module.parameters(), 0.0)

    def run(first: int, last: int) -> float:
        started = time.process_time()
        for number in range(first, last):
            loss = module.amortized_step(data.batch("train", number)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return time.process_time() - started

    run(0, 5)
    return run(5, 5 + probe) / probe * steps


def rows_of(
    name: str, found: dict[str, Side], goals: tuple[float | None, float | None, float | None], minutes: float, n: int
) -> list[dict[str, Any]]:
    """Suboptimality, violation and speed of the network, and what the rivals and the floor have."""
    network, floor = found["network"], found.get("affine + gauge")
    rivals = {k: side for k, side in found.items() if k not in ("network", "affine + gauge")}
    sound = {k: s for k, s in rivals.items() if s.violation <= 1e-5 and abs(s.suboptimality) <= 1e-5}
    fastest = min(sound, key=lambda k: sound[k].seconds)
    beside = "; ".join(f"{k} {side}" for k, side in sorted(rivals.items(), key=lambda item: item[1].seconds))
    rows = [
        row(f"{name}, network's relative suboptimality", network.suboptimality, goals[0], f"{n} held-out rows"),
        row(f"{name}, network's largest violation", network.violation, goals[1], f"{n} held-out rows"),
        row(
            f"{name}, fastest exact solver's time over the network's",
            sound[fastest].seconds / network.seconds,
            goals[2],
            f"network {network}; {beside}",
            least=True,
        ),
        row(f"{name}, minutes of training on one core", minutes, 5.0, "the recipe's updates, from 60 of them"),
    ]
    if floor is not None:
        times = floor.suboptimality / network.suboptimality
        detail = f"{floor}, the floor: {times:.1f} times the network's"
        rows.append(row(f"{name}, affine regression and gauge", floor.suboptimality, None, detail))
    return rows


def convex(quick: bool) -> list[dict[str, Any]]:
    a = DC3Contexts(num_test=128 if quick else 833).contexts("test")
    problem, exactly = exact(ConvexDC3), a.double()
    module = load("dc3_convex", ConvexDC3, ResidualMLP, Gauge())
    best = ADMM(tol=1e-9, steps=20000).solve(problem, exactly, problem.initial(exactly)).value
    seen = DC3Contexts().contexts("train").double()
    calls = {"network": predictions(module, a), "affine + gauge": affine(ADMM(tol=1e-7), problem, seen, exactly)}
    found = sides(problem, exactly, best, calls | programs(problem, exactly), 3 if quick else 7)
    steps = float(checkpoint.load(CHECKPOINTS / "dc3_convex.ckpt")["global_step"])
    minutes = training_seconds(module, DC3Contexts(batch_size=512), int(steps)) / 60
    print(f"mean optimum {best.mean():.7f}", file=sys.stderr)
    return rows_of("DC3 convex", found, (0.005, 1e-5, 10.0), minutes, num_rows(a))


def nonconvex(quick: bool) -> list[dict[str, Any]]:
    a = DC3Contexts(num_test=128 if quick else 833).contexts("test")
    problem, exactly = exact(NonconvexDC3), a.double()
    module = load("dc3_nonconvex", NonconvexDC3, ResidualMLP, Gauge())
    start = problem.initial(exactly)
    best = ProjectedGradient(steps=500, tol=1e-7).solve(problem, exactly, start).value
    seen = take(DC3Contexts().contexts("train").double(), slice(0, 2000))
    solver = ProjectedGradient(steps=300, tol=1e-4)
    calls: dict[str, Solve] = {
        "network": predictions(module, a),
        "affine + gauge": affine(solver, problem, seen, exactly),
        "projected gradient": lambda: solver.solve(problem, exactly, start).b,
    }
    found = sides(problem, exactly, best, calls, 1 if quick else 3)
    if there_is("casadi"):  # a row's time does not depend on how many there are
        few = take(exactly, slice(0, 16 if quick else 64))
        side = sides(problem, few, best[: len(few)], {"Ipopt": ipopt(problem, few)}, 1)["Ipopt"]
        found["Ipopt"] = side._replace(seconds=side.seconds * len(a) / len(few))
    steps = float(checkpoint.load(CHECKPOINTS / "dc3_nonconvex.ckpt")["global_step"])
    minutes = training_seconds(module, DC3Contexts(batch_size=512), int(steps)) / 60
    print(f"mean of the best known {best.mean():.7f}", file=sys.stderr)
    return rows_of("DC3 non-convex", found, (0.004, 1e-5, 100.0), minutes, num_rows(a))


def portfolio(quick: bool) -> list[dict[str, Any]]:
    a = FactorMarkets(num_test=64 if quick else 256).contexts("test")
    problem, exactly = exact(Portfolio), map_leaves(Tensor.double, a)
    module = load("portfolio", Portfolio, MessagePassing, Simplex())
    best = ADMM(tol=1e-9, steps=20000).solve(problem, exactly, problem.initial(exactly)).value
    calls = {"network": predictions(module, a), **programs(problem, exactly)}
    found = sides(problem, exactly, best, calls, 3 if quick else 7)
    steps = float(checkpoint.load(CHECKPOINTS / "portfolio.ckpt")["global_step"])
    minutes = training_seconds(module, FactorMarkets(batch_size=64), int(steps), 20) / 60
    return rows_of("portfolio", found, (None, None, None), minutes, num_rows(a))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--quick", action="store_true", help="fewer rows and repeats: to see that it runs")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for part in (convex, nonconvex, portfolio):
        for found in part(options.quick):
            rows.append(found)
            verdict = (
                "" if found["goal"] is None else f"  goal {found['goal']}: {'holds' if found['holds'] else 'MISSED'}"
            )
            print(f"{found['id']:64s} {found['value']:.4g}{verdict}  {found['detail']}", flush=True)
        if options.json:
            options.json.write_text(json.dumps({"rows": rows}, indent=2))


if __name__ == "__main__":
    main()
