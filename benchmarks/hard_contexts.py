"""The tail of the gap with and without ``HardContexts``, after the same CPU time of training.

``python -m benchmarks.hard_contexts [--quick] [--only CASE] [--json FILE]``

Networks, optimizers, clipping and batch sizes of the shipped recipes, in a bare loop (Lightning's time for a step would be
the same for all and so favour those that make fewer). First every side is timed step by step beside the others; a side whose
step costs r times the plain one's gets 1 / r of its steps, its learning-rate schedule shortened to match, scoring
included. Then all are trained in turns, one thread, and the CPU time that each really took is told. The gap is that of
held-out contexts, against the best of an L-BFGS run from each start. Both sides are tried at the same peak learning rates;
the best of each is compared, and said to be at the grid's edge where it is.

The value of a row is p95 with / p95 without, the geometric mean over the seeds of ratios of one seed; it holds where it
is below 1 by two standard errors. The best of each side is chosen on the seeds that it is reported on. Only ``sinusoid_scales``
has that goal; the other recipes' rows are told, good or bad.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from amortized import AmortizedModule, ContextDataModule, HardContexts, Loss, ObjectiveLoss
from amortized.contract import start_draws
from amortized.networks import DeepSet, LearnedInitialization, SetTransformer
from amortized.problems.sinusoid import Sinusoid, SinusoidContexts
from amortized.problems.sphere import Sphere, SphereContexts
from amortized.solvers import LBFGS, GradientDescent

CPU = torch.device("cpu")


class Variant(NamedTuple):
    """One way to train."""

    name: str
    loss: Loss
    rows: int
    """Contexts drawn for a step; a pool's worth."""
    lr: float


class Case(NamedTuple):
    """A recipe: its problem and contexts, how long the plain side trains, and its sides, the first of them plain."""

    module: Callable[[], AmortizedModule]
    contexts: Callable[..., ContextDataModule]
    steps: int
    clip: float
    seeds: int
    starts: Callable[[AmortizedModule, Any], list[Tensor]]
    variants: list[Variant]
    goal: float | None


def sphere() -> AmortizedModule:
    return Sphere(SetTransformer(["centres", "offsets"], 4, 3, features=48))


def hypernetwork() -> AmortizedModule:
    return Sinusoid(DeepSet(["support_x", "support_y"], 2, 1761, activation="gelu"))


def maml() -> AmortizedModule:
    inner = GradientDescent(steps=5, lr=0.02, learn_lr=True, per_step=True)
    return Sinusoid(LearnedInitialization(1761), refine=inner)


def from_initial(module: AmortizedModule, a: Any) -> list[Tensor]:
    return [module.initial(a)]


def from_each_centre(module: AmortizedModule, a: Any) -> list[Tensor]:
    return [centre.clone() for centre in a.centres.unbind(1)]


def sides(rows: int, rates: tuple[float, ...]) -> list[Variant]:
    """Plain, and unbiased draws of as many rows from a pool of eight times as many, at each peak learning rate."""
    return [Variant("plain", ObjectiveLoss(), rows, lr) for lr in rates] + [
        Variant("pool 8", HardContexts(pool=8), 8 * rows, lr) for lr in rates
    ]


def scales(**kwargs: Any) -> SinusoidContexts:
    return SinusoidContexts(amplitude=(0.005, 5.0), log_uniform=True, **kwargs)


CASES = {
    "sinusoid_scales": Case(
        hypernetwork, scales, 3000, 1.0, 5, from_initial, sides(64, (0.002, 0.004, 0.008, 0.016)), 1.0
    ),
    "sinusoid": Case(
        hypernetwork, SinusoidContexts, 1000, 0.0, 2, from_initial, sides(64, (0.002, 0.004, 0.008)), None
    ),
    "maml_sinusoid": Case(maml, SinusoidContexts, 1500, 1.0, 3, from_initial, sides(25, (0.01, 0.02, 0.04)), None),
    "sphere": Case(sphere, SphereContexts, 1000, 0.0, 3, from_each_centre, sides(256, (0.002, 0.004)), None),
}


class Side:
    """One training run, and the CPU seconds it has taken."""

    def __init__(self, case: Case, variant: Variant, steps: int, seed: int) -> None:
        torch.manual_seed(seed)
        self.module, self.loss = case.module(), copy.deepcopy(variant.loss)  # it learns
        self.steps, self.clip = steps, case.clip
        self.data = case.contexts(batch_size=variant.rows, seed=seed)
        self.optimizer = torch.optim.AdamW(self.module.parameters(), variant.lr)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, max_lr=variant.lr, total_steps=steps + 1, pct_start=0.1
        )
        self.number, self.seconds = 0, 0.0

    def run(self, steps: int) -> None:
        """So many further steps, none beyond the last."""
        started = time.process_time()
        for _ in range(min(steps, self.steps - self.number)):
            start_draws(self.data.seed * 2**24 + self.number, CPU)
            loss = self.loss(self.module, self.data.batch("train", self.number)).mean()
            self.optimizer.zero_grad()
            loss.backward()
            if self.clip:
                nn.utils.clip_grad_norm_(self.module.parameters(), self.clip)
            self.optimizer.step()
            self.schedule.step()
            self.number += 1
        self.seconds += time.process_time() - started


def costs(case: Case, turns: int = 16, steps: int = 10) -> list[float]:
    """CPU time of a step of each variant over that of the first: the median over turns."""
    sides = [Side(case, variant, 10**6, 0) for variant in case.variants]
    table = []
    for _ in range(turns):
        before = [side.seconds for side in sides]
        for side in sides:
            side.run(steps)
        spent = [side.seconds - b for side, b in zip(sides, before, strict=True)]
        table.append([s / spent[0] for s in spent])
    return torch.tensor(table[1:]).median(0).values.tolist()


def measure(name: str, quick: bool) -> dict[str, Any]:
    """The row of one case."""
    case = CASES[name]
    total, seeds = (case.steps // 20, 2) if quick else (case.steps, case.seeds)
    data, module = case.contexts(num_test=64 if quick else 512), case.module()
    a = data.contexts("test")
    solver = LBFGS(300, tol=0.003) if isinstance(module, Sinusoid) else LBFGS(200)
    found = [solver.solve(module, a, start) for start in case.starts(module, a)]
    best, which = torch.stack([solution.value for solution in found]).min(0)
    converged = torch.stack([solution.converged for solution in found]).gather(0, which[None]).float().mean()
    ratios = costs(case)
    p95, mean, seconds, lost = torch.empty(4, len(case.variants), seeds)
    for seed in range(seeds):
        runs = [Side(case, v, round(total / r), seed) for v, r in zip(case.variants, ratios, strict=True)]
        while any(run.number < run.steps for run in runs):
            for run, ratio in zip(runs, ratios, strict=True):
                run.run(round(40 / ratio))
        for i, run in enumerate(runs):
            with torch.no_grad():
                gap = run.module.objective(run.module(a), a) - best
            p95[i, seed], mean[i, seed], seconds[i, seed] = gap.quantile(0.95), gap.mean(), run.seconds
            lost[i, seed] = (gap < -1e-6).float().mean()
    half = len(case.variants) // 2
    level = p95.log().mean(1).nan_to_num(nan=torch.inf)
    plain, hard = int(level[:half].argmin()), half + int(level[half:].argmin())
    value, error = ratio_of(p95[hard], p95[plain])
    mean_value, mean_error = ratio_of(mean[hard], mean[plain])
    grids = "; ".join(
        f"{case.variants[start].name} "
        + ", ".join(f"{case.variants[i].lr}: {spread(p95[i])}" for i in range(start, start + half))
        + (" (best at the edge)" if best_of - start in (0, half - 1) else "")
        for start, best_of in ((0, plain), (half, hard))
    )
    detail = (
        f"± {error:.3f}, mean gap {mean_value:.3f} ± {mean_error:.3f} times; {seeds} seeds, {round(total / ratios[hard])} steps "
        f"against {round(total / ratios[plain])}, CPU time {float(seconds[hard].sum() / seconds[plain].sum()):.2f} of the plain "
        f"one's; p95 by learning rate: {grids}; {len(best)} contexts, solver converged {converged:.1%}, lost "
        f"{float(lost[plain].mean()):.1%} to the plain network, {float(lost[hard].mean()):.1%} to the other"
    )
    holds = None if case.goal is None else value + 2 * error < case.goal
    return {
        "id": f"hard contexts: {name}",
        "value": round(value, 4),
        "goal": case.goal,
        "holds": holds,
        "detail": detail,
    }


def ratio_of(x: Tensor, y: Tensor) -> tuple[float, float]:
    """The geometric mean of x / y over the seeds, and its standard error."""
    logs = (x / y).log()
    value = float(logs.mean().exp())
    return value, value * float(logs.std()) / len(logs) ** 0.5


def spread(x: Tensor) -> str:
    """Mean and standard error over the seeds."""
    return f"{float(x.mean()):.4g} ± {float(x.std()) / len(x) ** 0.5:.2g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--quick", action="store_true", help="a twentieth of the steps, two seeds: to see that it runs")
    parser.add_argument("--only", choices=CASES, help="one recipe")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name in [options.only] if options.only else CASES:
        row = measure(name, options.quick)
        rows.append(row)
        verdict = "" if row["goal"] is None else f"  goal < 1: {'holds' if row['holds'] else 'MISSED'}"
        print(f"{row['id']:30s} {row['value']:.3f}{verdict}  {row['detail']}", flush=True)
        if options.json:
            options.json.write_text(json.dumps({"rows": rows}, indent=2))


if __name__ == "__main__":
    main()
