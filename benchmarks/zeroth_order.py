"""Learning from values alone: a network trained on a black box against the same network trained by gradients on its smooth twin.

``python -m benchmarks.zeroth_order [--quick] [--seeds N] --json FILE`` prints a table and writes ``{"rows": [{"id", "value",
"goal", "holds", "detail"}]}``.

The black box is :class:`~amortized.problems.BlackBoxInventory`, a simulation in NumPy that counts whole pieces. All networks are
alike, start alike, and make as many updates with as many contexts; what each costs is told beside it. All are judged on the black
box, on 1,024 held-out contexts:

* trained on the smooth twin by exact gradients, the objective loss;
* trained on the black box by ``ZerothOrderLoss``, with antithetic pairs and with independent samples;
* trained by the objective loss on the black box written in torch, whose gradient is zero: nothing is learned;
* the reference: CMA-ES on the black box, and how much all whole numbers within 2 pieces of its base stocks improve on that.

The noise of the gradient is the variance over the squared mean of one step's estimate for a context; far from the optimum, at
the untrained network, and near it, a tenth of a standard deviation from CMA-ES's solutions.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from amortized.contract import evaluate, map_leaves
from amortized.losses import ObjectiveLoss, ZerothOrderLoss
from amortized.losses.objective import Loss
from amortized.networks import MLP
from amortized.problems import BlackBoxInventory, Inventory, InventoryContexts
from amortized.problems.inventory import Chain
from amortized.solvers import CMAES

SIGMA, SAMPLES, BATCH, LR = 0.3, 16, 64, 3e-3


class Row(dict[str, Any]):
    """One figure, printed when it is made."""

    def __init__(
        self, name: str, value: float, detail: str, goal: str | None = None, holds: bool | None = None
    ) -> None:
        super().__init__(id=name, value=value, goal=goal, holds=holds, detail=detail)
        verdict = "" if goal is None else f"  goal {goal}: {'holds' if holds else 'MISSED'}"
        print(f"{name:62s} {value:9.4g}{verdict}  {detail}", flush=True)


class Rounded(Inventory):
    """The black box in torch: its gradient is there, and zero."""

    def base_stock(self, b: Tensor, a: Chain) -> Tensor:
        return super().base_stock(b, a).round()


class Whole(BlackBoxInventory):
    """The black box as a function of base stocks, in pieces."""

    def decode(self, b: Tensor, a: Chain) -> Tensor:
        return b.clip(min=0)


def network(seed: int) -> MLP:
    torch.manual_seed(seed)
    return MLP(9, 3, [64, 64], "silu")


def train(model: Inventory, steps: int, seed: int) -> float:
    """Seconds that the training took."""
    data = InventoryContexts(batch_size=BATCH, seed=seed)
    optimizer = torch.optim.Adam(model.parameters(), LR)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=steps, pct_start=0.1)
    torch.manual_seed(seed)
    start = time.perf_counter()
    for step in range(steps):
        loss = model.amortized_step(data.batch("train", step)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return time.perf_counter() - start


@torch.no_grad()
def cost(model: Inventory, a: Chain) -> float:
    """The mean objective of a model's predictions, on the black box."""
    return float(BlackBoxInventory(model.network).objective(model(a), a).mean())


@torch.no_grad()
def neighbours(b: Tensor, a: Chain, reach: int = 2) -> Tensor:
    """The lowest objective of whole base stocks within so many pieces of a solution's, ``(B,)``."""
    problem, whole = BlackBoxInventory(network(0)), Whole(network(0))
    stock, lowest = problem.decode(b, a), problem.objective(b, a)
    for step in itertools.product(range(-reach, reach + 1), repeat=3):
        lowest = torch.minimum(lowest, whole.objective(stock + torch.tensor(step).to(stock), a))
    return lowest


def noise(loss: Loss, at: Tensor, a: Chain, repeats: int) -> float:
    """The variance of the estimated gradient with respect to the prediction, relative to its squared mean; median row."""
    predictor, found = BlackBoxInventory(network(0)), []
    for _ in range(repeats):
        b = at.clone().requires_grad_()
        predictor.iterates = lambda a, b=b: [b]  # type: ignore[method-assign,misc]
        loss(predictor, a).sum().backward()
        found.append(b.grad)
    estimates = torch.stack(found)  # type: ignore[arg-type]
    return float((estimates.var(0).sum(1) / estimates.mean(0).square().sum(1)).median())


class NoBaseline(ZerothOrderLoss):
    """What the estimate is without a baseline."""

    def __call__(self, model: Any, a: Chain) -> Tensor:
        x, log_q = self.draw(model, model.iterates(a)[-1], a)
        K, B = x.shape[:2]
        many = map_leaves(lambda leaf: leaf.expand(K, *leaf.shape).flatten(0, 1), a)
        return (evaluate(model, x.flatten(0, 1), many).view(K, B) * log_q).mean(0)


def measure(quick: bool, seeds: int) -> list[Row]:
    steps, repeats, rows = (200, 50, []) if quick else (2000, 400, [])
    a = InventoryContexts(num_test=64 if quick else 1024).contexts("test")
    black_box = BlackBoxInventory(network(0))
    torch.manual_seed(0)
    start = time.perf_counter()
    found = CMAES(200, sigma=0.5, tol=0.05, population=28).solve(black_box, a, torch.zeros(len(a.demand), 3))
    seconds = time.perf_counter() - start
    reference = float(found.value.mean())
    settled = f"{len(found.b)} contexts, {float(found.converged.float().mean()):.1%} converged, {seconds:.1f} s"
    rows.append(Row("CMA-ES: mean cost", reference, settled))
    lowest = neighbours(found.b, a)
    better = float((lowest < found.value - 1e-6).float().mean())
    gain = float((found.value - lowest).mean()) / reference
    detail = f"by one of 124 neighbours, on {better:.1%} of the contexts"
    rows.append(Row("CMA-ES: what the neighbours improve, relatively", gain, detail, "<= 0.001", gain <= 1e-3))

    sides = {
        "gradients of the smooth twin": lambda net: Inventory(net, loss=ObjectiveLoss()),
        "values of the black box, pairs": lambda net: BlackBoxInventory(net, loss=ZerothOrderLoss(SIGMA, SAMPLES)),
        "values of the black box, independent": lambda net: BlackBoxInventory(
            net, loss=ZerothOrderLoss(SIGMA, SAMPLES, antithetic=False)
        ),
    }
    ends: dict[str, list[float]] = {}
    for name, make in sides.items():
        taken = []
        for seed in range(seeds):
            model = make(network(seed))
            taken.append(train(model, steps, seed))
            ends.setdefault(name, []).append(cost(model, a))
        mean = statistics.mean(ends[name])
        detail = f"over CMA-ES {mean / reference - 1:.2%}; {steps} updates of {BATCH} contexts, {statistics.median(taken):.0f} s"
        rows.append(Row(f"{name}: mean cost", mean, f"{detail}; {seeds} seeds"))
    by_gradients, *by_values = (statistics.mean(costs) for costs in ends.values())
    for name, value in zip(list(sides)[1:], by_values, strict=True):
        ratio = value / by_gradients
        each = zip(ends[name], ends["gradients of the smooth twin"], strict=True)
        detail = "each seed: " + ", ".join(f"{one / other:.4f}" for one, other in each)
        goal = ("<= 1.05", ratio <= 1.05) if "pairs" in name else (None, None)
        rows.append(Row(f"{name}: cost over gradients'", ratio, detail, *goal))

    blind = Rounded(network(0), loss=ObjectiveLoss())
    before = cost(blind, a)
    train(blind, min(steps, 300), 0)
    change = abs(cost(blind, a) / before - 1)
    detail = f"mean cost {before:.4g} before and after: the gradient is zero"
    rows.append(Row("objective loss on the black box: relative change", change, detail, "= 0", change == 0))

    few = map_leaves(lambda leaf: leaf[:64], a)
    places = {"far": black_box(few).detach(), "near": found.b[:64] + 0.1}
    noises = {
        "no baseline": NoBaseline(SIGMA, SAMPLES, antithetic=False),
        "baseline": ZerothOrderLoss(SIGMA, SAMPLES, antithetic=False),
        "antithetic pairs": ZerothOrderLoss(SIGMA, SAMPLES),
    }
    detail = f"{SAMPLES} samples, sigma {SIGMA}; of a linear function {4 / SAMPLES:.2g}, of pairs {8 / SAMPLES:.2g}"
    for (place, b), (name, loss) in itertools.product(places.items(), noises.items()):
        rows.append(Row(f"noise of the gradient, {place}: {name}", noise(loss, b, few, repeats), detail))
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a minute, and no goal means anything")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    rows = measure(args.quick, 1 if args.quick else args.seeds)
    args.json.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
