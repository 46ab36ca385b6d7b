"""What the gap monitor costs beside the two solver runs that it is made of.

``python -m benchmarks.gap [--quick] [--only RECIPE ...] [--json FILE]``

``GapMonitor`` in a validation of 1,024 contexts, 20 variables each, against L-BFGS run alone from the same cold starts
and the same predictions of the network, in the same batches. Both sides warm, one after the other in turn, one thread.
The value is the median over the turns of monitored / alone, the time of a validation without the monitor taken off.

And what it takes of each shipped recipe's training, as it is by default: the whole fit by the clock, validations and
checkpoints included, the test after it (with its budget plot) left out; in it the seconds within the monitor's hooks,
by a clock around them that is not the monitor's own. ``--quick`` makes a tenth of the steps, between validations too.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import logging
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import yaml
from lightning import Trainer
from torch import Tensor

from amortized import AmortizedModule, ContextDataModule
from amortized.callbacks import GapMonitor
from amortized.cli import app as cli
from amortized.cli.recipes import recipes
from amortized.networks import MLP
from amortized.solvers import LBFGS

DIM, CONTEXTS = 20, 1024


class Rosenbrock(AmortizedModule):
    """Shifted Rosenbrock functions."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(MLP(DIM, DIM, [128, 128]))

    def objective(self, b: Tensor, a: Tensor) -> Tensor:
        """``L(b; a)``."""
        return (10 * (b[:, 1::2] - b[:, 0::2] ** 2) ** 2 + (a[:, 0::2] - b[:, 0::2]) ** 2).sum(1)


class Gaussians(ContextDataModule):
    """``a ~ N(0, I)``."""

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """A batch."""
        return torch.randn(n, DIM, generator=generator, device=generator.device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--quick", action="store_true", help="three turns; a tenth of the steps")
    parser.add_argument("--only", nargs="+", choices=recipes(), metavar="RECIPE", help="the shares of these recipes")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    measurements: list[Callable[[], dict[str, Any]]] = [
        *(lambda size=size: measure(size, 3 if options.quick else 7) for size in (() if options.only else (1024, 256))),  # type: ignore[misc]
        *(lambda name=name: share(name, options.quick) for name in options.only or recipes()),  # type: ignore[misc]
    ]
    rows = []
    for measurement in measurements:
        rows.append(row := measurement())
        verdict = "holds" if row["holds"] else "MISSED"
        print(f"{row['id']:46s} {row['value']:.3f}  goal {row['goal']}: {verdict}  {row['detail']}", flush=True)
        if options.json:
            options.json.write_text(json.dumps({"rows": rows}, indent=2))


def measure(size: int, turns: int) -> dict[str, Any]:
    """Batches of ``size`` contexts."""
    module, solver, data = Rosenbrock().eval(), LBFGS(), Gaussians(num_val=CONTEXTS, eval_batch_size=size)
    monitor = GapMonitor(solver)
    batches = [data.batch("val", number) for number in range(data.num_batches("val"))]
    with torch.no_grad():
        problems = [(a, (module.initial(a), module(a))) for a in batches]
    off = ("logger", "enable_progress_bar", "enable_checkpointing", "enable_model_summary", "use_distributed_sampler")
    trainers = [
        Trainer(accelerator="cpu", callbacks=callbacks, **dict.fromkeys(off, False)) for callbacks in ([monitor], [])
    ]

    def alone() -> None:
        for a, starts in problems:
            found.extend(solver.solve(module, a, start) for start in starts)

    def seconds(run: Any) -> float:
        started = time.perf_counter()
        with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
            run()
        return time.perf_counter() - started

    times = []
    for _ in range(turns + 1):
        found: list[Any] = []
        monitored, plain = (seconds(lambda t=t: t.validate(module, data, verbose=False)) for t in trainers)
        times.append((seconds(alone), monitored, plain))
    times = times[1:]
    ratios = sorted((monitored - plain) / solvers for solvers, monitored, plain in times)
    whole = statistics.median(monitored / (solvers + plain) for solvers, monitored, plain in times)
    converged = torch.cat([solution.converged for solution in found]).float().mean()
    value, result = statistics.median(ratios), monitor.results
    words = f"{turns} turns, {ratios[0]:.3f} to {ratios[-1]:.3f}; against validation without + solvers {whole:.3f}"
    rows = f"solver runs converged {converged:.1%}, lost {result['lost']:.1%} of {result['total']:.0f} contexts"
    name = f"gap monitor: 1,024 contexts in batches of {size}"
    return {"id": name, "value": round(value, 4), "goal": 1.05, "holds": value <= 1.05, "detail": f"{words}; {rows}"}


def share(name: str, quick: bool) -> dict[str, Any]:
    """Of the time of a recipe's training, what its gap takes."""
    trainer = yaml.safe_load(recipes()[name].read_text())["trainer"]
    steps, every = (trainer[key] // (10 if quick else 1) for key in ("max_steps", "val_check_interval"))
    spent = {"fit": 0.0, "gap": 0.0}

    def clocked(what: str, run: Any) -> Any:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return run(*args, **kwargs)
            finally:
                spent[what] += time.perf_counter() - started

        return wrapper

    hooks = [f"on_validation_{at}" for at in ("epoch_start", "batch_end", "epoch_end")]
    with contextlib.ExitStack() as stack, tempfile.TemporaryDirectory() as folder:
        for owner, method, what in [
            (cli.AmortizedCLI, "_run_subcommand", "fit"),
            *((GapMonitor, hook, "gap") for hook in hooks),
        ]:
            stack.enter_context(mock.patch.object(owner, method, clocked(what, getattr(owner, method))))
        stack.enter_context(mock.patch.object(cli.AmortizedCLI, "after_fit"))
        options = (
            f"--trainer.max_steps={steps} --trainer.val_check_interval={every} --trainer.enable_progress_bar=false"
        )
        cli.main(["fit", "-c", name, f"--run_folder={folder}/run", *options.split()])
        lines = csv.DictReader(Path(folder, "run", "metrics.csv").read_text().splitlines())
        solved = [f"{float(line['val/gap/total'] or 0):.0f}" for line in lines if line["val/objective"]]
    value = spent["gap"] / spent["fit"]
    detail = (
        f"{spent['gap']:.2f} s of {spent['fit']:.1f} s, {steps} steps; contexts at each validation: {', '.join(solved)}"
    )
    return {"id": f"gap of {name}: share of its training", "value": round(value, 4), "goal": 0.05,
            "holds": value <= 0.05, "detail": detail}  # fmt: skip


if __name__ == "__main__":
    main()
