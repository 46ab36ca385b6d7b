"""What a run found, at its end: a table in the terminal, ``results.json``, pictures and ``report.html`` in its folder."""

from __future__ import annotations

import contextlib
import csv
import json
import math
import platform
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from matplotlib.figure import Figure

from amortized.callbacks.advice import advice
from amortized.callbacks.budget import Budget, BudgetMonitor
from amortized.callbacks.gap import Cases, GapMonitor
from amortized.callbacks.page import page
from amortized.callbacks.pictures import draw_budget, draw_curves, draw_gap, histogram
from amortized.faults import describe
from amortized.float64 import at_least_float32
from amortized.loggers import attempt, log_results, log_worst
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


def results(
    gap: dict[str, float], budget: Budget | None, shifted: dict[str, float] | None = None, advice: str | None = None
) -> dict[str, Any]:
    """The content of ``results.json``: groups of numbers, each of which has all of its keys.

    ``objective``: ``network`` and ``solver``, the mean objectives, in the objective's unit.

    ``gap``: ``mean``, ``median``, ``p95`` and ``stderr`` (of the mean) in the objective's unit; ``relative``, a fraction,
    ``null`` where the solver's objective is about zero; ``noise``, the part of ``stderr`` that is due to the draws of a random
    objective; ``rounding``, what the gap can be off by, of the precision of the evaluation.

    ``rows``: ``total``, a count; ``converged``, ``diverged``, ``lost`` and ``unbounded``, fractions of it, as in
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

    ``solver``: ``advice``, what to change first about the measurement, in one line, or ``null``: see
    :func:`~amortized.callbacks.advice.advice`.

    What is not finite is ``null``: a mean without a finite row; a median that is infinite, as half of the rows never got there.
    """
    timed = NOT_MEASURED if budget is None else budget.summary()
    found: dict[str, Any] = {**_measured(gap), "time": _finite(timed), "solver": {"advice": advice}}
    return found | ({"shifted": _measured(shifted)} if shifted else {})


def _measured(gap: dict[str, float]) -> dict[str, dict[str, Any]]:
    """The groups of ``results.json`` that one set of contexts has."""
    groups = {
        "objective": {"network": gap["network"], "solver": gap["reference"]},
        "gap": {name: gap[name] for name in ("mean", "median", "p95", "relative", "stderr", "noise", "rounding")},
        "rows": {
            "total": int(gap["total"]),
            **{name: gap[name] for name in ("converged", "diverged", "lost", "unbounded")},
        },
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
        *([("                  relative", _relative(g["relative"]))] if g["relative"] is not None else []),
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
        reached, space = t["equal_quality_ratio"], " " * 4
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


def table(
    found: dict[str, Any], name: str, objective: str, more: Sequence[tuple[str, str]] = (), width: int = 80
) -> str:
    """:func:`lines`, and ``more`` of them, under a title, for a terminal of so many columns; a label too long loses its end."""
    title, rows = _title(found, name), [*lines(found, objective), *more]
    width = min(width, max(len(title), *(len(label) + max(2 + len(value), 20) for label, value in rows)))
    text = [f"{_cut(label, width - len(value) - 2):<{width - len(value)}}{value}" for label, value in rows]
    rule = "─" * width
    note = textwrap.wrap(f"note: {found['solver']['advice']}", width) if found["solver"]["advice"] else []
    return "\n".join([_cut(title, width), rule, *text, rule, *note])


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: max(width - 1, 0)] + "…"


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
    """A fraction in per cent, or where the solver came near to zero a multiple; none of what is zero but for rounding."""
    if abs(value) >= 1e6:
        return "the solver's is about 0"
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
        told = advice(pl_module, self.gap.solver, self.gap.results)
        found = results(self.gap.results, budget, self.gap.shifted, told)
        measured = [c for c in trainer.callbacks if isinstance(c, Measurement) and c.results]  # type: ignore[attr-defined]
        found |= {callback.name: _finite(callback.results) for callback in measured}
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "results.json").write_text(json.dumps(found, indent=2) + "\n")
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
        found: dict[str, Any],
        pictures: list[Path],
        html: Path,
        step: int,
    ) -> None:
        gap = self.gap.table.gap
        log_results(logger, found, pictures, histogram(gap) if gap.isfinite().any() else None, html, step)
        log_worst(logger, worst_rows(self.gap.worst), self._portraits(module), step)

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
            numbers=[
                *lines(found, module.objective_name),
                *(line for c in measured for line in c.lines()),
                *([("note", found["solver"]["advice"])] if found["solver"]["advice"] else []),
            ],
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
                    figure.savefig(path, dpi=120, bbox_inches="tight")
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
