"""What a run found, at its end: a table in the terminal, ``results.json``, pictures and ``report.html`` in its folder."""

from __future__ import annotations

import csv
import json
import math
import platform
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from matplotlib.figure import Figure

from amortized.callbacks.budget import Budget, BudgetMonitor
from amortized.callbacks.gap import Cases, GapMonitor
from amortized.callbacks.page import page
from amortized.callbacks.pictures import draw_budget, draw_curves, draw_gap
from amortized.loggers import log_results, log_worst
from amortized.module import AmortizedModule
from amortized.problem import take

NOT_MEASURED: dict[str, Any] = dict.fromkeys(
    (
        *("network", "solver", "equal_quality_ratio", "contexts", "rival"),
        *("not_finite", "row_ratio_median", "row_ratio_p95", "rows_never_reached"),
        *("warm_rival", "tolerance", "evaluations_cold", "evaluations_warm", "evaluations_saved"),
        *("rows_never_solved_cold", "rows_never_solved_warm"),
    )
)
"""``time`` in ``results.json`` where there was no budget."""


def results(gap: dict[str, float], budget: Budget | None, shifted: dict[str, float] | None = None) -> dict[str, Any]:
    """The content of ``results.json``: groups of numbers, each of which has all of its keys.

    ``objective``: ``network`` and ``solver``, the mean objectives, in the objective's unit.

    ``gap``: ``mean``, ``median``, ``p95`` and ``stderr`` (of the mean) in the objective's unit; ``relative``, a fraction;
    ``noise``, the part of ``stderr`` that is due to the draws of a random objective.

    ``rows``: ``total``, a count; ``converged``, ``diverged`` and ``lost``, fractions of it, as in
    :class:`~amortized.metrics.AmortizationGap`.

    ``time``, all of it ``null`` where it was not measured, on the first contexts of the test in one batch:

    * ``contexts``: how many; ``not_finite``: the fraction of them left out of the means, since a side is not finite there;
    * ``network``: seconds of a forward pass; ``solver``: of the whole run of ``rival``, the cold-started solver that was
      first to reach the network's mean objective;
    * ``equal_quality_ratio``: when it did, over ``network``; ``row_ratio_median`` and ``row_ratio_p95``: the same for each
      row's own objective; ``rows_never_reached``: the fraction of rows on which it never did;
    * ``warm_rival``: the solver by which the prediction is judged as a warm start, the one that solves most rows from the
      cold start; a row is solved when it lacks at most ``tolerance`` of what the cold start lacks;
    * ``evaluations_cold`` and ``evaluations_warm``: that it takes, median over rows; ``evaluations_saved``: their
      difference row by row, its median; ``rows_never_solved_cold`` and ``rows_never_solved_warm``: fractions of rows.

    ``decomposition``, only where the problem declares its optimum: ``total``, ``amortization``, ``solver`` and
    ``approximation``, each with ``*_stderr``, in the objective's unit: see :func:`~amortized.metrics.decomposition`.

    ``shifted``, only where the data have shifted contexts: ``objective``, ``gap``, ``rows`` (and ``decomposition``) of those.

    What is not finite is ``null``: a mean without a finite row; a median that is infinite, as half of the rows never got there.
    """
    timed = NOT_MEASURED if budget is None else budget.summary()
    found: dict[str, dict[str, Any]] = {**_measured(gap), "time": _finite(timed)}
    return found | ({"shifted": _measured(shifted)} if shifted else {})


def _measured(gap: dict[str, float]) -> dict[str, dict[str, Any]]:
    """The groups of ``results.json`` that one set of contexts has."""
    groups = {
        "objective": {"network": gap["network"], "solver": gap["reference"]},
        "gap": {name: gap[name] for name in ("mean", "median", "p95", "relative", "stderr", "noise")},
        "rows": {"total": int(gap["total"]), **{name: gap[name] for name in ("converged", "diverged", "lost")}},
        "decomposition": {
            k.removeprefix("decomposition/"): v for k, v in gap.items() if k.startswith("decomposition/")
        },
    }
    return {name: _finite(group) for name, group in groups.items() if group}


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


def lines(found: dict[str, Any], objective: str) -> list[tuple[str, str]]:
    """``results`` for a person to read: labels and values."""
    o, g, r, t = (found[group] for group in ("objective", "gap", "rows", "time"))
    rows = [
        (f"{objective}, network", _number(o["network"])),
        (f"{objective}, solver", _number(o["solver"])),
        ("amortization gap, mean ± standard error", f"{_number(g['mean'])} ± {_number(g['stderr'])}"),
        ("                  median", _number(g["median"])),
        ("                  95th percentile", _number(g["p95"])),
        ("                  relative", _relative(g["relative"]) if g["relative"] is not None else "not finite"),
        ("rows converged", f"{r['converged']:.1%}"),
        ("rows diverged", f"{r['diverged']:.1%}"),
        ("rows where the cold solver lost to the network", f"{r['lost']:.1%}"),
    ]
    if g["noise"]:
        rows.insert(3, ("                  of that error, noise of the draws", _number(g["noise"])))
    if d := found.get("decomposition"):
        rows += [
            (label, f"{_number(d[term])} ± {_number(d[f'{term}_stderr'])}")
            for label, term in (
                ("above the true minimum, in all", "total"),
                ("    = amortization", "amortization"),
                ("    + the solver's own error", "solver"),
                ("    + approximation, of the family of solutions", "approximation"),
            )
        ]
    if s := found.get("shifted"):
        o, g, counts = (s[group] for group in ("objective", "gap", "rows"))
        rows += [
            (f"on {counts['total']} shifted contexts: {objective}, network", _number(o["network"])),
            ("    amortization gap, mean ± standard error", f"{_number(g['mean'])} ± {_number(g['stderr'])}"),
            (
                "    rows converged, diverged, lost",
                " ".join(f"{counts[k]:.1%}" for k in ("converged", "diverged", "lost")),
            ),
        ]
    if t["network"] is not None:
        reached, space = t["equal_quality_ratio"], " " * 24
        median, p95 = (_ratio(t[key]) for key in ("row_ratio_median", "row_ratio_p95"))
        cold, warm = (_count(t[key]) for key in ("evaluations_cold", "evaluations_warm"))
        rows += [
            (f"time for {t['contexts']} contexts, network", f"{1e3 * t['network']:.3g} ms"),
            (f"{space}{t['rival']}, to its end", f"{1e3 * t['solver']:.3g} ms"),
            (
                f"{space}{t['rival']}, to the network's quality",
                f"{reached:.3g}x the network's" if reached else "never reached",
            ),
            (
                f"{space}  each row's: median, 95 %, share never",
                f"{median}, {p95}, {t['rows_never_reached']:.1%}",
            ),
            (f"evaluations to {t['tolerance']:g} of the best, {t['warm_rival']}: cold, warm", f"{cold}, {warm}"),
            (
                f"{space}saved by the warm start; unsolved cold, warm",
                f"{_count(t['evaluations_saved'])}; "
                f"{t['rows_never_solved_cold']:.1%}, {t['rows_never_solved_warm']:.1%}",
            ),
        ]
    return rows


def table(found: dict[str, Any], name: str, objective: str, more: Sequence[tuple[str, str]] = ()) -> str:
    """:func:`lines`, and ``more`` of them, under a title, for a terminal."""
    rows = [*lines(found, objective), *more]
    width = max(len(label) for label, _ in rows) + 2
    text = [f"{label:<{width}}{value:>20}" for label, value in rows]
    rule = "─" * max(map(len, text))
    return "\n".join([_title(found, name), rule, *text, rule])


def _title(found: dict[str, Any], name: str) -> str:
    return f"{name}: network against solver on {found['rows']['total']} held-out contexts"


def cards(found: dict[str, Any], objective: str) -> list[tuple[str, str, str]]:
    """The headline figures: what, value, and what else to know."""
    o, g, r, t = (found[group] for group in ("objective", "gap", "rows", "time"))
    relative = f"{_relative(g['relative'])} of the solver's {objective}; " if g["relative"] is not None else ""
    shown = [
        ("Amortization gap, mean", _number(g["mean"]), f"± {_number(g['stderr'])}; median {_number(g['median'])}"),
        ("Mean objective, network", _number(o["network"]), f"{objective}; solver {_number(o['solver'])}"),
        (
            "Rows converged",
            f"{r['converged']:.1%}",
            f"of {r['total']}; {r['diverged']:.1%} diverged, {r['lost']:.1%} lost to the network",
        ),
    ]
    shown[0] = (*shown[0][:2], relative + shown[0][2])
    if t["network"] is not None:
        reached = t["equal_quality_ratio"]
        shown += [
            (
                "Solver, to equal quality",
                f"{reached:.3g}x" if reached else "never",
                f"the network's time ({t['rival']}); never on {t['rows_never_reached']:.1%} of rows",
            ),
            (
                "Warm start saves",
                _count(t["evaluations_saved"]),
                f"of {_count(t['evaluations_cold'])} evaluations, median over rows ({t['warm_rival']}); "
                f"{t['rows_never_solved_warm']:.1%} of rows never solved, cold {t['rows_never_solved_cold']:.1%}",
            ),
        ]
    return shown


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4g}"


def _count(value: float | None) -> str:
    return "never" if value is None else f"{value:.0f}"


def _relative(value: float) -> str:
    """A fraction in per cent, unless the solver reached so nearly zero that it is a multiple."""
    return f"{value:.2%}" if abs(value) < 10 else f"{value:,.0f}x"


def _ratio(value: float | None) -> str:
    return "never" if value is None else f"{value:.3g}x"


def worst_rows(worst: Cases | None) -> list[dict[str, float]]:
    """Index in the test set, objective of network and solver, and gap of the worst contexts, the worst first."""
    if worst is None:
        return []
    r = worst.rows
    columns = {"index": r.index, "network": r.network, "solver": r.reference, "gap": r.gap, "converged": r.converged}
    listed = {name: column.tolist() for name, column in columns.items()}
    return [dict(zip(listed, values, strict=True)) for values in zip(*listed.values(), strict=True)]


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

    def pictures(self) -> dict[str, Figure]:
        """By name of their file."""
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
        found = results(self.gap.results, budget, self.gap.shifted)
        measured = [c for c in trainer.callbacks if isinstance(c, Measurement) and c.results]  # type: ignore[attr-defined]
        found |= {callback.name: _finite(callback.results) for callback in measured}
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "results.json").write_text(json.dumps(found, indent=2) + "\n")
        for logger in trainer.loggers:
            logger.save()
        pictures = {}
        figures = self._pictures(pl_module, budget, directory)
        for callback in measured:
            figures |= callback.pictures()
        for name, figure in figures.items():
            path = pictures[name] = directory / "pictures" / f"{name}.png"
            path.parent.mkdir(exist_ok=True)
            figure.savefig(path, dpi=120, bbox_inches="tight")
        html = directory / "report.html"
        html.write_text(self._page(found, pictures, directory, pl_module, measured), encoding="utf-8")
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                log_results(logger, found, list(pictures.values()), self.gap.table.gap, html, trainer.global_step)
                log_worst(logger, worst_rows(self.gap.worst), self._portraits(pl_module), trainer.global_step)
        more = [line for callback in measured for line in callback.lines()]
        print(f"\n{table(found, self.name, pl_module.objective_name, more)}\nwritten to {directory}")

    def _page(
        self,
        found: dict[str, Any],
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
            subtitle=f"{_title(found, self.name).split(': ')[1].capitalize()}.",
            cards=cards(found, module.objective_name),
            numbers=[*lines(found, module.objective_name), *(line for c in measured for line in c.lines())],
            pictures=pictures,
            worst=[
                {
                    "context": f"{row['index']:.0f}" + ("" if math.isfinite(row["gap"]) else " *"),
                    **{name: f"{row[name]:.5g}" for name in ("network", "solver", "gap")},
                    "converged": "yes" if row["converged"] else "no",
                }
                for row in worst_rows(self.gap.worst)
            ],
            command=self.command,
            recipe=recipes[-1].read_text() if recipes else "",
            captions={name: caption for c in measured for name, caption in c.captions.items()},
            footer=f"{time.strftime('%Y-%m-%d %H:%M')} · {device} · Python {platform.python_version()}, {packages}",
        )

    def _pictures(self, module: AmortizedModule, budget: Budget | None, directory: Path) -> dict[str, Figure]:
        metrics = directory / "metrics.csv"
        curves = None
        if metrics.is_file():
            with metrics.open(newline="") as file:
                curves = draw_curves(list(csv.DictReader(file)), module.objective_name)
        pictures = {
            "curves": curves,
            "gap": draw_gap(self.gap.table, module.objective_name),
            "budget": draw_budget(budget, module.objective_name) if budget is not None else None,
        }
        if self.gap.example is not None:
            pictures["solutions"] = _draw(module, *(take(part, slice(0, self.examples)) for part in self.gap.example))
        if self.gap.worst is not None:
            pictures["worst"] = _draw(module, *self.gap.worst[1:])
        return {name: figure for name, figure in pictures.items() if figure is not None}

    def _portraits(self, module: AmortizedModule) -> list[Figure | None]:
        """A picture of each of the worst contexts alone."""
        worst = self.gap.worst
        count = 0 if worst is None else len(worst.network)
        return [_draw(module, *take(worst, slice(i, i + 1))[1:]) for i in range(count)]


def _draw(module: AmortizedModule, a: Any, network: torch.Tensor, solver: torch.Tensor) -> Figure | None:
    with torch.no_grad():
        return module.draw(a, {"network": network, "solver": solver})
