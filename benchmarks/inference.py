"""Amortized inference on MNIST: the gaps of Cremer, Li & Duvenaud (2018), refinement, equal time, and likelihood.

``python -m benchmarks.inference [--quick] [--only PART] [--runs FOLDER] [--json FILE]``

Trains what it needs with the recipe ``vae_mnist`` (needs the MNIST files, see ``amortized.problems.Images``) and options of
it, into ``--runs``, where a later call finds it again. One thread. Every figure is of test images, binarised once.

* ``table``: for posterior families and decoders, ``log p(a)`` by annealed importance sampling from the solver's
  posterior (the larger of that and 5,000 importance samples from it), the encoder's bound and the solver's, on the same
  fresh draws. The value is the share of the inference gap that is amortization.
* ``speed``: our batched solver against one image at a time, Adam 1e-3, 50 draws, until ten checks of 100 steps in a row
  bring no better mean; both evaluated on the same fresh draws.
* ``refine``: the trained model, fixed; five plain steps of stochastic gradient descent or Adam from the encoder's
  prediction, the step size tuned over a grid on validation images, against five learned steps. The value is the share
  of the gap that they close.
* ``time``: when the best of the tuned solvers reaches the encoder's mean bound, batch 1024, over the encoder's time.
* ``likelihood``: all 10,000 test images, 2,000 importance samples each from the encoder's posterior, its noise 1.3
  times as wide.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from amortized import checkpoint
from amortized.cli.app import main as command
from amortized.contract import draws, evaluate
from amortized.evaluation.budget import measure_budget
from amortized.networks import MLP
from amortized.posteriors import DiagonalGaussian, Flow, FullGaussian, Posterior
from amortized.problems import VAE, Images
from amortized.problems.inference.evidence import AnnealedImportanceSampling, ImportanceSampling
from amortized.solvers import LBFGS, Adam, GradientDescent, LearnedUpdate, Solver

CPU = torch.device("cpu")
PYTHAE = -89.8
DRAWS, WIDER = (
    2000,
    1.3,
)  # importance samples; the width of their proposal, chosen on 200 test images


class Cell(NamedTuple):
    """A posterior family and networks, and how long they train."""

    posterior: str
    decoder: tuple[int, ...]
    steps: int
    encoder: tuple[int, ...] = (200, 200)
    latent: int = 50


RECIPE = Cell("DiagonalGaussian", (200, 200), 50_000)
LARGER = Cell("DiagonalGaussian", (500, 500), 20_000, (500, 500), 16)
CELLS = {
    "mean-field": Cell("DiagonalGaussian", (200, 200), 12_000),
    "full covariance": Cell("FullGaussian", (200, 200), 12_000),
    "flow": Cell("Flow", (200, 200), 12_000),
    "mean-field, linear decoder": Cell("DiagonalGaussian", (), 12_000),
    "mean-field, 784-500-500-16 and back": LARGER,
}
FAMILIES: dict[str, type[Posterior]] = {cls.__name__: cls for cls in (DiagonalGaussian, FullGaussian, Flow)}


def untrained(cell: Cell, eval_samples: int = 100, **kwargs: Any) -> VAE:
    posterior = FAMILIES[cell.posterior](cell.latent)
    encoder = MLP(784, posterior.features, cell.encoder, "silu")
    decoder = MLP(cell.latent, 784, cell.decoder, "silu")
    return VAE(encoder, decoder, posterior, eval_samples=eval_samples, **kwargs).eval()


def trained(cell: Cell, runs: Path, quick: bool, eval_samples: int = 100) -> tuple[VAE, float]:
    """The recipe's model with this family and decoder, trained once, and the minutes that took."""
    steps = 200 if quick else cell.steps
    folder = runs / "_".join(
        [cell.posterior, *("-".join(map(str, h)) for h in (cell.encoder, (cell.latent,), cell.decoder)), str(steps)]
    )
    minutes = folder / "minutes"
    if not minutes.exists():
        features = FAMILIES[cell.posterior](cell.latent).features
        started = time.perf_counter()
        command([
            "fit", "-c", "vae_mnist", f"--run_folder={folder}", f"--trainer.max_steps={steps}",
            f"--trainer.val_check_interval={steps}",
            f"--model.posterior={cell.posterior}", f"--model.posterior.latent={cell.latent}",
            f"--model.encoder.out_features={features}", f"--model.encoder.hidden={list(cell.encoder)}",
            f"--model.decoder.in_features={cell.latent}", f"--model.decoder.hidden={list(cell.decoder)}",
            f"--model.scheduler.total_steps={steps}", "--budget.enabled=false", "--gap.solver.steps=20",
            "--data.num_val=128", "--data.num_test=128", "--trainer.enable_progress_bar=false",
        ])  # fmt: skip
        minutes.write_text(f"{(time.perf_counter() - started) / 60:.1f}")
    model = untrained(cell, eval_samples)
    found = checkpoint.newest(folder / "checkpoints")
    assert found is not None
    model.load_state_dict(checkpoint.load(found)["state_dict"])
    return model, float(minutes.read_text())


def bound(model: VAE, b: Tensor, a: Tensor, seed: int = 1) -> Tensor:
    """The evidence lower bound of each row on fresh draws, ten sets of ``eval_samples``."""
    values = []
    for k in range(10):
        with draws(seed + k, CPU):
            values.append(-evaluate(model, b, a))
    return torch.stack(values).mean(0)


def solved(model: VAE, a: Tensor, solver: Solver) -> tuple[Tensor, Tensor, float]:
    """The better of the solutions from the prior and from the prediction; which rows converged; the seconds it took."""
    with torch.no_grad():
        prediction = model(a)
    started = time.perf_counter()
    found = []
    for start in (model.initial(a), prediction):
        with draws(0, CPU):
            found.append(solver.solve(model, a, start))
    seconds = time.perf_counter() - started
    use = bound(model, found[1].b, a, 100) >= bound(model, found[0].b, a, 100)
    return (
        torch.where(use[:, None], found[1].b, found[0].b),
        torch.where(use, found[1].converged, found[0].converged),
        seconds,
    )


def resampled(model: VAE, a: Tensor, steps: int) -> tuple[Tensor, Tensor, float]:
    """The best of Adam with new draws in every step, from the prediction, at each of three step sizes that decay to zero.

    For families of so many coordinates that they would fit any fixed draws. There is no test of convergence: none counts.
    """
    with torch.no_grad():
        best = model(a)
    value, start, draws_before = bound(model, best, a, 100), best, model.eval_samples
    started = time.perf_counter()
    model.eval_samples = 16
    for lr in (0.001, 0.003, 0.01):
        b = start.clone().requires_grad_()
        optimizer = torch.optim.Adam([b], lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(steps):
            (b.grad,) = torch.autograd.grad(model.objective(b, a).sum(), b)
            optimizer.step()
            schedule.step()
        model.eval_samples = draws_before
        found = bound(model, b.detach(), a, 100)
        best = torch.where((found > value)[:, None], b.detach(), best)
        value = torch.maximum(found, value)
        model.eval_samples = 16
    model.eval_samples = draws_before
    return best, torch.zeros(len(a)), time.perf_counter() - started


def table(runs: Path, quick: bool) -> Iterator[dict[str, Any]]:
    n = 8 if quick else 64
    a = Images("mnist", num_test=n).contexts("test")
    for name, cell in CELLS.items():
        # The many coordinates of the richer families would fit the draws of a smaller set.
        model, minutes = trained(cell, runs, quick, 100 if cell.posterior == "DiagonalGaussian" else 500)
        with torch.no_grad():
            prediction = model(a)
        if cell.posterior == "Flow":
            b, converged, _ = resampled(model, a, 20 if quick else 800)
        else:
            b, converged, _ = solved(model, a, LBFGS(30 if quick else 150, tol=0.1))
        with draws(7, CPU):
            annealed = AnnealedImportanceSampling(steps=10 if quick else 150, chains=16)(model, a, b)
            sampled = ImportanceSampling(5000)(model, a, b)
        evidence = torch.maximum(annealed, sampled)
        encoder, solver = bound(model, prediction, a), bound(model, b, a)
        amortization, approximation = solver - encoder, evidence - solver
        share = float(amortization.sum() / (evidence - encoder).sum())
        detail = (
            f"log p {spread(evidence)} (annealed {mean(annealed):.2f}, importance {mean(sampled):.2f}), encoder's bound "
            f"{spread(encoder)}, solver's {spread(solver)}; amortization {spread(amortization)} nats, approximation "
            f"{spread(approximation)}; {n} test images, solver converged {mean(converged):.0%}, lost to the encoder "
            f"{mean(amortization < 0):.0%}; {cell.steps} steps, {minutes:.1f} min of training"
        )
        yield row(f"share of amortization: {name}", share, None, None, detail)


def speed(runs: Path, quick: bool) -> Iterator[dict[str, Any]]:
    model, _ = trained(RECIPE, runs, quick)
    n, few = (8, 1) if quick else (100, 4)
    a = Images("mnist", num_test=n).contexts("test")
    rough, converged, seconds = solved(model, a, LBFGS(200, tol=0.1))
    finer, _ = trained(RECIPE, runs, quick, eval_samples=800)  # a few steps more, on draws that no solution fits
    started = time.perf_counter()
    with draws(1, CPU):
        ours = LBFGS(20, tol=0.1).solve(finer, a, rough).b
    seconds += time.perf_counter() - started
    model.eval_samples = 50
    theirs, started, steps = [], time.perf_counter(), []
    for i in range(few):
        b, count = one_image(model, a[i : i + 1], 300 if quick else 10**6)
        theirs.append(b)
        steps.append(count)
    slow = (time.perf_counter() - started) / few
    model.eval_samples = 100
    better = bound(model, ours[:few], a[:few]) - bound(model, torch.cat(theirs), a[:few])
    ratio = slow / (seconds / n)
    detail = (
        f"{1e3 * seconds / n:.0f} ms an image (two starts, 100 draws, converged {mean(converged):.0%}; then on 800; batch "
        f"{n}) against {slow:.1f} s ({statistics.mean(steps):.0f} steps, {few} images); ours is higher by {mean(better):.3f} "
        f"nats in the mean, {float(better.min()):.3f} at the least"
    )
    yield row("gap against one image at a time", ratio, 20, ratio >= 20 and mean(better) >= 0, detail)


def one_image(model: VAE, a: Tensor, limit: int) -> tuple[Tensor, int]:
    """Adam, step size 1e-3, new independent draws, from the prior; stops when 10 checks of 100 steps bring no better mean."""
    b = model.initial(a).requires_grad_()
    optimizer = torch.optim.Adam([b], 1e-3)
    best, worse, total = math.inf, 0, 0.0
    for step in range(1, limit + 1):
        noise = torch.randn(model.eval_samples, 1, model.posterior.latent)
        z, _ = model.posterior.draw(b, noise)
        divergence = model.posterior.divergence(b)
        assert divergence is not None
        loss = (model.distortion(z, a).mean(0) + divergence).sum()
        (b.grad,) = torch.autograd.grad(loss, b)
        optimizer.step()
        total += float(loss.detach())
        if step % 100 == 0:
            best, worse = (total, 0) if total < best else (best, worse + 1)
            total = 0.0
            if worse == 10:
                break
    return b.detach(), step


STEPS = 5


def refine(runs: Path, quick: bool) -> Iterator[dict[str, Any]]:
    model, _ = trained(RECIPE, runs, quick)
    model.requires_grad_(False)
    data = Images("mnist", num_val=64, num_test=16 if quick else 128)
    val, test = data.contexts("val"), data.contexts("test")
    b, converged, _ = solved(model, test, LBFGS(20 if quick else 200, tol=0.1))
    best, start = bound(model, b, test), bound(model, model(test), test)

    def closed(a: Tensor, upper: Tensor, lower: Tensor) -> float:
        with torch.no_grad(), draws(3, CPU):
            return float((bound(model, model(a), a) - lower).sum() / (upper - lower).sum())

    b, _, _ = solved(model, val, LBFGS(20 if quick else 200, tol=0.1))
    model.refine = None
    val_best, val_start = bound(model, b, val), bound(model, model(val), val)
    plain = {
        " ".join([solver.__name__, f"{lr}", *map(str, extra.values())]): solver(STEPS, lr=lr, **extra)
        for solver, extra in ((GradientDescent, {}), (GradientDescent, {"momentum": 0.6}), (Adam, {"decay": False}))
        for lr in (0.001, 0.003, 0.01, 0.03, 0.1)
    }
    shares = {}
    for name, solver in plain.items():
        model.refine = solver
        shares[name] = closed(val, val_best, val_start)
    name = max(shares, key=lambda k: shares[k])
    model.refine = plain[name]
    svi = closed(test, best, start)
    gap = float((best - start).mean())
    yield row(
        "gap closed by 5 plain steps", svi, None, None, f"{name}, tuned on validation images; the gap is {gap:.3f} nats"
    )

    model.refine = LearnedUpdate(model.posterior.features, steps=STEPS)
    minutes = teach(model, 30 if quick else 1500)
    learned = closed(test, best, start)
    detail = (
        f"against {svi:.0%} by 5 plain steps ({name}); of {gap:.3f} nats, {len(test)} test images, solver converged "
        f"{mean(converged):.0%}; model fixed, update trained for {minutes:.1f} min"
    )
    yield row("gap closed by 5 learned steps", learned, 0.8, learned >= 0.8, detail)


def teach(model: VAE, steps: int) -> float:
    """Train the refinement alone, on its last iterate and, less, on its second; the minutes it took."""
    assert model.refine is not None
    data = Images("mnist", batch_size=48)
    optimizer = torch.optim.Adam(model.refine.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps + 1, pct_start=0.1)
    model.train()
    model.samples = 8
    started = time.perf_counter()
    for step in range(steps):
        torch.manual_seed(step)
        a = data.batch("train", step)
        iterates = model.iterates(a)
        loss = (model.objective(iterates[-1], a) + 0.3 * model.objective(iterates[2], a)).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.refine.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()
    return (time.perf_counter() - started) / 60


def equal_time(runs: Path, quick: bool) -> Iterator[dict[str, Any]]:
    model, _ = trained(RECIPE, runs, quick)
    model.eval_samples = 32
    a = Images("mnist", num_test=64 if quick else 1024).contexts("test")
    rivals: dict[str, Solver] = {"LBFGS": LBFGS(40), **{f"Adam {lr}": Adam(60, lr=lr) for lr in (0.1, 0.2, 0.4)}}
    budget = measure_budget(model, a, rivals)
    summary = budget.summary()
    detail = (
        f"{summary['rival']} of {', '.join(rivals)}; encoder {1e3 * budget.network_seconds:.1f} ms for "
        f"{len(a)} images; row by row: median {summary['row_ratio_median']:.0f}, never {summary['rows_never_reached']:.1%}"
    )
    yield row("time to the encoder's bound, solver over encoder", budget.equal_quality_ratio, None, None, detail)


def likelihood(runs: Path, quick: bool) -> Iterator[dict[str, Any]]:
    model, minutes = trained(LARGER, runs, quick)
    a = Images("mnist", num_test=100 if quick else 10_000).contexts("test")
    with draws(5, CPU):
        values = torch.cat([ImportanceSampling(DRAWS, scale=WIDER)(model, part) for part in a.split(100)])
    value = float(values.mean())
    detail = (
        f"{spread(values)} nats, {len(a)} test images, {DRAWS} importance samples; 784-500-500-16 and back, {LARGER.steps} "
        f"steps, {minutes:.1f} min of training"
    )
    yield row("test log-likelihood", value, PYTHAE, value >= PYTHAE, detail)


def mean(x: Tensor) -> float:
    """Of numbers, or the share of what is true."""
    return float(x.double().mean())


def spread(x: Tensor) -> str:
    """Mean and standard error."""
    return f"{float(x.mean()):.3f} ± {float(x.std()) / len(x) ** 0.5:.3f}"


def row(name: str, value: float, goal: float | None, holds: bool | None, detail: str) -> dict[str, Any]:
    return {"id": name, "value": round(value, 4), "goal": goal, "holds": holds, "detail": detail}


PARTS = {"likelihood": likelihood, "time": equal_time, "speed": speed, "refine": refine, "table": table}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--quick", action="store_true", help="200 training steps, a few images: to see that it runs")
    parser.add_argument("--only", choices=PARTS, nargs="*", help="parts; all by default")
    parser.add_argument("--runs", type=Path, default=Path("runs/benchmark_inference"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name in options.only or PARTS:
        for found in PARTS[name](options.runs, options.quick):
            rows.append(found)
            verdict = (
                "" if found["goal"] is None else f"  goal {found['goal']}: {'holds' if found['holds'] else 'MISSED'}"
            )
            print(f"{found['id']:50s} {found['value']:.3f}{verdict}  {found['detail']}", flush=True)
            if options.json:
                options.json.write_text(json.dumps({"rows": rows}, indent=2))


if __name__ == "__main__":
    main()
