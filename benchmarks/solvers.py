"""Inner loops against their rivals: instances per second to gradient norm 1e-6, one run, one core, float64.

``python -m benchmarks.solvers [--quick] [--full] [--only CELL] --json FILE`` prints a table and writes
``{"rows": [{"id", "value", "goal", "holds", "detail"}]}``. Rivals that are not installed are named and skipped;
``pip install amortized[benchmarks]`` brings them.

The clock is the process's CPU time, so that other work on the machine weighs on both sides alike, with every thread
pool set to one; beside clarabel in two processes it is the wall's, on both sides. Warm: compilation comes before the
timing, and is stated. Both sides of a ratio are run in turn and compared by their medians. Rivals in JAX are tuned in
chunk size and tolerance; loops over single instances are timed on a few of them. A ratio above 1 means we are faster.

``--device cuda`` instead compares a GPU with two CPU cores, and with JAX where that finds the GPU, by the wall's clock.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")

import numpy as np
import torch
from torch import Tensor

from amortized.contract import QuadraticProgram, leaves, map_leaves, take, value_and_grad
from amortized.solvers import ADMM, BFGS, LBFGS
from amortized.solvers.base import Solution
from amortized.solvers.external import QPSolver

TOL = 1e-6


class Shape(NamedTuple):
    """The contexts of Rosenbrock: where its minimum is, and how steep its valley."""

    at: Tensor
    steep: Tensor


class Rosenbrock:
    """Σ steep (y − x²)² + (at − x)² over n / 2 pairs."""

    def objective(self, b: Tensor, a: Shape) -> Tensor:
        x, y = b[:, 0::2], b[:, 1::2]
        return (a.steep.unsqueeze(1) * (y - x * x) ** 2 + (a.at.unsqueeze(1) - x) ** 2).sum(1)

    @staticmethod
    def jax(n: int) -> Callable[[Any, Any], Any]:
        def f(b: Any, a: Any) -> Any:
            x, y = b[0::2], b[1::2]
            return (a[1] * (y - x * x) ** 2 + (a[0] - x) ** 2).sum()

        return f

    @staticmethod
    def data(rows: int, n: int) -> tuple[Shape, Tensor]:
        g = torch.Generator().manual_seed(0)
        at = 0.5 + torch.rand(rows, generator=g, dtype=torch.float64)
        steep = 10 + 90 * torch.rand(rows, generator=g, dtype=torch.float64)
        start = torch.tensor([-1.2, 1.0], dtype=torch.float64).repeat(n // 2)
        return Shape(at, steep), start + 0.3 * torch.randn(rows, n, generator=g, dtype=torch.float64)


class Logistic:
    """Mean logistic loss of 5 n (at least 20) labelled points plus 0.005 ‖b‖²; the points are shared by all rows."""

    def __init__(self, n: int) -> None:
        g = torch.Generator().manual_seed(5)
        self.points = torch.randn(max(5 * n, 20), n, generator=g, dtype=torch.float64) * 2 / n**0.5

    def objective(self, b: Tensor, a: Tensor) -> Tensor:
        z = b @ self.points.T
        return (torch.nn.functional.softplus(z) - a * z).mean(1) + 0.005 * (b * b).sum(1)

    def jax(self, n: int) -> Callable[[Any, Any], Any]:
        import jax

        points = jax.numpy.asarray(self.points.cpu().numpy())

        def f(b: Any, a: Any) -> Any:
            z = points @ b
            return (jax.nn.softplus(z) - a[0] * z).mean() + 0.005 * (b * b).sum()

        return f

    def data(self, rows: int, n: int) -> tuple[Tensor, Tensor]:
        g = torch.Generator().manual_seed(1)
        weights = torch.randn(rows, n, generator=g, dtype=torch.float64)
        drawn = torch.rand(rows, len(self.points), generator=g, dtype=torch.float64)
        return (drawn < torch.sigmoid(weights @ self.points.T)).double(), torch.zeros(rows, n, dtype=torch.float64)


class Counted:
    """A problem that counts the rows it evaluates."""

    def __init__(self, problem: Any) -> None:
        self.problem, self.rows = problem, 0

    def objective(self, b: Tensor, a: Any) -> Tensor:
        self.rows += len(b)
        return self.problem.objective(b, a)


class Entry(NamedTuple):
    """A solver, warm: what to time, how many instances that solves, which share of them converged."""

    run: Callable[[], Any]
    instances: int
    converged: float
    note: str = ""


def seconds(run: Callable[[], Any], repeats: int) -> float:
    """Median CPU time of a call, after one call to warm up."""
    run()
    taken = []
    for _ in range(repeats):
        start = time.process_time()
        run()
        taken.append(time.process_time() - start)
    return statistics.median(taken)


def in_turn(
    entries: list[Entry], repeats: int, clock: Callable[[], float] = time.process_time, enough: float = 40.0
) -> list[float]:
    """Instances per second of warm solvers, the medians of turns: a machine's slow minutes then weigh on all alike.

    The clock is the CPU's unless another is given. Turns end early where they take more than ``enough`` seconds.
    """
    taken: list[list[float]] = []
    while len(taken) < repeats and sum(map(sum, taken)) < enough:
        turn = []
        for entry in entries:
            start = clock()
            entry.run()
            turn.append(clock() - start)
        taken.append(turn)
    return [e.instances / statistics.median(t) for e, t in zip(entries, zip(*taken, strict=True), strict=True)]


def share_converged(problem: Any, a: Any, b: Tensor) -> float:
    _, grad = value_and_grad(problem, b, a)
    return float((grad.norm(dim=1) <= TOL).double().mean())


def inner_loop(n: int, compiled: bool = False) -> BFGS | LBFGS:
    """Our solver for n unknowns."""
    return BFGS(steps=5000, compile=compiled) if n <= 30 else LBFGS(steps=5000, memory=6, dense=0, compile=compiled)


def ours(problem: Any, a: Any, b: Tensor, compiled: bool) -> tuple[Entry, Solution]:
    solver = inner_loop(b.shape[1], compiled)
    start = time.time()
    found = solver.solve(problem, a, b)
    first = time.time() - start
    note = type(solver).__name__ + (f", compiled in {first:.0f} s" if compiled else "")
    return Entry(lambda: solver.solve(problem, a, b), len(b), share_converged(problem, a, found.b), note), found


def torch_loop(problem: Any, a: Any, b: Tensor, flat: bool = False, few: int = 8) -> Entry:
    """``torch.optim.LBFGS``, one instance after another, or (``flat``) on the sum of all at once."""
    rows = [slice(None)] if flat else [slice(i, i + 1) for i in range(few)]
    ends: list[Tensor] = []

    def run() -> None:
        ends.clear()
        for row in rows:
            x = b[row].clone().requires_grad_()
            here = take(a, row)
            optimizer = torch.optim.LBFGS(
                [x], max_iter=3000, max_eval=6000, tolerance_grad=TOL / b.shape[1] ** 0.5, tolerance_change=1e-15,
                history_size=10, line_search_fn="strong_wolfe",
            )  # fmt: skip

            def closure(x: Tensor = x, here: Any = here, optimizer: Any = optimizer) -> Tensor:
                optimizer.zero_grad()
                total = problem.objective(x, here).sum()
                total.backward()
                return total

            optimizer.step(closure)
            ends.append(x.detach())

    run()
    end = torch.cat(ends)
    some = a if flat else take(a, slice(0, few))
    return Entry(run, len(end), share_converged(problem, some, end))


def scipy_loop(problem: Any, a: Any, b: Tensor, few: int = 8) -> Entry:
    """SciPy's L-BFGS-B with torch gradients, one instance after another."""
    optimize = importlib.import_module("scipy.optimize")
    ends: list[Tensor] = []

    def run() -> None:
        ends.clear()
        for i in range(few):
            here = take(a, slice(i, i + 1))

            def both(x: np.ndarray, here: Any = here) -> tuple[float, np.ndarray]:
                value, grad = value_and_grad(problem, torch.from_numpy(x)[None], here)
                return value.item(), grad[0].numpy()

            options = {"gtol": TOL / b.shape[1] ** 0.5, "ftol": 0, "maxiter": 5000, "maxfun": 50000}
            found = optimize.minimize(both, b[i].numpy(), jac=True, method="L-BFGS-B", options=options)
            ends.append(torch.from_numpy(found.x)[None])

    run()
    some = take(a, slice(0, few))
    return Entry(run, few, share_converged(problem, some, torch.cat(ends)))


def torchmin_loop(problem: Any, a: Any, b: Tensor, few: int = 4) -> Entry:
    """pytorch-minimize's L-BFGS, one instance after another."""
    torchmin = importlib.import_module("torchmin")
    ends: list[Tensor] = []

    def run() -> None:
        ends.clear()
        for i in range(few):
            here = take(a, slice(i, i + 1))
            options = {"gtol": TOL / b.shape[1] ** 0.5, "xtol": 0, "max_iter": 3000}
            found = torchmin.minimize(
                lambda x, here=here: problem.objective(x[None], here)[0], b[i], method="l-bfgs", options=options
            )
            ends.append(found.x.detach()[None])

    run()
    some = take(a, slice(0, few))
    return Entry(run, few, share_converged(problem, some, torch.cat(ends)))


def jaxopt_vmapped(problem: Any, a: Any, b: Tensor) -> Entry:
    """The L-BFGS of jaxopt, jitted and vmapped in chunks: no longer developed, so it has a row of its own."""
    jax, jaxopt = (importlib.import_module(name) for name in ("jax", "jaxopt"))
    jax.config.update("jax_enable_x64", True)
    solver = jaxopt.LBFGS(problem.jax(b.shape[1]), tol=TOL, maxiter=2000, maxls=30)
    parts = tuple(leaf.numpy() for leaf in leaves(a))
    chunk = {2: 256, 20: 64, 200: 8}[b.shape[1]]
    few = min(len(b), 4 * chunk)
    run_chunk = jax.jit(jax.vmap(lambda x, here: solver.run(x, here).params))
    ends: list[Any] = []

    def run() -> None:
        ends.clear()
        for i in range(0, few, chunk):
            ends.append(run_chunk(b[i : i + chunk].numpy(), tuple(part[i : i + chunk] for part in parts)))
        jax.block_until_ready(ends)

    run()
    found = torch.from_numpy(np.concatenate([np.asarray(end) for end in ends]).copy())
    some = take(a, slice(0, few))
    return Entry(run, few, share_converged(problem, some, found), f"chunks of {chunk}")


def botorch_batched(problem: Any, a: Any, b: Tensor, few: int = 128) -> Entry:
    """BoTorch's loop over SciPy's state machine with batched evaluation."""
    batched = importlib.import_module("botorch.optim.batched_lbfgs_b")
    some = take(a, slice(0, few))
    start = b[:few].numpy()
    ends: list[Tensor] = []

    def both(x: Any, batch_indices: list[int]) -> tuple[np.ndarray, np.ndarray]:
        index = torch.as_tensor(batch_indices)
        here = take(some, index)
        value, grad = value_and_grad(problem, torch.as_tensor(np.asarray(x)), here)
        return value.numpy(), grad.numpy()

    def run() -> None:
        ends.clear()
        xs, *_ = batched.fmin_l_bfgs_b_batched(
            both, start, pgtol=TOL / b.shape[1] ** 0.5, factr=0, maxiter=5000, pass_batch_indices=True
        )
        ends.append(torch.as_tensor(np.asarray(xs)))

    run()
    return Entry(run, few, share_converged(problem, some, ends[0]))


def jax_tuned(problem: Any, a: Any, b: Tensor) -> Entry:
    """The best of optimistix (BFGS, L-BFGS) and optax (L-BFGS), jitted, vmapped, in chunks that suit the cache.

    On a GPU all at once, from arrays that lie there.
    """
    jax, optx, optax = (importlib.import_module(name) for name in ("jax", "optimistix", "optax"))
    jax.config.update("jax_enable_x64", True)
    n, f = b.shape[1], problem.jax(b.shape[1])
    place = jax.device_put if b.is_cuda else np.asarray
    begin, *parts = (place(x.cpu().numpy()) for x in (b, *leaves(a)))

    def by_optimistix(solver: Any, tol: float) -> Callable[[Any, Any], Any]:
        def one(x: Any, here: Any) -> Any:
            return optx.minimise(f, solver(rtol=tol, atol=tol), x, here, max_steps=5000, throw=False).value

        return one

    def by_optax(x: Any, here: Any) -> Any:
        method = optax.lbfgs()
        both = optax.value_and_grad_from_state(lambda x: f(x, here))

        def step(carry: Any) -> Any:
            x, state = carry
            value, grad = both(x, state=state)
            move, state = method.update(grad, state, x, value=value, grad=grad, value_fn=lambda x: f(x, here))
            return optax.apply_updates(x, move), state

        def goes_on(carry: Any) -> Any:
            _, state = carry
            count, grad = optax.tree.get(state, "count"), optax.tree.get(state, "grad")
            return (count == 0) | ((count < 3000) & (optax.tree.norm(grad) > TOL))

        return jax.lax.while_loop(goes_on, step, (x, method.init(x)))[0]

    chunks = {min(chunk, len(b)) for chunk in {2: (1024, 4096), 20: (64, 256), 200: (8, 32)}.get(n, (64,))}
    chunks = {len(b)} if b.is_cuda else chunks
    kinds = [("optax L-BFGS", by_optax)]
    for solver in ([optx.BFGS] if n <= 20 else []) + [optx.LBFGS]:
        kinds += [(f"optimistix {solver.__name__} tol {tol:.0e}", by_optimistix(solver, tol)) for tol in (1e-6, 1e-8)]
    tried: list[tuple[float, Entry]] = []
    for name, one in kinds:
        for chunk in chunks:
            run_chunk = jax.jit(jax.vmap(one))
            ends: list[Any] = []

            def run(run_chunk: Any = run_chunk, ends: list[Any] = ends, chunk: int = chunk) -> None:
                ends.clear()
                for i in range(0, len(b), chunk):
                    here = tuple(part[i : i + chunk] for part in parts)
                    ends.append(run_chunk(begin[i : i + chunk], here))
                jax.block_until_ready(ends)

            taken = seconds(run, 1)
            found = torch.from_numpy(np.concatenate([np.asarray(end) for end in ends]).copy())
            converged = share_converged(problem, a, found.to(b.device))
            tried.append((taken, Entry(run, len(b), converged, f"{name}, chunks of {chunk}")))
    enough = min(0.995, max(entry.converged for _, entry in tried))
    tried = [(taken, entry) for taken, entry in tried if entry.converged >= enough]
    fastest = min(taken for taken, _ in tried)
    # One timing may have been a slow one: those near the best take turns.
    close = [entry for taken, entry in tried if taken <= 1.5 * fastest]
    rates = in_turn(close, 3)
    return close[rates.index(max(rates))]


class ConvexDC3:
    """The convex programs of Donti, Rolnick & Kolter (2021): 100 unknowns, 50 equalities to x, 50 inequalities."""

    def __init__(self) -> None:
        draw = np.random.RandomState(17)
        self.p, self.q = (torch.from_numpy(v) for v in (np.diag(draw.rand(100)), draw.rand(100)))
        equal, x = draw.normal(size=(50, 100)), draw.uniform(-1, 1, size=(10000, 50))
        above = draw.normal(size=(50, 100))
        self.x, self.a = torch.from_numpy(x[-833:].copy()), torch.from_numpy(np.concatenate([equal, above]))
        self.h = torch.from_numpy(np.abs(above @ np.linalg.pinv(equal)).sum(1))

    def objective(self, b: Tensor, a: Tensor) -> Tensor:
        return (0.5 * (b @ self.p) * b + self.q * b).sum(1)

    def program(self, a: Tensor) -> QuadraticProgram:
        free, h = torch.full_like(a, -torch.inf), self.h.expand(len(a), 50)
        bounds = torch.cat([a, free], 1), torch.cat([a, h], 1)
        return QuadraticProgram(self.p, self.q.expand(len(a), 100), self.a, *bounds)


def osqp_loop(problem: ConvexDC3) -> Entry:
    """OSQP, one program after another with the set-up reused."""
    osqp, sparse = importlib.import_module("osqp"), importlib.import_module("scipy.sparse")
    program = problem.program(problem.x)
    lower, upper = (np.nan_to_num(v.numpy(), posinf=1e30, neginf=-1e30) for v in (program.lower, program.upper))
    solver = osqp.OSQP()
    solver.setup(
        sparse.csc_matrix(program.P.numpy()), program.q[0].numpy(), sparse.csc_matrix(program.A.numpy()),
        lower[0], upper[0],
        eps_abs=1e-6, eps_rel=0, verbose=False, polishing=False, max_iter=20000,
    )  # fmt: skip
    worst = [0.0]

    def run() -> None:
        worst[0] = 0.0
        for low, high in zip(lower, upper, strict=True):
            solver.update(l=low, u=high)
            found = solver.solve()
            worst[0] = max(worst[0], float(found.info.prim_res), float(found.info.dual_res))

    run()
    return Entry(run, len(lower), float(worst[0] <= TOL), f"residual {worst[0]:.1e}")


def evaluation_share(problem: Any, a: Any, b: Tensor, counted: int, whole: float, at_once: int) -> float:
    """The time that evaluating as many rows, so many at once, would take, as a share of the whole solve."""
    rows = slice(0, min(at_once, len(b)))
    here, start = take(a, rows), b[rows].clone()
    one = seconds(lambda: value_and_grad(problem, start, here), 20)
    return one * counted / len(start) / whole


def compiled_evaluation(problem: Any, a: Any, b: Tensor) -> float:
    """Seconds for one compiled value and gradient of every row: what the compiled solver's rounds evaluate."""

    def total(b: Tensor, a: Any) -> tuple[Tensor, Tensor]:
        value = problem.objective(b, a)
        return value.sum(), value

    both = torch.compile(torch.func.grad(total, has_aux=True), fullgraph=True)
    both(b, a)
    many = 50

    def run() -> None:
        for _ in range(many):
            both(b, a)

    with torch.no_grad():
        return seconds(run, 5) / many


@functools.cache
def dc3_programs() -> ConvexDC3:
    """The programs, built once in each process, outside the clock."""
    return ConvexDC3()


def solve_programs(solver: QPSolver, rows: slice) -> int:
    """Some of DC3's programs from zero, in a process of its own: how many converged."""
    programs = dc3_programs()
    zero = torch.zeros(len(programs.x[rows]), 100, dtype=torch.float64)
    return int(solver.solve(programs, programs.x[rows], zero).converged.sum())


def on_gpu(add: Callable[..., None], options: argparse.Namespace) -> None:
    """Rows of a GPU beside two CPU cores (twice what one does, on few rows), and beside JAX on the GPU.

    Everything is compiled first, and timed afterwards. JAX runs cells of at most half a million unknowns, in seconds.
    """
    try:
        found = importlib.import_module("jax")
        jax = found if found.default_backend() == "gpu" else None
    except ModuleNotFoundError:
        jax = None
    device = torch.device(options.device)
    print(f"{torch.cuda.get_device_name(device)}; JAX {'runs there' if jax else 'does not run there, and is left out'}")
    cells: list[tuple[str, list[Entry], Entry, Entry | None]] = []
    for n in (2, 20, 200):
        for name, make in (("rosenbrock", lambda n: Rosenbrock()), ("logistic", Logistic)):
            here, there = make(n), make(n)
            if isinstance(there, Logistic):
                there.points = there.points.to(device)
            sizes = (1024, 16384) if options.quick else (1024, 16384, 262144)
            sizes = tuple(size for size in sizes if options.only in f"{name} n={n} B={size}")
            cpu = both_of_ours(here, *here.data(1024 if n <= 20 else 128, n)) if sizes else []
            for size in sizes:
                cell = f"{name} n={n} B={size}"
                a, b = here.data(size, n)
                a, b = map_leaves(lambda leaf: leaf.to(device), a), b.to(device)
                gpu = both_of_ours(there, a, b)
                theirs = jax_tuned(there, a, b) if jax and size * n <= 2**19 else None
                cells.append((cell, gpu, cpu[-1], theirs))
                add(f"{cell} cuda converged", min(e.converged for e in gpu), 1.0, ", ".join(e.note for e in gpu))
    for cell, gpu, cpu, theirs in cells:
        rates = in_turn([*gpu, cpu], 3, time.perf_counter, 10)
        best = max(range(len(gpu)), key=lambda k: rates[k])
        each = ", ".join(f"{e.note} {rate:.4g}/s" for e, rate in zip((*gpu, cpu), rates, strict=True))
        add(f"{cell} cuda / 2 CPU cores", rates[best] / (2 * rates[-1]), 1.0, f"{each} (one core)")
        if theirs is not None:
            ours_, theirs_ = in_turn([gpu[best], theirs], 3, time.perf_counter, 10)
            detail = f"{ours_:.4g}/s, theirs {theirs_:.4g}/s, {theirs.converged:.4f} converged {theirs.note}"
            add(f"{cell} cuda / jax", ours_ / theirs_, None, detail)


def both_of_ours(problem: Any, a: Any, b: Tensor) -> list[Entry]:
    """Our solver, eager and compiled, warm; timed until the device is done."""
    return [
        entry._replace(run=_synchronised(entry.run)) for entry in (ours(problem, a, b, c)[0] for c in (False, True))
    ]


def _synchronised(run: Callable[[], Any]) -> Callable[[], Any]:
    def both() -> None:
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    return both


def quadratic_programs(add: Callable[..., None], repeats: int) -> None:
    """The rows of DC3's convex programs."""
    programs = dc3_programs()
    size = len(programs.x)
    solver, zero = ADMM(), torch.zeros(size, 100, dtype=torch.float64)
    found = solver.solve(programs, programs.x, zero)
    proof = solver.certify(programs, programs.x, found.b, found.dual)
    mine = Entry(lambda: solver.solve(programs, programs.x, zero), size, float(found.converged.double().mean()))
    add("DC3 programs converged", mine.converged, 1.0, f"value {found.value.mean():.4f}, gap {proof.gap.max():.1e}")
    try:
        osqp = osqp_loop(programs)
        our_rate, their_rate = in_turn([mine, osqp], repeats)
        detail = f"{size / our_rate:.3f} s for {size}, theirs {size / their_rate:.3f} s, {osqp.note}"
        add("DC3 programs / OSQP loop", our_rate / their_rate, 15, detail)
        work = [(QPSolver("clarabel"), half) for half in (slice(0, size // 2), slice(size // 2, size))]
        with multiprocessing.get_context("spawn").Pool(2) as pool:
            converged = sum(pool.starmap(solve_programs, work, chunksize=1)) / size
            clarabel = Entry(lambda: pool.starmap(solve_programs, work, chunksize=1), size, converged)
            our_rate, their_rate = in_turn([mine, clarabel], repeats, time.perf_counter)
        busy = f"load {os.getloadavg()[0]:.1f} on {len(os.sched_getaffinity(0))} allowed cores"
        theirs = f"theirs {size / their_rate:.3f} s, {converged:.4f} converged"
        detail = f"{size / our_rate:.3f} s in one process on the wall, {theirs}, {busy}"
        add("DC3 programs / clarabel, 2 processes", our_rate / their_rate, 1, detail)
    except ModuleNotFoundError as error:
        print(f"DC3 programs: rivals skipped, {error.name} is not installed (amortized[benchmarks])")


GOALS = {
    "torch.optim loop": lambda name, n: 50 if n <= 20 else 10,
    "scipy loop": lambda name, n: 30 if n <= 20 else 8,
    "botorch": lambda name, n: 5 if n <= 20 else (3 if name == "rosenbrock" else 1.5),
    "jax": lambda name, n: 0.3,
    "flat": lambda name, n: 1.0,
    "pytorch-minimize loop": lambda name, n: None,
    "jaxopt": lambda name, n: None,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small cells, eager, the loops only: under a minute")
    parser.add_argument("--full", action="store_true", help="also B = 64 and 16384: hours")
    parser.add_argument("--only", default="", help="cells with this in their name, as 'rosenbrock n=2 B=64'")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--json", help="where to write the rows")
    options = parser.parse_args()
    torch.set_num_threads(1)

    rows: list[dict[str, Any]] = []

    def add(id: str, value: float, goal: float | None, detail: str, at_most: bool = False) -> None:
        holds = None if goal is None else bool(value <= goal if at_most else value >= goal)
        rows.append({"id": id, "value": value, "goal": goal, "holds": holds, "detail": detail})
        verdict = {None: "", True: "holds", False: "FALLS SHORT"}[holds]
        sign = "" if goal is None else f"{'<=' if at_most else '>='} {goal:g}"
        print(f"{id:48s} {value:12.3g} {sign:9s} {verdict:11s} {detail}", flush=True)

    if options.device == "cuda":
        if not torch.cuda.is_available():
            parser.error("--device cuda: PyTorch finds no GPU here")
        on_gpu(add, options)
        write(rows, options.json)
        return
    repeats = 3 if options.quick else 5
    sizes = (64, 1024, 16384) if options.full else (1024,)
    ratios: list[float] = []
    for name, make in (("rosenbrock", lambda n: Rosenbrock()), ("logistic", Logistic)):
        for n in (2, 20) if options.quick else (2, 20, 200):
            problem = make(n)
            for size in sizes:
                a, b = problem.data(size, n)
                cell = f"{name} n={n} B={size}"
                if options.only not in cell:
                    continue
                eager, found = ours(problem, a, b, False)
                (per_second,) = in_turn([eager], repeats)
                add(f"{cell} eager", per_second, None, f"per s, {eager.converged:.4f} converged, {eager.note}")
                add(f"{cell} converged", eager.converged, 1.0, f"{found.evaluations.double().mean():.1f} evaluations")
                counted = Counted(problem)
                again = inner_loop(n).solve(counted, a, b)
                needed = int(again.evaluations.sum())
                waste = (counted.rows - 1) / needed
                add(f"{cell} evaluations per needed", waste, 1.15 if size >= 1024 else None, "", at_most=True)
                whole = size / per_second
                share = evaluation_share(problem, a, b, counted.rows, whole, inner_loop(n).chunk_size(b))
                goal = 0.5 if (name, n) == ("logistic", 200) else None
                add(f"{cell} share of evaluation", share, goal, f"{whole * 1e6 / counted.rows:.2f} us a row-evaluation")
                over = {2: 0.2, 20: 1.3, 200: 6}[n] if size >= 1024 else None
                overhead = whole * (1 - share) * 1e6 / counted.rows
                add(f"{cell} overhead, us", overhead, over if options.quick else None, "eager", at_most=True)
                best = eager
                if not options.quick:
                    best, _ = ours(problem, a, b, True)
                    (per_second,) = in_turn([best], repeats)
                    add(f"{cell} compiled", per_second, None, f"per s, {best.converged:.4f} converged, {best.note}")
                    one = compiled_evaluation(problem, a, b) * counted.rows / size
                    overhead = (size / per_second - one) * 1e6 / counted.rows
                    detail = f"whole less compiled evaluation, {one * 1e6 / counted.rows:.2f} us"
                    add(f"{cell} overhead compiled, us", overhead, over, detail, at_most=True)
                rivals: dict[str, tuple[Entry, Callable[..., Entry]]] = {
                    "torch.optim loop": (eager, torch_loop),
                    "scipy loop": (eager, scipy_loop),
                    "flat": (best, functools.partial(torch_loop, flat=True)),
                }
                if not options.quick:
                    rivals["botorch"] = (best, botorch_batched)
                    rivals["pytorch-minimize loop"] = (best, torchmin_loop)
                    rivals["jaxopt"] = (best, jaxopt_vmapped)
                    rivals["jax"] = (best, jax_tuned)
                for rival, (mine, prepare) in rivals.items():
                    try:
                        theirs = prepare(problem, a, b)
                    except ModuleNotFoundError as error:
                        print(f"{cell} / {rival}: skipped, {error.name} is not installed (amortized[benchmarks])")
                        continue
                    our_rate, their_rate = in_turn([mine, theirs], repeats)
                    counts = size >= 1024 and not (rival == "flat" and theirs.converged < 0.995)
                    goal = GOALS[rival](name, n) if counts else None
                    starred = rival == "jax" and (name, n) == ("logistic", 200)
                    ratio = our_rate / their_rate
                    detail = (
                        f"{our_rate:.4g}/s, theirs {their_rate:.4g}/s, {theirs.converged:.4f} converged {theirs.note}"
                    )
                    add(f"{cell} / {rival}", ratio, None if starred else goal, detail)
                    if rival == "jax" and not starred and size >= 1024:
                        ratios.append(ratio)
    if options.only in "DC3 programs":
        quadratic_programs(add, repeats)
    if ratios:
        add("geometric mean / jax", float(np.exp(np.mean(np.log(ratios)))), 1.0, f"{len(ratios)} cells")
    write(rows, options.json)


def write(rows: list[dict[str, Any]], path: str | None) -> None:
    if path:
        with open(path, "w") as file:
            json.dump({"rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
