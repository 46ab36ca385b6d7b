"""Neural posterior estimation against reference posteriors: the benchmark of Lueckmann et al. (2021).

``python -m benchmarks.simulation [--quick] [--only TASK] [--runs FOLDER] [--json FILE]``

Trains the shipped recipes, once with simulations without end and once with 100,000 (of which 4,096 validate), into
``--runs``, where a later call finds them again. Then 10,000 draws of ``amortized predict`` for each of the ten published
observations are compared with the published draws by C2ST: 0.5 where no classifier tells them apart. The references are read
from the wheel of sbibm (``pip install --no-deps sbibm``: what it depends on is not needed). One thread.

Goals: with 100,000 simulations what sbi's NPE has there (two_moons .542, gaussian_linear .506, slcp .831; the results that
come with the paper); without end .51, .51 and .70. ``calibration`` is the larger of the deviations of ranks and of TARP coverage
on the recipe's test simulations, its goal their 99 % band.
"""

from __future__ import annotations

import argparse
import bz2
import importlib.util
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml

from amortized.cli import main as command
from amortized.cli import recipes
from amortized.problems.simulation.diagnostics import c2st

VALIDATION = 4096


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


def trained(name: str, finite: bool, runs: Path, quick: bool) -> tuple[Path, float]:
    """The folder of the recipe's run, made once, and the minutes that took."""
    folder = runs / "_".join([name, "100000" if finite else "endless", *(["quick"] if quick else [])])
    minutes = folder / "minutes"
    if not minutes.exists():
        options = []
        if (
            finite
        ):  # nothing but simulations: without draws of the true posterior the best step is chosen on simulations too
            options += [f"--data.simulations={100_000 - VALIDATION}", f"--data.num_val={VALIDATION}", "--data.draws=0"]
            options += ["--trainer.val_check_interval=500", "--gap.max_fraction=0"]
        if quick:
            options += ["--trainer.max_steps=100", "--trainer.val_check_interval=100", "--data.num_test=64"]
        started = time.perf_counter()
        command([
            "fit", "-c", name, f"--run_folder={folder}", "--budget.enabled=false", "--gap.solver.steps=5",
            "--trainer.enable_progress_bar=false", *options,
        ])  # fmt: skip
        minutes.write_text(f"{(time.perf_counter() - started) / 60:.1f}")
    return folder, float(minutes.read_text())


def drawn(name: str, folder: Path, finite: bool, x: list[np.ndarray], n: int) -> torch.Tensor:
    """``(observations, n, d)`` draws, by the command line."""
    np.savez(folder / "observations.npz", x=np.stack(x))
    best = folder / "checkpoints" / "best.ckpt"
    command([
        "predict", "-c", str(folder / "config.yaml"), f"--ckpt_path={best if finite else folder}",
        f"--data.predict={folder / 'observations.npz'}", f"--model.draws={n}", f"--run_folder={folder / 'predictions'}",
        "--trainer.enable_progress_bar=false",
    ])  # fmt: skip
    with np.load(folder / "predictions" / "predictions.npz") as file:
        return torch.from_numpy(file["decoded.draws"])


def measure(name: str, finite: bool, runs: Path, quick: bool) -> Iterator[dict[str, Any]]:
    task = TASKS[name]
    folder, minutes = trained(name, finite, runs, quick)
    pairs = [references(name, task, number) for number in range(1, 3 if quick else 11)]
    n = 500 if quick else 10_000
    draws = drawn(name, folder, finite, [x for x, _ in pairs], n)
    scores = [c2st(truth[:n], own) for (_, truth), own in zip(pairs, draws, strict=True)]
    steps = yaml.safe_load(recipes()[name].read_text())["trainer"]["max_steps"]
    found = json.loads((folder / "results.json").read_text())["diagnostics"]
    label = f"{name}, {'100,000 simulations' if finite else 'simulations without end'}"
    detail = (
        f"C2ST of {len(scores)} observations: {', '.join(f'{s:.3f}' for s in scores)}; {steps if not quick else 100} steps, "
        f"{minutes:.1f} min of training and test"
    )
    value, goal = float(np.mean(scores)), task.finite if finite else task.endless
    yield row(label, value, goal, None if goal is None else value <= goal, detail)
    far = max(found["sbc"], found["tarp"])
    detail = (
        f"ranks {found['sbc']:.3f}, TARP {found['tarp']:.3f}; {found['contexts']} simulations, {found['draws']} draws"
    )
    yield row(f"{label}: calibration", far, found["band"], far <= found["band"], detail)


def row(identity: str, value: float, goal: float | None, holds: bool | None, detail: str) -> dict[str, Any]:
    return {"id": identity, "value": value, "goal": goal, "holds": holds, "detail": detail}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="100 steps, two observations: a test of the benchmark")
    parser.add_argument("--only", choices=TASKS)
    parser.add_argument("--runs", type=Path, default=Path("runs/benchmark_simulation"))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for name in [arguments.only] if arguments.only else TASKS:
        for finite in (True, False) if TASKS[name].finite else (False,):
            for line in measure(name, finite, arguments.runs, arguments.quick):
                rows.append(line)
                goal = (
                    ""
                    if line["goal"] is None
                    else f"  (at most {line['goal']:.3f}: {'yes' if line['holds'] else 'NO'})"
                )
                print(f"{line['id']:<58}{line['value']:.3f}{goal}\n    {line['detail']}", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps({"rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
