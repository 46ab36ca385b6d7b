"""Sparse codes and fixed points: predictions beside FISTA and Anderson acceleration, one run, one core.

``python -m benchmarks.coding [--quick] [--only PART ...] [--json FILE]``; ``--pictures docs``

* ``codes``: the networks of ``checkpoints/`` on held-out signals, in float64 but for the clock. *Tuned FISTA* has restarts and
  the best of five step sizes and an estimate, chosen on these very signals for each figure; its steps are counted to the
  network's mean objective, and, row by row, to 1e-6 above the optimum (relative), from zero and from the prediction. The optimum
  is FISTA's to 1e-10. A signal that is zero has the optimum 0 and is left out (said, how many).
* ``refinements``: what 16 steps of each kind are worth after 1,000 updates from the same network, trained here.
* ``dictionary``: what a dictionary of patches, trained here with its coder, is worth beside the cosines that it starts from.
* ``equilibrium``: the deep equilibrium classifier of ``checkpoints/deq_digits.ckpt``, and a learned start for its solver, which
  is trained here.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from amortized.contract import evaluate
from amortized.losses import FixedPointLoss
from amortized.networks import MLP
from amortized.problems import (
    ALISTA,
    LISTA,
    Classification,
    CosineDictionary,
    EquilibriumState,
    GaussianDictionary,
    Images,
    LabelledDigits,
    Patches,
    SparseCoding,
    SparseSignals,
)
from amortized.solvers import FISTA, Anderson, Solver

CHECKPOINTS = Path(__file__).parent.parent / "checkpoints"
STEP_SIZES = (1.0, 1.5, 2.0, 3.0, 4.0)
"""Of FISTA, in units of the safe one, tried beside the estimate; too long ones are halved, row by row."""
RATES = (0.002, 0.01)
"""Learning rates of ``refinements``, of which the better counts for each kind."""
NEVER = 100_000
Row = dict[str, Any]


def row(name: str, value: float, goal: str | None, holds: bool | None, detail: str) -> Row:
    verdict = "" if goal is None else f"  goal {goal}: {'holds' if holds else 'MISSED'}"
    print(f"{name:58s} {value:9.4g}{verdict}  {detail}", flush=True)
    return {"id": f"coding: {name}", "value": float(f"{value:.4g}"), "goal": goal, "holds": holds, "detail": detail}


def train(module: Any, data: Any, updates: int, lr: float) -> Any:
    """The module, after Adam with one-cycle rates."""
    optimizer = torch.optim.Adam([p for p in module.parameters() if p.requires_grad], lr)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, updates, pct_start=0.1)
    for k in range(updates):
        loss = module.amortized_step(data.batch("train", k)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rates.step()
    return module.eval()


def history(solver: Solver, problem: Any, a: Tensor, start: Tensor) -> Tensor:
    """The best values so far after each step, the start's first ``(K, B)``."""
    values = [evaluate(problem, start, a)]
    solver.solve(problem, a, start, trace=lambda n, b, value: values.append(value.clone()))
    return torch.stack(values)


def steps_to(values: Tensor, goal: Tensor) -> Tensor:
    """Steps until each column is at most its goal ``(B,)``."""
    hit = values <= goal
    return torch.where(hit.any(0), hit.int().argmax(0), NEVER).double()


def in_turn(calls: dict[str, Callable[[], Any]], turns: int) -> dict[str, float]:
    """Median seconds of each, taken in turn."""
    spent: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(turns):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            spent[name].append(time.perf_counter() - started)
    return {name: statistics.median(times) for name, times in spent.items()}


def rivals(problem: Any, steps: int, tol: float) -> dict[str, Solver]:
    """FISTA with each step size."""
    safe = float(1 / problem.dictionary.curvature())
    sized: dict[str, Solver] = {f"{x:g}/C": FISTA(steps, lr=x * safe, tol=tol) for x in STEP_SIZES}
    return {"estimate": FISTA(steps, tol=tol), **sized}


# ---- sparse codes


def codes(name: str, data: Any, goals: bool, turns: int) -> list[Row]:
    module = SparseCoding.load_from_checkpoint(CHECKPOINTS / f"{name}.ckpt").eval()
    exact, every = copy.deepcopy(module).double(), data.contexts("test")
    seen = every[every.abs().sum(1) > 0]
    a, zero = seen.double(), exact.initial(seen.double())
    with torch.no_grad():
        b = module(seen).double()
    mine = evaluate(exact, b, a)
    best = FISTA(20_000, tol=1e-10).solve(exact, a, zero)
    note = (
        f"{len(a)} held-out signals, {len(every) - len(a)} of zero left out; optimum {float(best.value.mean()):.5g}, "
    )
    note += f"solved {float(best.converged.double().mean()):.1%}, with {float((best.b != 0).double().sum(1).mean()):.1f} entries"
    gap = float((mine - best.value).mean() / best.value.mean())
    rows = [row(f"{name}, mean gap over the mean optimum", gap, None, None, note)]

    cold = {k: history(solver, exact, a, zero) for k, solver in rivals(exact, 3000, 1e-9).items()}
    means = {k: steps_to(v.mean(1, keepdim=True), mine.mean()[None]).item() for k, v in cold.items()}
    first = min(means, key=lambda k: means[k])
    detail = f"step size {first}; the network has {module.refine.steps} steps; without tuning {means['estimate']:.0f}"
    holds = means[first] >= 100 if goals else None
    rows.append(
        row(f"{name}, FISTA's steps to its mean objective", means[first], ">= 100" if goals else None, holds, detail)
    )

    goal = best.value * (1 + 1e-6)
    counts = {k: steps_to(v, goal) for k, v in cold.items()}
    tuned = min(counts, key=lambda k: float(counts[k].median()))
    warm = steps_to(history(rivals(exact, 3000, 1e-9)[tuned], exact, a, b), goal)
    medians = float(warm.median()), float(counts[tuned].median())
    detail = f"medians {medians[0]:.0f} from the prediction, {medians[1]:.0f} from zero (step size {tuned}); "
    detail += f"means {warm.mean():.0f} and {counts[tuned].mean():.0f}"
    ratio = medians[0] / medians[1]
    title = f"{name}, FISTA's steps to 1e-6, start predicted / zero"
    rows.append(row(title, ratio, "<= 0.2" if goals else None, ratio <= 0.2 if goals else None, detail))

    mixed = Anderson(3000, memory=5, tol=1e-9)
    found = [steps_to(history(mixed, exact, a, start), goal) for start in (b, zero)]
    detail = f"medians {found[0].median():.0f} and {found[1].median():.0f}; Anderson acceleration of ISTA, memory 5"
    title = f"{name}, Anderson's steps to 1e-6, start predicted / zero"
    rows.append(row(title, float(found[0].median() / found[1].median()), None, None, detail))

    steps = int(means[first])
    solver = rivals(module, steps, 0.0)[first]
    cold_start = module.initial(seen)

    def predict() -> None:
        with torch.no_grad():
            module(seen)

    times = in_turn({"network": predict, "FISTA": lambda: solver.solve(module, seen, cold_start)}, turns)
    detail = f"FISTA, {steps} steps {1e3 * times['FISTA']:.1f} ms; network {1e3 * times['network']:.2f} ms, float32, one batch"
    return [
        *rows,
        row(
            f"{name}, FISTA's time to its mean objective / its time",
            times["FISTA"] / times["network"],
            None,
            None,
            detail,
        ),
    ]


def all_codes(quick: bool) -> list[Row]:
    n, turns = (64, 3) if quick else (512, 7)
    small, large = GaussianDictionary(25, 50), GaussianDictionary(250, 500)
    return [
        *codes("lista", SparseSignals(small, num_test=n), not quick, turns),
        *codes("alista", SparseSignals(large, num_test=n // 4), not quick, turns),
        *codes("lista_patches", Patches(num_test=n // 2), False, turns),
    ]


def refinements(quick: bool) -> list[Row]:
    updates = 30 if quick else 1000
    D = GaussianDictionary(25, 50)
    data = SparseSignals(D, num_test=512)
    lr = float(1 / D.curvature())
    kinds: dict[str, Callable[[], Solver | None]] = {
        "none": lambda: None,
        "FISTA, learned step sizes": lambda: FISTA(16, lr=lr, learn_lr=True),
        "ALISTA without momentum": lambda: ALISTA(16, momentum=False),
        "ALISTA": lambda: ALISTA(16),
        "LISTA without momentum": lambda: LISTA(25, 50, 16, momentum=False),
        "LISTA": lambda: LISTA(25, 50, 16),
    }
    a = data.contexts("test").double()
    exact = SparseCoding(MLP(25, 50), copy.deepcopy(D)).double()
    best = FISTA(20_000, tol=1e-9).solve(exact, a, exact.initial(a)).value

    def gap(make: Callable[[], Solver | None], rate: float) -> float:
        torch.manual_seed(0)
        module = SparseCoding(MLP(25, 50, [256, 256]), copy.deepcopy(D), refine=make())
        module = train(module, data, updates, rate).double()
        with torch.no_grad():
            return float((evaluate(module, module(a), a) - best).mean() / best.mean())

    rows = []
    for name, make in kinds.items():
        gaps = {rate: gap(make, rate) for rate in RATES}
        rate = min(gaps, key=lambda r: gaps[r])
        rows.append(row(f"16 steps, {name}: gap", gaps[rate], None, None, f"{updates} updates, learning rate {rate:g}"))
    return rows


def dictionary(quick: bool) -> list[Row]:
    data = Patches(num_test=64 if quick else 256, batch_size=128)
    a, means = data.contexts("test").double(), {}
    for name, updates in {"cosines": 0, "learned": 20 if quick else 1500}.items():
        torch.manual_seed(0)
        network, layers = MLP(64, 144, [256]), LISTA(64, 144, 16)
        module = SparseCoding(network, CosineDictionary(learn=True), 0.02, refine=layers)
        module = (train(module, data, updates, 0.002) if updates else module).double()
        means[name] = float(FISTA(5000, tol=1e-7).solve(module, a, module.initial(a)).value.mean())
    detail = f"mean optimum over {len(a)} held-out patches: {means['learned']:.4g} and {means['cosines']:.4g}"
    return [row("dictionary of patches, learned / cosines", means["learned"] / means["cosines"], None, None, detail)]


# ---- fixed points


def picture(folder: Path) -> None:
    """The patches of ``docs/sparse_codes.md``."""
    module = SparseCoding.load_from_checkpoint(CHECKPOINTS / "lista_patches.ckpt").eval()
    a = Patches(num_test=6).contexts("test")
    with torch.no_grad():
        solutions = {"network": module(a), "solver": FISTA(5000, tol=1e-5).solve(module, a, module.initial(a)).b}
        module.draw(a, solutions).savefig(folder / "sparse_codes.png", dpi=80)


def equilibrium(quick: bool) -> list[Row]:
    module = Classification.load_from_checkpoint(CHECKPOINTS / "deq_digits.ckpt").eval()
    model: Any = module.network
    a = LabelledDigits().contexts("test")
    with torch.no_grad():
        right = float((module(a).argmax(1) == a.target.argmax(1)).double().mean())
    rows = [row("deep equilibrium, accuracy on the digits", right, None, None, f"{len(a.image)} held-out digits")]

    def applications(solver: Solver, start: Tensor) -> Tensor:
        found = solver.solve(model, a.image, start)
        assert found.converged.all()
        return found.iterations.double()

    zero, tol = model.initial(a.image), 1e-4
    plain, mixed = (applications(Anderson(1000, memory=m, tol=tol), zero) for m in (0, 5))
    detail = (
        f"mean applications of the map to a residual of 1e-4: {mixed.mean():.1f}, plain iteration {plain.mean():.1f}"
    )
    rows.append(row("deep equilibrium, Anderson / plain", float(mixed.mean() / plain.mean()), None, None, detail))

    torch.manual_seed(0)
    state = EquilibriumState(MLP(64, zero.shape[1], [256, 256]), copy.deepcopy(model), loss=FixedPointLoss(2))
    train(state, Images(binarise=False, batch_size=128), 20 if quick else 3000, 0.002)
    with torch.no_grad():
        start = state(a.image)
    warm = applications(Anderson(1000, memory=5, tol=tol), start)
    detail = f"means {warm.mean():.1f} and {mixed.mean():.1f} with Anderson; learned on the training digits alone"
    rows.append(row("deep equilibrium, start predicted / zero", float(warm.mean() / mixed.mean()), None, None, detail))
    return rows


PARTS: dict[str, Callable[[bool], list[Row]]] = {
    "codes": all_codes,
    "refinements": refinements,
    "dictionary": dictionary,
    "equilibrium": equilibrium,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--quick", action="store_true", help="fewer signals and updates: to see that it runs")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--pictures", type=Path, help="only draw the picture of the page, into this folder")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.pictures:
        return picture(options.pictures)
    rows: list[Row] = []
    for part in options.only:
        rows += PARTS[part](options.quick)
        if options.json:
            options.json.write_text(json.dumps({"rows": rows}, indent=2))


if __name__ == "__main__":
    main()
