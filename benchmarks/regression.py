"""Learning from solutions or from the objective: the same network, both ways and in between, and who is ahead when.

``python -m benchmarks.regression [--quick] [--json FILE] [--picture FILE]``

Four ways to train one network on a problem: *regression* to solutions of contexts that were solved before, the *objective* at the
prediction, regression for the first half of the updates *then* the objective, and the sum of *both*. All have the same
network, start, optimizer, learning rates and batch size; what needs no solutions draws contexts without end where the problem
has them. Every budget of updates is a run of its own, with a whole schedule (one cycle), so no run is judged in its middle. The
four take turns, block by block, in one process and one thread; seconds are of updates alone, and where there are solutions of
solving as many contexts as the run saw. A gap is the mean over test contexts that no side has seen, against the best that the
solver finds cold and from any of the four predictions.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from amortized import AmortizedModule, ContextDataModule, Loss, ObjectiveLoss, RegressionLoss
from amortized.contract import Context, concatenate, evaluate, take
from amortized.losses import Angle, Distance, Euclidean, SumLoss
from amortized.networks import MLP, ResidualMLP, SetTransformer
from amortized.problems import ConvexDC3, DC3Contexts, Sphere, SphereContexts
from amortized.shipping.solutions import SolveOnce
from amortized.solvers import ADMM, FISTA, LBFGS, Gauge, Solver

WAYS = {
    "regression": "regression",
    "objective": "objective",
    "first": "regression, then objective",
    "both": "both at once",
}
BUDGETS, QUICK = (75, 225, 675, 2025), (20, 60)
BLOCK = 20
"""Updates of one side before the next has its turn."""
BATCH, TEST = 128, 512


class Case(NamedTuple):
    """A problem, and how all four sides train on it."""

    make: Callable[[], AmortizedModule]
    data: Callable[..., ContextDataModule]
    solver: Solver
    """Of the solutions to learn from."""
    reference: Solver
    """Of the gap."""
    distance: Distance
    contexts: int | None
    """Solved; ``None``: all there are."""
    weight: float
    """Of regression in the sum."""
    lr: float
    unit: str


def sphere() -> Case:
    return Case(
        lambda: Sphere(SetTransformer(["centres", "offsets"], 4, 3, features=48)),
        lambda **more: SphereContexts(batch_size=BATCH, num_test=TEST, **more),
        LBFGS(200),
        LBFGS(200),
        Angle(length=1),
        32768,
        1.0,
        4e-3,
        "where lowest values differ by 0.14",
    )


def dc3() -> Case:
    return Case(
        lambda: ConvexDC3(ResidualMLP(50, 100, [100, 100]), refine=Gauge()),
        lambda **more: DC3Contexts(batch_size=BATCH, num_test=TEST, **more),
        ADMM(tol=1e-7),
        ADMM(tol=1e-7),
        Euclidean(),
        None,
        100.0,
        3e-3,
        "of a mean optimum of -15.05",
    )


def lasso() -> Case:
    from amortized.problems.coding import GaussianDictionary, SparseCoding, SparseSignals

    return Case(
        lambda: SparseCoding(MLP(25, 50, [256, 256]), GaussianDictionary(25, 50), weight=0.005),
        lambda **more: SparseSignals(GaussianDictionary(25, 50), batch_size=BATCH, num_test=TEST, **more),
        FISTA(steps=2000, tol=1e-4),
        FISTA(steps=5000, tol=1e-5),
        Euclidean(),
        16384,
        1.0,
        3e-3,
        "of a mean optimum of 0.020",
    )


CASES = {"sphere": sphere, "DC3 convex": dc3, "lasso 25 x 50": lasso}


class Run:
    """One side at one budget."""

    def __init__(self, way: str, case: Case, start: AmortizedModule, folder: Path, updates: int) -> None:
        self.module, self.updates, self.seconds, self.done = copy.deepcopy(start).train(), updates, 0.0, 0
        regression: Loss = RegressionLoss(distance=case.distance)
        solved, free = case.data(solutions=str(folder)), case.data()
        half = updates // 2
        self.phases: list[tuple[int, Loss, ContextDataModule]] = {
            "regression": [(updates, regression, solved)],
            "objective": [(updates, ObjectiveLoss(), free)],
            "first": [(half, regression, solved), (updates, ObjectiveLoss(), free)],
            "both": [(updates, SumLoss([ObjectiveLoss(), regression], [1.0, case.weight]), solved)],
        }[way]
        self.learned = {"regression": updates, "objective": 0, "first": half, "both": updates}[way]
        """Updates on contexts that had to be solved."""
        self.optimizer = torch.optim.Adam(self.module.parameters(), case.lr)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, case.lr, total_steps=updates, pct_start=0.1)
        for _, _, data in self.phases:
            data.batch("train", 0)  # opened outside the clock

    def block(self) -> None:
        """The next few updates, on the clock."""
        started = time.perf_counter()
        for number in range(self.done, min(self.done + BLOCK, self.updates)):
            _, self.module.loss, data = next(phase for phase in self.phases if number < phase[0])
            loss = self.module.amortized_step(data.batch("train", number)).mean()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.schedule.step()
        self.done = min(self.done + BLOCK, self.updates)
        self.seconds += time.perf_counter() - started


class Found(NamedTuple):
    """Of one side at one budget."""

    case: str
    way: str
    updates: int
    gap: float
    stderr: float
    training: float
    """Seconds of updates."""
    solving: float
    """Seconds of solving what the run saw."""

    @property
    def seconds(self) -> float:
        return self.training + self.solving


def measure(name: str, case: Case, budgets: tuple[int, ...], folder: Path, seed: int = 0) -> list[Found]:
    """All sides at all budgets; the seed is of the network."""
    torch.manual_seed(seed)
    start, data = case.make(), case.data()
    started = time.perf_counter()
    SolveOnce(str(folder), case.contexts, case.solver).make(start, data)
    solving = time.perf_counter() - started
    solved = json.loads((folder / "summary.json").read_text())["contexts"]
    print(f"{name}: {solved:,} contexts solved in {solving:.1f} s", flush=True)
    runs: list[tuple[str, Run]] = []
    for updates in budgets:
        sides = [(way, Run(way, case, start, folder, updates)) for way in WAYS]
        while any(run.done < updates for _, run in sides):
            for _, run in sides:
                run.block()
        runs += sides
    a = take(concatenate([data.batch("test", k) for k in range(data.num_batches("test"))]), slice(0, TEST))
    values = [predicted(run.module, a) for _, run in runs]
    last = [run.module(a).detach() for _, run in runs[-len(WAYS) :]]
    starts = [start.initial(a), *last]
    best = torch.stack([case.reference.solve(start, a, b).value for b in starts]).amin(0)
    return [
        Found(
            name,
            way,
            run.updates,
            float((value - best).mean()),
            float((value - best).std() / len(best) ** 0.5),
            run.seconds,
            solving * min(1.0, run.learned * data.batch_size / solved),
        )
        for (way, run), value in zip(runs, values, strict=True)
    ]


def predicted(module: AmortizedModule, a: Context) -> Tensor:
    """The objective at the predictions ``(B,)``."""
    module.eval()
    with torch.no_grad():
        return evaluate(module, module(a), a)


def rows_of(found: list[Found], case: Case) -> list[dict[str, Any]]:
    """A line for each side at each budget, and who is ahead."""
    rows = [
        row(
            f"{one.case}, {one.updates} updates, {WAYS[one.way]}: gap",
            one.gap,
            f"± {one.stderr:.2g}, {case.unit}; {one.training:.1f} s of training, {one.solving:.1f} s of solving",
        )
        for one in found
    ]
    for updates in dict.fromkeys(one.updates for one in found):
        sides = {one.way: one for one in found if one.updates == updates}
        ratio = sides["regression"].gap / sides["objective"].gap
        ahead = min(sides.values(), key=lambda one: one.gap)
        detail = f"above 1 the objective is ahead of regression; ahead of all: {WAYS[ahead.way]}"
        rows.append(
            row(f"{sides['first'].case}, {updates} updates: regression's gap over the objective's", ratio, detail)
        )
    return rows


def row(name: str, value: float, detail: str) -> dict[str, Any]:
    return {"id": f"regression: {name}", "value": float(f"{value:.4g}"), "goal": None, "holds": None, "detail": detail}


def table(found: list[Found]) -> str:
    """Gaps and seconds, a line for each problem and budget; the smallest gap of each has a star."""
    lines = [f"{'problem':14s} {'updates':>7s}  " + "  ".join(f"{words:>27s}" for words in WAYS.values())]
    for case, updates in dict.fromkeys((one.case, one.updates) for one in found):
        sides = {one.way: one for one in found if (one.case, one.updates) == (case, updates)}
        ahead = min(sides, key=lambda way: sides[way].gap)
        cells = [
            f"{side.gap:.3g}{'*' if way == ahead else ' '} in {side.training:5.1f} + {side.solving:4.1f} s"
            for way, side in ((way, sides[way]) for way in WAYS)
        ]
        lines.append(f"{case:14s} {updates:7d}  " + "  ".join(f"{cell:>27s}" for cell in cells))
    return "\n".join(lines)


def draw(found: list[Found], path: Path) -> None:
    """Gap against updates above, against seconds with solving below."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullLocator

    cases = list(dict.fromkeys(one.case for one in found))
    figure = Figure(figsize=(3.4 * len(cases), 5.6), layout="constrained")
    grid = figure.subplots(2, len(cases), sharey="col", squeeze=False)
    for column, case in enumerate(cases):
        for at, (axis, label) in enumerate((("updates", "updates"), ("seconds", "seconds, solving included"))):
            axes = grid[at][column]
            for way, marker in zip(WAYS, "os^D", strict=True):
                points = [one for one in found if (one.case, one.way) == (case, way)]
                axes.plot(
                    [getattr(p, axis) for p in points], [p.gap for p in points], marker=marker, ms=4, label=WAYS[way]
                )
            axes.set(xscale="log", yscale="log", xlabel=label)
            for scale in (axes.xaxis, axes.yaxis):
                scale.set_major_locator(LogLocator(subs=(1, 2, 5)))
                scale.set_major_formatter(FormatStrFormatter("%g"))
                scale.set_minor_locator(NullLocator())
        grid[0][column].set_title(case)
        grid[0][0].set_ylabel("amortization gap"), grid[1][0].set_ylabel("amortization gap")
    figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="Two short budgets.")
    parser.add_argument("--case", choices=[name.split()[0] for name in CASES], help="One problem alone.")
    parser.add_argument("--seed", type=int, default=0, help="Of the network's start.")
    parser.add_argument("--json", type=Path, help="Where the rows go.")
    parser.add_argument("--picture", type=Path, help="Where the picture goes.")
    given = parser.parse_args()
    torch.set_num_threads(1)
    found: list[Found] = []
    rows: list[dict[str, Any]] = []
    for name, make in CASES.items():
        if given.case in (None, name.split()[0]):
            with tempfile.TemporaryDirectory() as folder:
                mine = measure(name, make(), QUICK if given.quick else BUDGETS, Path(folder, "solutions"), given.seed)
            found += mine
            rows += rows_of(mine, make())
    print(table(found))
    if given.picture:
        draw(found, given.picture)
    if given.json:
        given.json.write_text(json.dumps({"rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
