"""Control: plans of networks against those of solvers, one run, one core.

``python -m benchmarks.control [--quick] --json FILE`` prints a table and writes ``{"rows": [{"id", "value", "goal", "holds",
"detail"}]}``. The networks are those of ``checkpoints/``; training is not counted.

*Double integrator* and *chain of masses*, 1,024 states each, those that have a plan. The optimum is ADMM's, to 1e-9; the rivals
are ADMM and those of ``benchmarks/programs.py``, in float64 (of those that are not installed one is told), timed in turn with the
network, which is in float32. *Swing-up* of a *pendulum* and a *cart-pole*, 64 states: the best known is the best of 16 starts of
L-BFGS around a rule, of 16 around the prediction, and of the prediction; all starts of all states are one batch. All clocks are
the wall's; medians of several turns.
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

from amortized.contract import violation
from amortized.module import AmortizedModule
from amortized.problems import ChainStates, DoubleIntegrator, IntegratorStates, MassChain, SwingUp, SystemStates
from amortized.problems.control import LinearControl, PlantStates, receding_horizon
from amortized.problems.control.closed_loop import planners
from amortized.solvers import ADMM, LBFGS, MultiStart, Solver
from amortized.solvers.multistart import Exploration
from benchmarks.programs import RIVALS, Family, in_turn

CHECKPOINTS = Path(__file__).parent.parent / "checkpoints"


def row(name: str, value: float, goal: str | None, holds: bool | None, detail: str) -> dict[str, Any]:
    verdict = "" if goal is None else f"  goal {goal}: {'holds' if holds else 'MISSED'}"
    print(f"{name:58s} {value:9.4g}{verdict}  {detail}", flush=True)
    return {"id": name, "value": value, "goal": goal, "holds": holds, "detail": detail}


def trained(kind: type[AmortizedModule], recipe: str) -> Any:
    return kind.load_from_checkpoint(CHECKPOINTS / f"{recipe}.ckpt").eval()


def clock(run: Callable[[], Any], turns: int) -> float:
    """Median seconds."""
    taken = []
    for _ in range(turns):
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def double_integrator(quick: bool, pictures: Path | None) -> list[dict[str, Any]]:
    module = trained(DoubleIntegrator, "mpc_double_integrator")
    return within_limits("double integrator", module, IntegratorStates, 2.0, quick, pictures)


def mass_chain(quick: bool, pictures: Path | None) -> list[dict[str, Any]]:
    return within_limits("chain of masses", trained(MassChain, "mpc_chain"), ChainStates, 1.5, quick, pictures)


@torch.no_grad()
def within_limits(
    name: str, module: LinearControl, states: type[PlantStates], wide: float, quick: bool, pictures: Path | None
) -> list[dict[str, Any]]:
    """Plans of a linear system: their gap and violation, also on ``wide`` times the range; their time; the closed loop."""
    exact = copy.deepcopy(module).double()
    solver = ADMM(tol=1e-9)
    rows = []
    for scale in (1.0, wide):
        a = states(scale=scale, num_test=128 if quick else 1024).contexts("test")
        found = solver.solve(exact, a.double(), exact.initial(a.double()))
        can = ~found.infeasible
        x = a[can]
        b = module(x)
        best, value = found.value[can], exact.objective(b.double(), x.double())
        off = violation(exact, b.double(), x.double())
        loss, broken = float((value - best).mean() / best.mean()), float(off.max())
        each = ((value - best) / best).quantile(torch.tensor([0.5, 0.95], dtype=torch.float64)).tolist()
        shown = f"{int((~can).sum())} of {len(a)} states have no plan; median of rows {each[0]:.1e}, 95 % below {each[1]:.1e}"
        kept = f"{float((off <= 1e-5).double().mean()):.1%} of {len(x)} rows within 1e-5"
        if scale > 1:
            rows.append(row(f"{name}, {wide:g} times the range: mean gap / optimum", loss, None, None, shown))
            rows.append(row(f"{name}, {wide:g} times the range: largest violation", broken, None, None, kept))
            continue
        if pictures is not None:
            solutions = {"network": b[:4], "solver": found.b[can][:4].float()}
            module.draw(x[:4], solutions).savefig(pictures / f"control_{name.split()[-1]}.png", dpi=110)
        rows.append(row(f"{name}: mean gap / mean optimum", loss, "<= 0.005", loss <= 0.005, shown))
        rows.append(row(f"{name}: largest violation", broken, "<= 1e-5", broken <= 1e-5, kept))
        rows += against_rivals(name, module, exact, x, quick)
        rows += loops(name, module, ADMM(tol=1e-7), x[:128], 40, 0.005)
    return rows


def against_rivals(
    name: str, module: LinearControl, exact: LinearControl, x: Tensor, quick: bool
) -> list[dict[str, Any]]:
    """The time of the network's plans beside that of the fastest solver's."""
    family = Family(exact, x.double(), exact.initial(x.double()))
    sides: dict[str, Callable[[], Any]] = {"network": lambda: module(x)}
    for rho in (0.1, 1.0, 10.0):
        sides[f"ADMM, rho {rho:g}"] = lambda rho=rho: ADMM(rho=rho, tol=1e-6).solve(exact, family.a, family.b)
    for rival, prepare in RIVALS.items():
        try:
            sides[rival] = prepare(family)
        except ModuleNotFoundError as error:
            print(f"{name}: {rival} is left out, {error.name} is not installed")
    for run in sides.values():
        run()
    taken = in_turn(sides, 3 if quick else 9, 8.0)
    mine = taken.pop("network")
    best = min(taken, key=lambda side: taken[side])
    detail = f"network {mine:.2f} ms for {len(x)}; " + ", ".join(f"{side} {ms:.1f}" for side, ms in taken.items())
    ratio = taken[best] / mine
    return [row(f"{name}: times faster than the best rival", ratio, ">= 10", ratio >= 10, f"{best}; {detail}")]


def loops(
    name: str, module: AmortizedModule, solver: Solver, x: Tensor, steps: int, goal: float | None
) -> list[dict[str, Any]]:
    """The closed loop of each planner, its cost relative to the solver's."""
    runs = {side: receding_horizon(module, planner, x, steps) for side, planner in planners(module, solver).items()}
    base, rows = float(runs["solver"].cost.mean()), []
    for side, run in runs.items():
        cost = float(run.cost.mean())
        detail = f"cost {cost:.4g}, violation {float(run.violation.max()):.1e}, {1e3 * run.seconds:.1f} ms a step for {len(x)}"
        excess, judged = cost / base - 1, side == "network" and goal is not None
        holds = excess <= goal if judged and goal is not None else None
        aim = f"<= {goal}" if judged else None
        rows.append(row(f"{name}, closed loop: {side}, cost over solver's", excess, aim, holds, detail))
    return rows


def pendulum(quick: bool, pictures: Path | None) -> list[dict[str, Any]]:
    return swing_up("pendulum", "pendulum_swingup", 0.05, quick, pictures)


def cart_pole(quick: bool, pictures: Path | None) -> list[dict[str, Any]]:
    return swing_up("cart-pole", "cartpole_swingup", None, quick, pictures)


@torch.no_grad()
def swing_up(name: str, recipe: str, goal: float | None, quick: bool, pictures: Path | None) -> list[dict[str, Any]]:
    """Paths through a model: their gap, also of a wider range; their time beside that of many starts; the closed loop."""
    module = trained(SwingUp, recipe)
    solver, rows = MultiStart(LBFGS(20 if quick else 150, tol=1e-3), 16), []
    torch.manual_seed(0)
    for scale in (1.0, 2.0):
        a = SystemStates(module.system, scale=scale, num_test=8 if quick else 64).contexts("test")
        b = module(a)
        value = module.objective(b, a)
        cold, spent = explored(module, solver, a)
        warm = solver.solve(module, a, b)
        best = torch.stack([value, cold.best.value, warm.value]).amin(0)
        loss = float((value - best).mean() / best.mean())
        lost = float((value < cold.values[:, 0]).double().mean())
        shown = (
            f"network {float(value.mean()):.4g}, best known {float(best.mean()):.4g}, "
            f"16 starts {float(cold.best.value.mean()):.4g}, "
            f"one start {float(cold.values[:, 0].mean()):.4g} (loses to the network on {lost:.0%}); "
            f"median of rows {float((value - best).median()):.3g}, 95 % below {float((value - best).quantile(0.95)):.3g}"
        )
        if scale > 1:
            rows.append(row(f"{name}, twice the range: mean gap / best known", loss, None, None, shown))
            continue
        if pictures is not None:
            solutions = {"network": b[:4], "16 starts": cold.best.b[:4]}
            module.draw(a[:4], solutions).savefig(pictures / f"control_{name}.png", dpi=110)
        aim = None if goal is None else f"<= {goal}"
        rows.append(row(f"{name}: mean gap / best known", loss, aim, None if goal is None else loss <= goal, shown))
        mine = clock(lambda a=a: module(a), 3 if quick else 9)
        ratio, detail = spent / mine, f"{1e3 * mine:.1f} ms and {1e3 * spent:.0f} ms for {len(a)} states"
        rows.append(row(f"{name}: times faster than 16 starts", ratio, ">= 1000", ratio >= 1000, detail))
        rows.append(at_equal_quality(name, module, a, float(value.mean()), mine, quick))
        rows.append(alone(name, module, solver, a[:1], quick))
        rows += loops(name, module, LBFGS(10), a[:32], 10 if quick else 60, None)
    return rows


def explored(module: SwingUp, solver: MultiStart, a: Tensor) -> tuple[Exploration, float]:
    """All starts, and their seconds."""
    started = time.perf_counter()
    found = solver.explore(module, a, module.initial(a))
    return found, time.perf_counter() - started


def at_equal_quality(
    name: str, module: SwingUp, a: Tensor, value: float, seconds: float, quick: bool
) -> dict[str, Any]:
    """As many starts as it takes for their best to cost no more than the network's plans: of 128, mean of 200 orders."""
    many = 16 if quick else 128
    found, spent = explored(module, MultiStart(LBFGS(20 if quick else 150, tol=1e-3), many), a)
    orders = torch.rand(200, many).argsort(1)
    means = found.values[:, orders].cummin(2).values.mean((0, 1))
    enough = int((means > value).sum()) + 1
    share = min(enough, many) / many
    told = f"{enough} starts" if enough <= many else f"more than {many} starts, whose best cost {float(means[-1]):.4g},"
    detail = f"{told} against {value:.4g}; {1e3 * spent * share:.0f} ms and {1e3 * seconds:.1f} ms for {len(a)} states"
    return row(f"{name}: times faster than starts enough", spent * share / seconds, None, None, detail)


def alone(name: str, module: SwingUp, solver: MultiStart, a: Tensor, quick: bool) -> dict[str, Any]:
    """One state at a time, as a controller has them."""
    module(a)
    mine, spent = clock(lambda: module(a), 3 if quick else 9), explored(module, solver, a)[1]
    detail = f"{1e3 * mine:.1f} ms and {1e3 * spent:.0f} ms"
    return row(f"{name}: times faster than 16 starts, one state", spent / mine, None, None, detail)


PARTS = (double_integrator, mass_chain, pendulum, cart_pole)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="an eighth of the states, fewer turns and steps")
    parser.add_argument("--only", choices=[part.__name__ for part in PARTS], help="one of them")
    parser.add_argument("--pictures", type=Path, help="folder for a picture of each, as in docs/")
    parser.add_argument("--json", type=Path, required=True, help="file for the rows")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for part in PARTS:
        if options.only in (None, part.__name__):
            rows += part(options.quick, options.pictures)
            options.json.write_text(json.dumps({"rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
