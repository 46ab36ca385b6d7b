"""Quadratic programs: batched ADMM with its polish against the solvers of other packages, one run, one core, float64.

``python -m benchmarks.programs [--quick] --json FILE`` prints a table and writes ``{"rows": [{"id", "value", "goal", "holds",
"detail"}]}``. Three families: DC3's convex one (833 held-out rows, matrices shared), portfolios (256 rows, each with a
covariance of 50 assets of its own), a double integrator's control (rows of 1,024 states that have a plan, n 20, m 60).

Every side runs on one thread, pinned to one core, in turn with the others, by the wall's clock, median of the turns; set-up
that does not depend on the row (a solver's own factorization and scaling, conversion to its format) is outside the clock for
the rivals and inside it for us. A time counts only if all rows are within 1e-6 of the best value found by anyone, relative to
1 + |value|, and violate no constraint by more than 1e-6. Rivals that are not installed are named and left out: ``pip install
moreau piqp osqp``. A ratio above 1 means that we are faster.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["RAYON_NUM_THREADS"] = "1"

import numpy as np
import torch
from torch import Tensor

from amortized.certificates import Duality
from amortized.contract import QuadraticProgram
from amortized.solvers import ADMM
from benchmarks.solvers import ConvexDC3

D = torch.float64
CLOSE = 1e-6


class Programs:
    """Programs that are their own contexts, with matrices that all rows share where ``p`` and ``a`` are given."""

    def __init__(self, p: Tensor | None = None, a: Tensor | None = None) -> None:
        self.p, self.a = p, a

    def program(self, a: QuadraticProgram) -> QuadraticProgram:
        return a if self.p is None else a._replace(P=self.p, A=self.a)

    def objective(self, b: Tensor, a: QuadraticProgram) -> Tensor:
        p = self.program(a).P
        pb = b @ p if p.ndim == 2 else torch.bmm(b.unsqueeze(1), p).squeeze(1)
        return (0.5 * b * pb + a.q * b).sum(1)


class Family(NamedTuple):
    """Programs to solve: the problem, its contexts, and where to start."""

    problem: Any
    a: Any
    b: Tensor


def dc3(rows: int = 833) -> Family:
    """The held-out rows of the convex family of Donti, Rolnick & Kolter (2021)."""
    problem = ConvexDC3()
    return Family(problem, problem.x[:rows], torch.zeros(rows, 100, dtype=D))


def portfolio(rows: int = 256, n: int = 50) -> Family:
    """Markowitz: ½ bᵀΣb − μᵀb on the simplex, with a factor model's covariance of each row's own."""
    g = torch.Generator().manual_seed(0)
    loads = 0.1 * torch.randn(rows, n, 10, generator=g, dtype=D)
    own = 0.01 + 0.04 * torch.rand(rows, n, generator=g, dtype=D)
    mean = 0.05 * torch.randn(rows, n, generator=g, dtype=D)
    matrix = torch.cat([torch.ones(1, n, dtype=D), torch.eye(n, dtype=D)]).expand(rows, -1, -1)
    one, zero = torch.ones(rows, 1, dtype=D), torch.zeros(rows, n, dtype=D)
    bounds = torch.cat([one, zero], 1), torch.cat([one, zero + math.inf], 1)
    program = QuadraticProgram(loads @ loads.mT + torch.diag_embed(own), -mean, matrix, *bounds)
    return Family(Programs(), program, torch.full((rows, n), 1 / n, dtype=D))


def control(rows: int = 1024, horizon: int = 20) -> Family:
    """Model predictive control of x⁺ = x + 0.2 v, v⁺ = v + 0.2 u with |u| ≤ 1, |x| ≤ 5, |v| ≤ 2, of states that have a plan."""
    step, push = torch.tensor([[1, 0.2], [0, 1]], dtype=D), torch.tensor([0.02, 0.2], dtype=D)
    powers = [torch.linalg.matrix_power(step, t) for t in range(horizon + 1)]
    moved = torch.zeros(horizon, 2, horizon, dtype=D)
    for t in range(horizon):
        for k in range(t + 1):
            moved[t, :, k] = powers[t - k] @ push
    cost = torch.diag(torch.tensor([1.0, 0.1], dtype=D))
    p = 2 * torch.einsum("tik,ij,tjl->kl", moved, cost, moved) + 0.2 * torch.eye(horizon, dtype=D)
    matrix = torch.cat([torch.eye(horizon, dtype=D), moved.reshape(2 * horizon, horizon)])
    limit = torch.tensor([5.0, 2.0], dtype=D)
    start = (2 * torch.rand(rows, 2, generator=torch.Generator().manual_seed(0), dtype=D) - 1) * limit
    free = torch.einsum("tij,bj->bti", torch.stack(powers[1:]), start)
    q = 2 * torch.einsum("tik,ij,btj->bk", moved, cost, free)
    one = torch.ones(rows, horizon, dtype=D)
    lower, upper = (torch.cat([s * one, (s * limit - free).flatten(1)], 1) for s in (-1, 1))
    problem, none = Programs(p, matrix), torch.zeros(rows, horizon, dtype=D)
    a = QuadraticProgram(p.expand(rows, *p.shape), q, matrix.expand(rows, *matrix.shape), lower, upper)
    possible = ~ADMM().solve(problem, a, none).infeasible
    return Family(problem, QuadraticProgram(*(leaf[possible] for leaf in a)), none[possible])


FAMILIES: dict[str, tuple[Callable[[int], Family], int, float]] = {
    "dc3": (dc3, 833, 2.0),
    "portfolio": (portfolio, 256, 0.5),
    "control": (control, 1024, 0.5),
}
"""What makes a family, of how many rows, and the ratio to the best rival that is asked for."""


class Arrays(NamedTuple):
    """A family for solvers of single programs: P, q, A, the bounds, and which rows of A are equalities."""

    p: np.ndarray
    q: np.ndarray
    a: np.ndarray
    lower: np.ndarray
    upper: np.ndarray
    equal: np.ndarray


def arrays(family: Family) -> Arrays:
    p, q, a, lower, upper = (np.ascontiguousarray(leaf.numpy()) for leaf in family.problem.program(family.a))
    return Arrays(p, q, a, lower, upper, (lower == upper).all(0))


def row(x: np.ndarray, i: int) -> np.ndarray:
    return x[i] if x.ndim == 3 else x


def piqp_loop(family: Family) -> Callable[[], np.ndarray]:
    """PIQP's dense interior point, a solver a row, set up beforehand."""
    piqp, d = importlib.import_module("piqp"), arrays(family)
    solvers = []
    for i in range(len(d.q)):
        solver = piqp.DenseSolver()
        solver.settings.eps_abs, solver.settings.eps_rel, solver.settings.verbose = 1e-9, 1e-9, False
        solver.settings.eps_duality_gap_abs = solver.settings.eps_duality_gap_rel = 1e-8
        a, e = row(d.a, i), d.equal
        solver.setup(
            np.asfortranarray(row(d.p, i)), d.q[i],
            np.asfortranarray(a[e]) if e.any() else None, d.lower[i][e] if e.any() else None,
            np.asfortranarray(a[~e]), d.lower[i][~e], d.upper[i][~e],
        )  # fmt: skip
        solvers.append(solver)

    def run() -> np.ndarray:
        for solver in solvers:
            solver.solve()
        return np.stack([np.array(solver.result.x) for solver in solvers])

    return run


def osqp_loop(family: Family) -> Callable[[], np.ndarray]:
    """OSQP with polishing; where matrices are shared one solver with its bounds updated, else one for each row."""
    osqp, sparse, d = importlib.import_module("osqp"), importlib.import_module("scipy.sparse"), arrays(family)
    low, high = (np.nan_to_num(v, posinf=1e30, neginf=-1e30) for v in (d.lower, d.upper))

    def made(i: int) -> Any:
        solver = osqp.OSQP()
        solver.setup(
            sparse.csc_matrix(row(d.p, i)), d.q[i], sparse.csc_matrix(row(d.a, i)), low[i], high[i],
            eps_abs=1e-7, eps_rel=0, verbose=False, polishing=True, max_iter=50000,
        )  # fmt: skip
        return solver

    shared = d.p.ndim == 2
    solvers = [made(0)] if shared else [made(i) for i in range(len(d.q))]

    def run() -> np.ndarray:
        found = []
        for i in range(len(d.q)):
            if shared:
                solvers[0].update(q=d.q[i], l=low[i], u=high[i])
            found.append(solvers[0 if shared else i].solve().x)
        return np.stack(found)

    return run


def moreau_batched(family: Family, kind: str) -> Callable[[], np.ndarray]:
    """Moreau's batched solver, by active sets or by interior points, on ``A_E x = b, [A; −A] x ≤ [upper; −lower]``."""
    moreau, d = importlib.import_module("moreau"), arrays(family)
    e, n, size = d.equal, d.q.shape[1], len(d.q)
    up, low = ~e & np.isfinite(d.upper).all(0), ~e & np.isfinite(d.lower).all(0)
    stacked = np.concatenate([d.a[..., e, :], d.a[..., up, :], -d.a[..., low, :]], -2)
    right = np.concatenate([d.lower[:, e], d.upper[:, up], -d.lower[:, low]], 1)
    mask_p, mask_a = (((m != 0).any(0) if m.ndim == 3 else m != 0) for m in (d.p, stacked))
    settings = moreau.Settings(batch_size=size, solver=kind, device="cpu")
    if kind == "active_set":
        settings.active_set_settings = moreau.ActiveSetSettings(primal_tol=1e-8)

    def compressed(mask: np.ndarray) -> tuple[list[int], list[int]]:
        return [0, *np.cumsum(mask.sum(1)).tolist()], np.nonzero(mask)[1].tolist()

    cones = moreau.Cones(num_zero_cones=int(e.sum()), num_nonneg_cones=int(up.sum() + low.sum()))
    solver = moreau.CompiledSolver(n, stacked.shape[-2], *compressed(mask_p), *compressed(mask_a), cones, settings)
    solver.setup(d.p[..., mask_p], stacked[..., mask_a])

    def run() -> np.ndarray:
        return np.asarray(solver.solve(d.q, right).x)

    return run


RIVALS: dict[str, Callable[[Family], Callable[[], np.ndarray]]] = {
    "moreau, active set": lambda family: moreau_batched(family, "active_set"),
    "moreau, interior point": lambda family: moreau_batched(family, "ipm"),
    "piqp": piqp_loop,
    "osqp": osqp_loop,
}


class Quality(NamedTuple):
    """How good solutions are: the largest violation, and the largest excess over the best value of each row."""

    violation: float
    excess: float


def quality(family: Family, x: Tensor, best: Tensor) -> Quality:
    p = family.problem.program(family.a)
    ax = x @ p.A.mT if p.A.ndim == 2 else torch.bmm(p.A, x.unsqueeze(2)).squeeze(2)
    off = torch.maximum(ax - p.upper, p.lower - ax).clamp(min=0).amax()
    value = family.problem.objective(x, family.a)
    return Quality(float(off), float(((value - best).abs() / (1 + best.abs())).amax()))


def in_turn(sides: dict[str, Callable[[], Any]], turns: int, enough: float) -> dict[str, float]:
    """Median milliseconds of each side; turns end early where a side has had ``enough`` seconds."""
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(turns):
        for name, run in sides.items():
            if sum(taken[name]) > enough and taken[name]:
                continue
            start = time.perf_counter()
            run()
            taken[name].append(time.perf_counter() - start)
    return {name: 1e3 * statistics.median(times) for name, times in taken.items()}


def compare(name: str, quick: bool) -> list[dict[str, Any]]:
    """The rows of one family."""
    make, rows, goal = FAMILIES[name]
    family = make(rows // 8 if quick else rows)
    solver = ADMM()
    found = solver.solve(family.problem, family.a, family.b)
    answers: dict[str, Tensor] = {"ours": found.b}
    sides: dict[str, Callable[[], Any]] = {"ours": lambda: solver.solve(family.problem, family.a, family.b)}
    for rival, prepare in RIVALS.items():
        try:
            run = prepare(family)
        except ModuleNotFoundError as error:
            print(f"{name}: {rival} is left out, {error.name} is not installed")
            continue
        answers[rival], sides[rival] = torch.from_numpy(run()), run
    values = {side: family.problem.objective(x, family.a) for side, x in answers.items()}
    fair = {side: quality(family, x, values["ours"]) for side, x in answers.items()}
    milliseconds = in_turn(sides, 3 if quick else 9, 8.0)
    rated = {s: ms for s, ms in milliseconds.items() if fair[s].violation <= CLOSE and fair[s].excess <= CLOSE}
    for side, ms in milliseconds.items():
        print(f"{name:10} {side:24} {ms:9.1f} ms  violation {fair[side].violation:.0e}, off {fair[side].excess:.0e}")
    rivals = {s: ms for s, ms in rated.items() if s != "ours"}
    best = min(rivals, key=lambda s: rivals[s]) if rivals else "none"
    ratio = rivals[best] / milliseconds["ours"] if rivals and "ours" in rated else math.nan
    exact = float((found.residual < 1e-9).double().mean())
    detail = ", ".join(f"{s} {ms:.1f} ms" for s, ms in milliseconds.items())
    return [
        line(f"{name}: against the best rival", ratio, f">= {goal:g}", ratio >= goal, f"{best}; {detail}"),
        line(f"{name}: rows solved exactly", exact, ">= 0.999", exact >= 0.999, f"{len(found.b)} rows"),
    ]


def starts(quick: bool) -> list[dict[str, Any]]:
    """ADMM on DC3 from a learned start: least squares from contexts to solutions and multipliers of 9,000 training rows."""
    problem = ConvexDC3()
    test, train = problem.x, torch.from_numpy(_training())[: 1000 if quick else 9000]
    solver, plain = ADMM(), ADMM(polish=False)

    def affine(x: Tensor) -> Tensor:
        return torch.cat([x, torch.ones_like(x[:, :1])], 1)

    known = solver.solve(problem, train, torch.zeros(len(train), 100, dtype=D))
    assert known.dual is not None
    fit = torch.linalg.lstsq(affine(train), torch.cat([known.b, known.dual], 1)).solution
    both = affine(test) @ fit
    b, y = both[:, :100], both[:, 100:]
    cold = torch.zeros_like(b)
    out = []
    for name, method in (("with polish", solver), ("iteration alone", plain)):
        first, warm = method.solve(problem, test, cold), method.solve(problem, test, b, dual=y)
        counts = [float(x.iterations.double().mean()) for x in (first, warm)]
        times = in_turn(
            {"cold": lambda m=method: m.solve(problem, test, cold),
             "warm": lambda m=method: m.solve(problem, test, b, dual=y)}, 5, 8.0,
        )  # fmt: skip
        share = counts[1] / counts[0] if counts[0] else math.nan
        detail = f"{counts[0]:.1f} to {counts[1]:.1f} iterations, {times['cold']:.0f} to {times['warm']:.0f} ms"
        out.append(line(f"learned start, {name}: iterations over cold", share, "<= 0.5", share <= 0.5, detail))
    exact = Duality().dual(problem, b, test).exact.double().mean()
    out.append(
        line("learned start: certified exact", float(exact), "", True, "Duality, 5 active sets from the primal alone")
    )
    return out


def _training() -> np.ndarray:
    """The contexts of the family before the held-out ones."""
    draw = np.random.RandomState(17)
    draw.rand(100), draw.rand(100), draw.normal(size=(50, 100))
    return np.asarray(draw.uniform(-1, 1, size=(10000, 50)))[:9000]


def line(name: str, value: float, goal: str, holds: bool, detail: str) -> dict[str, Any]:
    print(f"{name:55} {value:8.3g}  {goal:8} {'' if holds else 'falls short':12} {detail}", flush=True)
    return {"id": name, "value": value, "goal": goal, "holds": bool(holds), "detail": detail}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="an eighth of the rows, fewer turns")
    parser.add_argument("--only", choices=[*FAMILIES, "starts"], help="one part")
    parser.add_argument("--json", required=True, help="file for the rows")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    rows = []
    for name in FAMILIES:
        rows += compare(name, args.quick) if args.only in (None, name) else []
    rows += starts(args.quick) if args.only in (None, "starts") else []
    with open(args.json, "w") as file:
        json.dump({"rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
