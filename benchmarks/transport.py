"""Sinkhorn's iterations from a learned start, against every other start that costs no training.

``python -m benchmarks.transport [--quick] [--ott PYTHON] [--json FILE]``

Pairs of MNIST test digits (needs the files, see ``amortized.problems.Images``), 28 x 28 points on the unit square, cost
``|x - y|^2``, epsilon 0.01, float32, one thread. The learned start is the prediction of ``checkpoints/transport_mnist.ckpt``;
what its training takes is in the header of its recipe, and not in these figures. The others: zero; Gaussians with the
measures' moments, entropic and in closed form; annealing, from zero with one iteration at each of falling temperatures and
then at epsilon, with the first temperature and the factor that are best of a grid on these very pairs, for each goal anew.

An iteration is one application of Sinkhorn's map ``f -> (f^c)^c`` to a row; a row is done at the first iterate whose plan
misses its first marginal by no more than the goal, in L1. Iterations are plain, or accelerated (Anderson, memory 5, for all
starts alike). A row not done after 500 iterations counts 500, and is told. The value is the learned start's mean over the
other's.

``--ott`` names a Python with ``ott-jax``: its ``MetaInitializer`` is trained for the CPU time that the recipe's training
takes here, timed on 100 of its steps, on the same images, and its predictions start our iterations too.

Last, maps between Gaussians by convex potentials: see ``benchmarks.transport_potentials``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from amortized import checkpoint
from amortized.contract import evaluate, map_leaves, take
from amortized.problems import HistogramPotential, HistogramTransport, ImagePairs
from amortized.problems.transport import Histograms, Transport
from amortized.problems.transport.entropic import log_density, temperatures
from amortized.problems.transport.gaussians import gaussian_potential
from amortized.solvers import Anderson
from benchmarks.transport_potentials import potentials

CHECKPOINT = Path(__file__).parent.parent / "checkpoints" / "transport_mnist.ckpt"
GOALS = (1e-2, 1e-3)
MUST = {1e-2: 0.5, 1e-3: 0.7}
"""The plain iterations from the learned start may be this share of those from zero."""
SCHEDULES = tuple(itertools.product((1.0, 0.1, 0.03), (0.3, 0.5, 0.7, 0.85)))
"""First temperature and factor of annealing."""
LIMIT = 500


def load(path: Path) -> HistogramTransport:
    """The trained module."""
    saved = checkpoint.load(path)
    init = saved[checkpoint.RECIPE]["model"]["init_args"]
    network = HistogramPotential(**init["network"]["init_args"])
    module = HistogramTransport(network, side=init["side"], epsilon=init["epsilon"])
    module.load_state_dict(saved["state_dict"])
    return module.eval()


def iterations(module: Transport, a: Histograms, start: Tensor, goal: float, memory: int) -> Tensor:
    """Iterations from a start to the goal ``(B,)``."""
    found = Anderson(steps=LIMIT, memory=memory, tol=goal).solve(module, a, start)
    return torch.where(found.converged, found.iterations, LIMIT).double()


def annealed(module: Transport, a: Histograms, goal: float, memory: int, first: float, factor: float) -> Tensor:
    """Iterations from zero to the goal ``(B,)``, the first of them at falling temperatures; each iterate is looked at."""
    b = torch.zeros_like(a.alpha)
    done = torch.full_like(a.alpha[:, 0], torch.inf).double()
    steps = temperatures(module.epsilon, factor, first)
    with torch.no_grad():
        for k, epsilon in enumerate(steps):
            error = module.fixed_point_error(b, module.update(b, a), a)
            done = torch.where((error <= goal) & done.isinf(), k, done)
            b = module.update(b, a, epsilon)
    return torch.minimum(done, len(steps) + iterations(module, a, b, goal, memory))


def seconds(call: Callable[[], Any], repeats: int = 5) -> float:
    """The median of several calls, after one that does not count."""
    call()
    spent = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        spent.append(time.perf_counter() - started)
    return statistics.median(spent)


def training_seconds(path: Path, steps: int = 100) -> float:
    """The CPU time of the recipe's training on this machine, without Lightning, validation and checkpoints."""
    module, saved = load(path), checkpoint.load(path)
    rows = saved[checkpoint.RECIPE]["data"]["init_args"]["batch_size"]
    data = ImagePairs(dataset="mnist", batch_size=rows)
    optimizer = torch.optim.Adam(module.parameters(), 0.0)

    def run(first: int, last: int) -> float:
        started = time.process_time()
        for number in range(first, last):
            loss = module.amortized_step(data.batch("train", number)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return time.process_time() - started

    run(0, 10)
    return run(10, 10 + steps) / steps * float(saved["global_step"])


def from_ott(python: str, a: Histograms, epsilon: float, budget: float) -> tuple[Tensor, str]:
    """Potentials that ott-jax's ``MetaInitializer`` predicts after so many seconds of training, and what it was."""
    data = ImagePairs(dataset="mnist")
    with tempfile.TemporaryDirectory() as folder:
        given, found = Path(folder, "given.npz"), Path(folder, "found.npz")
        np.savez(given, train=data.images("train").numpy(), alpha=a.alpha.numpy(), beta=a.beta.numpy())
        script = Path(__file__).with_name("transport_ott.py")
        subprocess.run([python, str(script), str(given), str(found), str(epsilon), str(budget)], check=True)
        answer = np.load(found)
        return torch.from_numpy(answer["potential"]), str(answer["detail"])


def row(name: str, value: float, goal: float | None, detail: str) -> dict[str, Any]:
    return {
        "id": f"transport: {name}",
        "value": float(f"{value:.4g}"),
        "goal": goal,
        "holds": None if goal is None else value <= goal,
        "detail": detail,
    }


def compare(module: Transport, a: Histograms, starts: dict[str, Tensor]) -> list[dict[str, Any]]:
    """The learned start's iterations over those of each other start, for each goal, plain and accelerated."""
    rows = []
    for (kind, memory), goal in itertools.product((("plain", 0), ("accelerated", 5)), GOALS):
        found = {name: iterations(module, a, b, goal, memory) for name, b in starts.items()}
        schedules = {s: annealed(module, a, goal, memory, *s) for s in SCHEDULES}
        best = min(schedules, key=lambda s: float(schedules[s].mean()))
        found["annealing"] = schedules[best]
        learned = found["learned"]
        for name, other in found.items():
            if name == "learned":
                continue
            must = MUST[goal] if (kind, name) == ("plain", "zeros") else None
            how = f" (from {best[0]}, factor {best[1]})" if name == "annealing" else ""
            detail = (
                f"{learned.mean():.2f} against {other.mean():.2f}{how}, medians {learned.median():.0f} and "
                f"{other.median():.0f}; {len(learned)} pairs, fewer on {(learned < other).double().mean():.1%}, more on "
                f"{(learned > other).double().mean():.1%}; out of iterations {(learned >= LIMIT).double().mean():.1%} and "
                f"{(other >= LIMIT).double().mean():.1%}"
            )
            rows.append(
                row(f"{kind} to {goal:g}, learned / {name}", float(learned.mean() / other.mean()), must, detail)
            )
    return rows


def gap(module: Transport, a: Histograms, start: Tensor) -> dict[str, Any]:
    """The prediction's gap, relative to the value, against accelerated iterations from both starts."""
    solver = Anderson(steps=LIMIT, tol=1e-5)
    module, a, start = module.double(), map_leaves(Tensor.double, a), start.double()
    cold, warm = (solver.solve(module, a, b) for b in (torch.zeros_like(start), start))
    best, predicted = torch.minimum(cold.value, warm.value), evaluate(module, start, a)
    module.float()
    gaps = predicted - best
    detail = (
        f"mean {gaps.mean():.3g} of {-best.mean():.4f}, 95 % {gaps.quantile(0.95):.3g}; solver converged to 1e-5 on "
        f"{(cold.converged & warm.converged).double().mean():.1%}, lost on {(cold.value > predicted).double().mean():.1%}"
    )
    return row("relative gap of the prediction", float(gaps.sum() / best.abs().sum()), 0.01, detail)


def clocks(module: Transport, a: Histograms, learned: Callable[[], Tensor]) -> list[dict[str, Any]]:
    """Time of the whole batch to each goal, network included, and of one convolution in three ways."""
    rows = []
    zeros = torch.zeros_like(a.alpha)
    for goal in GOALS:
        solver = Anderson(steps=LIMIT, memory=0, tol=goal)
        warm = seconds(lambda solver=solver: solver.solve(module, a, learned()))
        cold = seconds(lambda solver=solver: solver.solve(module, a, zeros))
        detail = (
            f"{1e3 * warm:.0f} ms, network included, against {1e3 * cold:.0f} ms for {len(zeros)} pairs in one batch"
        )
        rows.append(row(f"time to {goal:g}, learned / zeros", warm / cold, None, detail))
    few = take(a, slice(0, 32))
    u = log_density(torch.zeros_like(few.alpha), few.alpha)
    ways = {
        "products": lambda: module.log_convolve(u, few, 0.01),
        "sums by axes": lambda: module.log_convolve(u, few, 0.0095),
        "dense sums": lambda: Transport.log_convolve(module, u, few, 0.01),
    }
    with torch.no_grad():
        spent = {name: seconds(way) for name, way in ways.items()}
    for name in ("sums by axes", "dense sums"):
        detail = (
            f"{1e3 * spent[name]:.2f} ms against {1e3 * spent['products']:.2f} ms, 32 histograms of 28 x 28, float32"
        )
        rows.append(row(f"one convolution, {name} / products", spent[name] / spent["products"], None, detail))
    return rows


def temperatures_down(network: HistogramPotential, a: Histograms) -> list[dict[str, Any]]:
    """From 1e-1 to 1e-4: what 100 accelerated iterations leave, from an annealed start, and what float32 changes of it."""
    rows = []
    for epsilon in (1e-1, 1e-2, 1e-3, 1e-4):
        module = HistogramTransport(network, side=28, epsilon=epsilon, start="annealed")
        start = module.initial(a)
        found = Anderson(steps=100, tol=1e-6).solve(module, a, start)
        exact, b = map_leaves(Tensor.double, a), found.b.double()
        double = module.double()
        error = double.fixed_point_error(b, double.update(b, exact), exact)
        off = (error - found.residual).abs().max()
        module.float()
        detail = (
            f"L1 error, mean over {len(b)} pairs; 95 % {error.quantile(0.95):.2g}, at the start "
            f"{module.fixed_point_error(start, module.update(start, a), a).mean():.2g}; float32 tells it to {off:.1g}; "
            f"not finite {(~found.value.isfinite()).double().mean():.0%}"
        )
        rows.append(row(f"epsilon {epsilon:g}, error after 100 accelerated", float(error.mean()), None, detail))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--quick", action="store_true", help="32 pairs: to see that it runs")
    parser.add_argument("--ott", metavar="PYTHON", help="an interpreter with ott-jax")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    module = load(CHECKPOINT)
    a = ImagePairs(dataset="mnist", num_test=32 if options.quick else 512).contexts("test")
    assert a is not None
    few = take(a, slice(0, 128))

    def learned() -> Tensor:
        with torch.no_grad():
            return module(a)

    points = module.points
    starts = {
        "learned": learned(),
        "zeros": torch.zeros_like(a.alpha),
        "gaussians": gaussian_potential(a.alpha, points, a.beta, points, module.epsilon),
    }
    rows = []
    if options.ott:
        budget = training_seconds(CHECKPOINT)
        starts["ott-jax"], detail = from_ott(options.ott, a, module.epsilon, 5.0 if options.quick else budget)
        print(f"ott-jax: {detail}", file=sys.stderr)
    for part in (
        lambda: compare(module, a, starts),
        lambda: [gap(module, a, starts["learned"])],
        lambda: clocks(module, a, learned),
        lambda: temperatures_down(module.network, few),  # type: ignore[arg-type]
        lambda: potentials(options.quick),
    ):
        for found in part():
            rows.append(found)
            verdict = (
                "" if found["goal"] is None else f"  goal {found['goal']}: {'holds' if found['holds'] else 'MISSED'}"
            )
            print(f"{found['id']:58s} {found['value']:.4g}{verdict}  {found['detail']}", flush=True)
            if options.json:
                options.json.write_text(json.dumps({"rows": rows}, indent=2))


if __name__ == "__main__":
    main()
