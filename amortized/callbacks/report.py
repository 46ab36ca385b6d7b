"""The end of a test: a table on the terminal, ``results.json``, pictures, and ``report.html``."""

from __future__ import annotations

import contextlib
import csv
import json
import math
import platform
import re
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from matplotlib.figure import Figure

from amortized.callbacks.budget import BudgetMonitor
from amortized.callbacks.gap import GapMonitor
from amortized.contract import take
from amortized.contract.faults import describe
from amortized.evaluation.advice import advice
from amortized.evaluation.budget import Budget
from amortized.evaluation.float64 import at_least_float32
from amortized.evaluation.gap import Cases
from amortized.evaluation.results import Results, SolverUsed, worst_rows
from amortized.loggers.wandb import attempt, log_results, log_worst
from amortized.module import AmortizedModule
from amortized.report.page import page
from amortized.report.pictures import draw_budget, draw_curves, draw_gap, draw_violation, histogram
from amortized.report.table import cards, lines, table, title
from amortized.solvers.structure import structure


@runtime_checkable
class Measurement(Protocol):
    """A callback that measures something of its own at a test, and has it in the report."""

    name: str
    """Key of its ``results`` in ``results.json``."""
    results: dict[str, Any]
    captions: dict[str, tuple[str, str]]
    """Heading and caption of each of its pictures, by name."""

    def lines(self) -> list[tuple[str, str]]:
        """Labels and values for the table."""
        ...

    def pictures(self) -> dict[str, Callable[[], Figure]]:
        """How to draw each, by the name of its file."""
        ...


class Report(Callback):
    """Prints the table and writes ``results.json``, ``pictures/*.png`` and ``report.html`` at the end of a test.

    Args:
        name: of the run, for the title.
        gap: the monitor to take the gap from.
        budget: the monitor to take the times from.
        examples: contexts in the picture of solutions.
        command: what was typed to make the run.
    """

    def __init__(
        self, name: str, gap: GapMonitor, budget: BudgetMonitor | None = None, examples: int = 8, command: str = ""
    ) -> None:
        self.name, self.gap, self.budget, self.examples, self.command = name, gap, budget, examples, command

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero or not isinstance(pl_module, AmortizedModule):
            return
        directory = Path(trainer.default_root_dir)
        budget = self.budget.budget if self.budget is not None else None
        used = solver_used(pl_module, self.gap)
        measured = [c for c in trainer.callbacks if isinstance(c, Measurement) and c.results]  # type: ignore[attr-defined]
        of_each = {callback.name: callback.results for callback in measured}
        found = Results.of(self.gap.results, budget, self.gap.evaluations, used, of_each)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "results.json").write_text(json.dumps(found.to_json(), indent=2) + "\n")
        for logger in trainer.loggers:
            logger.save()
        pictures = self._save_pictures(self._pictures(pl_module, budget, directory, measured), directory)
        html = directory / "report.html"
        html.write_text(self._page(found, pictures, directory, pl_module, measured), encoding="utf-8")
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                attempt(logger, self._log, logger, pl_module, found, list(pictures.values()), html, trainer.global_step)
        more = [line for callback in measured for line in callback.lines()]
        print(f"\n{table(found, self.name, pl_module.objective_name, more)}\nwritten to {directory}")

    def _log(
        self,
        logger: WandbLogger,
        module: AmortizedModule,
        found: Results,
        pictures: list[Path],
        html: Path,
        step: int,
    ) -> None:
        gap = self.gap.table.gap[self.gap.table.comparable]
        log_results(logger, found.to_json(), pictures, histogram(gap) if gap.isfinite().any() else None, html, step)
        log_worst(logger, worst_rows(self.gap.worst), self._portraits(module), step)

    def _page(
        self,
        found: Results,
        pictures: dict[str, Path],
        directory: Path,
        module: AmortizedModule,
        measured: list[Measurement],
    ) -> str:
        recipes = sorted(directory.glob("config*.yaml"), key=lambda path: path.stat().st_mtime_ns)
        device = torch.cuda.get_device_name(module.device) if module.device.type == "cuda" else "CPU"
        packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "lightning"))
        return page(
            title=self.name,
            subtitle=f"{_what(module)} {title(found, self.name).split(': ')[1].capitalize()}.".strip(),
            cards=cards(found, module.objective_name),
            numbers=[
                *lines(found, module.objective_name),
                *(line for c in measured for line in c.lines()),
                *([("note", found.solver.advice)] if found.solver.advice else []),
            ],
            pictures=pictures,
            worst=[
                {
                    "context": f"{row['index']:.0f}" + ("" if math.isfinite(row["gap"]) else " *"),
                    **{name: f"{row[name]:.5g}" for name in ("network", "solver", "gap")},
                    "converged": "yes" if row["converged"] else "no",
                    **{name.replace("_", "'s "): f"{row[name]:.2g}" for name in row if name.endswith("violation")},
                }
                for row in worst_rows(self.gap.worst)
            ],
            command=self.command,
            recipe=recipes[-1].read_text(encoding="utf-8") if recipes else "",
            captions={name: caption for c in measured for name, caption in c.captions.items()},
            footer=f"{time.strftime('%Y-%m-%d %H:%M')} · {device} · Python {platform.python_version()}, {packages}",
        )

    def _save_pictures(self, pictures: dict[str, Callable[[], Figure | None]], directory: Path) -> dict[str, Path]:
        """The files of the pictures by name. What fails to draw costs its picture, not the report."""
        saved, lost = {}, {}
        for name, draw in pictures.items():
            path = directory / "pictures" / f"{name}.png"
            try:
                if (figure := draw()) is not None:
                    path.parent.mkdir(exist_ok=True)
                    # Cut to what is drawn, which draws it twice, only where no layout has seen to that.
                    figure.savefig(path, dpi=120, bbox_inches=None if figure.get_layout_engine() else "tight")
                    saved[name] = path
            except Exception as error:
                path.unlink(missing_ok=True)
                lost[name] = describe(error)
        if lost:
            print(
                f"warning: no picture of {', '.join(lost)}: {'; '.join(dict.fromkeys(lost.values()))}", file=sys.stderr
            )
        return saved

    def _pictures(
        self, module: AmortizedModule, budget: Budget | None, directory: Path, measured: list[Measurement]
    ) -> dict[str, Callable[[], Figure | None]]:
        objective, gap = module.objective_name, self.gap
        pictures: dict[str, Callable[[], Figure | None]] = {
            "curves": lambda: draw_curves(_metrics(directory), objective),
            "gap": lambda: draw_gap(gap.table, objective),
            "violation": lambda: draw_violation(gap.table, objective),
        }
        if budget is not None:
            pictures["budget"] = lambda: draw_budget(budget, objective)
        if (example := gap.example) is not None:
            first = slice(0, self.examples)
            pictures["solutions"] = lambda: _draw(module, *(take(part, first) for part in example))
        if (worst := gap.worst) is not None:
            pictures["worst"] = lambda: _draw(module, *worst[1:])
        for callback in measured:
            pictures |= callback.pictures()
        return pictures

    def _portraits(self, module: AmortizedModule) -> list[Figure | None]:
        """A picture of each of the worst contexts alone; none of one that fails, as :meth:`_save_pictures` has told."""

        def portrait(case: Cases) -> Figure | None:
            with contextlib.suppress(Exception):
                return _draw(module, *case[1:])
            return None

        worst = self.gap.worst
        count = 0 if worst is None else len(worst.network)
        return [portrait(take(worst, slice(i, i + 1))) for i in range(count)]


def solver_used(module: AmortizedModule, monitor: GapMonitor) -> SolverUsed:
    """The solver that the gap was measured with, how it was chosen, and what to change about it."""
    methods = structure(module)[0]
    stored = monitor.results.get("stored")
    return SolverUsed(
        advice=advice(module, monitor.solver, monitor.results),
        name=type(monitor.solver).__name__,
        chosen_by=" and ".join(methods) if not monitor.named else None,
        best_known=None if stored is None else int(stored),
    )


def _metrics(directory: Path) -> list[dict[str, str]]:
    path = directory / "metrics.csv"
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _draw(module: AmortizedModule, a: Any, network: torch.Tensor, solver: torch.Tensor) -> Figure | None:
    module, a = at_least_float32(module, a)  # half precision is none that can be drawn
    with torch.no_grad():
        return module.draw(a, {"network": network, "solver": solver})


def _what(module: AmortizedModule) -> str:
    """The first sentence of the problem's docstring, unless it has none of its own."""
    text = " ".join((type(module).__doc__ or "").split("\n\n")[0].split())
    return re.split(r"(?<=[.])\s", text)[0]
