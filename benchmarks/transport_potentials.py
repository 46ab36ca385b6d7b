"""Maps between Gaussians from draws alone, by a convex potential and its amortized conjugate, against the known ones.

``python -m benchmarks.transport_potentials [--quick] [--json FILE]``; also a part of ``benchmarks.transport``

Two Gaussians that are known by draws, ``amortized.problems.GaussianPair``, in 2 and 8 dimensions; 2,000 updates of 512 draws
of each, Adam at 0.005 with one-cycle rates. The network learns the conjugate by each of the three losses; ``solved`` has the
points that the potential learns from finished by 5 steps of L-BFGS, for a third of the updates. The value is the L2-UVP of the
map in per cent, on 4,096 held-out draws: what it leaves unexplained, 100 for a map to the mean.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from amortized.losses import FixedPointLoss, Loss, ObjectiveLoss, RegressionLoss
from amortized.networks import ResidualMLP
from amortized.problems import ConvexPotential, GaussianPair, Wasserstein2
from amortized.problems.transport.monge import monge, unexplained
from amortized.solvers import LBFGS, Solver

UPDATES = 2000
WAYS: dict[str, tuple[Callable[[], Loss], Solver | None]] = {
    "objective": (ObjectiveLoss, None),
    "cycle": (lambda: FixedPointLoss(0), None),
    "objective, solved": (ObjectiveLoss, LBFGS(5)),
    "regression, solved": (lambda: RegressionLoss(field="conjugate"), LBFGS(5)),
}


def trained(data: GaussianPair, dimension: int, loss: Loss, conjugate: Solver | None, updates: int) -> Wasserstein2:
    torch.manual_seed(0)
    network = ResidualMLP(dimension, dimension, [128, 128], "silu")
    module = Wasserstein2(network, ConvexPotential(dimension, [64, 64]), conjugate, loss=loss)
    optimizer = torch.optim.Adam(module.parameters(), 0.005, betas=(0.5, 0.5))
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.005, updates, pct_start=0.1)
    for number in range(updates):
        signal = module.amortized_step(data.batch("train", number)).mean()
        optimizer.zero_grad()
        signal.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        rates.step()
    return module.eval()


def potentials(quick: bool) -> list[dict[str, Any]]:
    """A row for each dimension and loss."""
    rows = []
    for dimension in (2, 8):
        data = GaussianPair(dimension, batch_size=512, num_test=4096)
        a = data.contexts("test")
        straight = unexplained(a.x, data.known.carry(a.x))
        for name, (loss, conjugate) in WAYS.items():
            updates = 30 if quick else UPDATES // (3 if conjugate is not None else 1)
            started = time.process_time()
            module = trained(data, dimension, loss(), conjugate, updates)
            spent = time.process_time() - started
            with torch.no_grad():
                b = module(a)
            solution = LBFGS(200).solve(module, a, b)
            values = [module.dual_value(x, a) for x in (b, solution.b)]
            found = monge(a, module.transport(a.x), b, solution.b, values, data.known)
            detail = (
                f"per cent; back, by the network {found['uvp_network']:.2g}, by the solver {found['uvp_solver']:.2g}; without "
                f"a map {straight:.3g}; W2^2 {found['W2_squared_solver']:.4g} of {found['W2_squared_known']:.4g}; solver "
                f"converged on {solution.converged.double().mean():.1%}; {updates} updates, {spent:.0f} s of CPU time"
            )
            value = float(f"{found['uvp_forward']:.4g}")
            name = f"transport: L2-UVP between Gaussians, d = {dimension}, {name}"
            goal = 1.0 if conjugate is None else None
            holds = None if goal is None else value <= goal
            rows.append({"id": name, "value": value, "goal": goal, "holds": holds, "detail": detail})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--quick", action="store_true", help="30 updates: to see that it runs")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = potentials(options.quick)
    for found in rows:
        print(f"{found['id']:66s} {found['value']:<8g} {found['detail']}")
    if options.json:
        options.json.write_text(json.dumps({"rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
