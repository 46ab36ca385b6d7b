"""Neural posterior estimation against reference posteriors: the benchmark of Lueckmann et al. (2021).

``python -m benchmarks.simulation [--quick] [--only TASK] [--budget KIND] [--observations N] [--picture FILE] [--json FILE]``

For each of the ten published observations, 10,000 draws of ``amortized predict`` are compared with the published draws of the
true posterior by C2ST: 0.5 where no classifier tells them apart. Of each recipe

* ``endless``: the reference checkpoint in ``checkpoints/``, which the recipe trained to on simulations without end;
* ``finite``: the recipe trained here on 100,000 simulations, of which 4,096 choose the best step, into ``--runs``, where a
  later call finds it again.

The references are read from the wheel of sbibm (``pip install --no-deps sbibm``: what it depends on is not needed). One thread.

Goals: with 100,000 simulations what sbi's NPE has there (two_moons .542, gaussian_linear .506, slcp .831; the results that
come with the paper); without end .51, .51 and .70. ``calibration`` is the larger of the deviations of ranks and of TARP coverage
on 2,048 simulations, its goal their 99 % band.
"""

from __future__ import annotations

import argparse
import bz2
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure

from amortized.cli.app import main as command
from amortized.problems.simulation.diagnostics import c2st

VALIDATION = 4096
CHECKPOINTS = Path(__file__).parent.parent / "checkpoints"
TESTS = ("--data.num_test=2048", "--data.draws=0")
QUIET = ("--budget.enabled=false", "--trainer.enable_progress_bar=false", "--gap.solver.steps=5")
STEPS = {"two_moons": 12_000, "gaussian_linear": 3000, "slcp": 7000}
"""Of training on 100,000 simulations."""


class Task(NamedTuple):
    """A recipe, the shape of an observation in the files, and the goals."""

    shape: tuple[int, ...]
    endless: float | None
    finite: float | None
    transposed: bool = False
    log: bool = False


TASKS = {
    "two_moons": Task((2,), 0.51, 0.542),
    "gaussian_linear": Task((10,), 0.51, 0.506),
    "slcp": Task((4, 2), 0.70, 0.831),
    "lotka_volterra": Task((2, 10), None, None, transposed=True, log=True),
}


def references(name: str, task: Task, number: int) -> tuple[np.ndarray, torch.Tensor]:
    """Observation ``number`` of a task, as the recipe has it, and 10,000 draws of its posterior."""
    found = importlib.util.find_spec("sbibm")
    if found is None or not found.submodule_search_locations:
        raise SystemExit("the reference posteriors are in sbibm's wheel: pip install --no-deps sbibm")
    folder = Path(found.submodule_search_locations[0]) / "tasks" / name / "files" / f"num_observation_{number}"
    x = np.loadtxt(folder / "observation.csv", delimiter=",", skiprows=1).reshape(task.shape)
    x = np.log(x.T if task.transposed else x) if task.log else x
    with bz2.open(folder / "reference_posterior_samples.csv.bz2", "rt") as file:
        return x.astype(np.float32), torch.from_numpy(np.loadtxt(file, delimiter=",", skiprows=1)).float()


def tested(name: str, runs: Path) -> tuple[Path, Path]:
    """A run's folder with the results of the reference checkpoint, and that checkpoint."""
    path = CHECKPOINTS / f"{name}.ckpt"
    folder = runs / f"{name}_endless"
    if not (folder / "results.json").exists():
        command(["test", "-c", name, f"--ckpt_path={path}", f"--run_folder={folder}", *TESTS, *QUIET])
    return folder, path


def trained(name: str, runs: Path, quick: bool) -> tuple[Path, Path]:
    """The folder of the recipe's run on 100,000 simulations, made once, and its best checkpoint."""
    folder = runs / "_".join([name, "100000", *(["quick"] if quick else [])])
    if not (folder / "results.json").exists():
        # Nothing but simulations: the best step is not chosen by draws of true posteriors either.
        options = [f"--data.simulations={100_000 - VALIDATION}", f"--data.num_val={VALIDATION}", "--data.draws=0"]
        steps = 100 if quick else STEPS[name]
        options += [f"--trainer.max_steps={steps}", f"--model.scheduler.total_steps={steps}", "--gap.max_fraction=0"]
        options += [f"--trainer.val_check_interval={steps // 10}", "--model.optimizer.weight_decay=0.01"]
        options += ["--data.num_test=64"]
        command(["fit", "-c", name, f"--run_folder={folder}", *options, *QUIET])
        best = folder / "checkpoints" / "best.ckpt"
        config = folder / "config.yaml"
        command(["test", "-c", str(config), f"--ckpt_path={best}", f"--run_folder={folder}", *TESTS, *QUIET])
    return folder, folder / "checkpoints" / "best.ckpt"


def drawn(name: str, folder: Path, path: Path, x: list[np.ndarray], n: int) -> torch.Tensor:
    """``(observations, n, d)`` draws, by the command line."""
    np.savez(folder / "observations.npz", x=np.stack(x))
    command([
        "predict", "-c", name, f"--ckpt_path={path}", f"--data.predict={folder / 'observations.npz'}", f"--model.draws={n}",
        f"--run_folder={folder / 'predictions'}", *QUIET,
    ])  # fmt: skip
    with np.load(folder / "predictions" / "predictions.npz") as file:
        return torch.from_numpy(file["decoded.draws"])


def measure(name: str, finite: bool, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    task, n = TASKS[name], 500 if options.quick else 10_000
    folder, path = trained(name, options.runs, options.quick) if finite else tested(name, options.runs)
    pairs = [references(name, task, number) for number in range(1, 1 + (2 if options.quick else options.observations))]
    draws = drawn(name, folder, path, [x for x, _ in pairs], n)
    if options.picture and not finite:
        picture([truth for _, truth in pairs], list(draws)).savefig(options.picture, dpi=120)
    scores = [c2st(truth[:n], own) for (_, truth), own in zip(pairs, draws, strict=True)]
    label = f"{name}, {'100,000 simulations' if finite else 'simulations without end'}"
    value, goal = float(np.mean(scores)), task.finite if finite else task.endless
    detail = f"C2ST of {len(scores)} observations: {', '.join(f'{s:.3f}' for s in scores)}"
    yield row(label, value, goal, None if goal is None else value <= goal, detail)
    found = json.loads((folder / "results.json").read_text())["diagnostics"]
    far = max(found["sbc"], found["tarp"])
    detail = (
        f"ranks {found['sbc']:.3f}, TARP {found['tarp']:.3f}; {found['contexts']} simulations, {found['draws']} draws"
    )
    yield row(f"{label}: calibration", far, round(found["band"], 4), far <= found["band"], detail)


def picture(truth: list[torch.Tensor], draws: list[torch.Tensor], few: int = 2000) -> Figure:
    """The first two parameters of the first four observations: published draws, and the network's."""
    figure = Figure(figsize=(9, 4.7), layout="constrained")
    grid = figure.subplots(2, min(4, len(truth)), squeeze=False)
    for column, (sample, own) in enumerate(zip(truth[:4], draws[:4], strict=True)):
        for axes, name, points, color in zip(
            grid[:, column], ("reference", "network"), (sample, own), ("#6b7280", "#1f4e8c"), strict=True
        ):
            axes.scatter(points[:few, 0], points[:few, 1], s=1.5, linewidths=0, color=color)
            low, high = sample[:, :2].amin(0), sample[:, :2].amax(0)
            edge = 0.1 * (high - low)
            (left, bottom), (right, top) = (low - edge).tolist(), (high + edge).tolist()
            axes.set(xlim=(left, right), ylim=(bottom, top))
            axes.tick_params(labelsize=7)
            if column == 0:
                axes.set_ylabel(name)
        grid[0, column].set_title(f"observation {column + 1}", fontsize=9)
    return figure


def row(identity: str, value: float, goal: float | None, holds: bool | None, detail: str) -> dict[str, Any]:
    return {"id": identity, "value": round(value, 4), "goal": goal, "holds": holds, "detail": detail}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument(
        "--quick", action="store_true", help="100 steps, two observations, 500 draws: to see that it runs"
    )
    parser.add_argument("--only", choices=TASKS, nargs="*", help="tasks; all by default")
    parser.add_argument("--budget", choices=("endless", "finite"), help="one of the two budgets; both by default")
    parser.add_argument("--observations", type=int, default=10, help="of the ten of each task, the first so many")
    parser.add_argument("--picture", type=Path, help="where to draw the reference posteriors and those of --only TASK")
    parser.add_argument("--runs", type=Path, default=Path("runs/benchmark_simulation"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name in options.only or TASKS:
        for budget in [options.budget] if options.budget else ("endless", "finite"):
            if budget == "finite" and TASKS[name].finite is None:
                continue
            for found in measure(name, budget == "finite", options):
                rows.append(found)
                verdict = (
                    ""
                    if found["goal"] is None
                    else f"  goal {found['goal']}: {'holds' if found['holds'] else 'MISSED'}"
                )
                print(f"{found['id']:50s} {found['value']:.3f}{verdict}  {found['detail']}", flush=True)
                if options.json:
                    options.json.write_text(json.dumps({"rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
