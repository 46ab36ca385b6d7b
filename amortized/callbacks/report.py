"""What a run found, at its end: a table in the terminal, ``results.json`` and pictures in the run's folder."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from matplotlib.figure import Figure

from amortized.callbacks.budget import Budget, BudgetMonitor
from amortized.callbacks.gap import GapMonitor
from amortized.loggers import log_results
from amortized.metrics import GapRows
from amortized.module import AmortizedModule
from amortized.problem import take


def results(gap: dict[str, float], budget: Budget | None, shifted: dict[str, float] | None = None) -> dict[str, Any]:
    """The content of ``results.json``.

    ``objective.network/solver`` and ``gap.mean/median/p95/relative/stderr/noise`` in the objective's unit (``relative`` is a
    fraction); ``rows.total`` a count, ``rows.converged/diverged/lost`` fractions of it, as in
    :class:`~amortized.metrics.AmortizationGap`; ``time.network/solver`` in seconds for ``time.contexts`` contexts in one
    batch, ``time.equal_quality_ratio`` the solver's time to the network's mean objective over the network's time
    (``null``: never reached, or not measured), ``time.rival`` the solver it was. What is not finite is ``null``.

    Only where the problem declares its optimum, ``decomposition.total/amortization/solver/approximation``, each with
    ``*_stderr``, in the objective's unit: see :func:`~amortized.metrics.decomposition`. Only where the data have shifted
    contexts, ``shifted.objective/gap/rows/decomposition``: the same groups, measured on those.
    """
    time: dict[str, Any] = {
        "network": None,
        "solver": None,
        "equal_quality_ratio": None,
        "contexts": None,
        "rival": None,
    }
    if budget is not None:
        time = {
            "network": budget.network_seconds,
            "solver": budget.solver_seconds,
            "equal_quality_ratio": budget.equal_quality_ratio,
            "contexts": budget.contexts,
            "rival": budget.rival,
        }
    found: dict[str, dict[str, Any]] = {**_measured(gap), "time": _finite(time)}
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


def table(found: dict[str, Any], name: str, objective: str) -> str:
    """``results`` for a person to read."""
    o, g, r, t = (found[group] for group in ("objective", "gap", "rows", "time"))
    rows = [
        (f"{objective}, network", _number(o["network"])),
        (f"{objective}, solver", _number(o["solver"])),
        ("amortization gap, mean ± standard error", f"{_number(g['mean'])} ± {_number(g['stderr'])}"),
        ("                  median", _number(g["median"])),
        ("                  95th percentile", _number(g["p95"])),
        ("                  relative", f"{g['relative']:.2%}" if g["relative"] is not None else "not finite"),
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
        reached = t["equal_quality_ratio"]
        rows += [
            (f"time for {t['contexts']} contexts, network", f"{1e3 * t['network']:.3g} ms"),
            (f"                        {t['rival']}, to its end", f"{1e3 * t['solver']:.3g} ms"),
            (
                f"                        {t['rival']}, to the network's quality",
                f"{reached:.3g}x the network's" if reached else "never reached",
            ),
        ]
    width = max(len(label) for label, _ in rows) + 2
    lines = [f"{label:<{width}}{value:>20}" for label, value in rows]
    rule = "─" * max(map(len, lines))
    return "\n".join([f"{name}: network against solver on {r['total']} held-out contexts", rule, *lines, rule])


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4g}"


def draw_gap(rows: GapRows, objective: str) -> Figure:
    """Histogram of the gap over contexts, with its mean, median and 95th percentile."""
    gap = rows.gap[torch.isfinite(rows.gap)].cpu()
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    if len(gap):
        axes.hist(gap.numpy(), bins=40, color="#4c78a8")
        for name, value, style in (
            ("mean", gap.mean(), "-"),
            ("median", gap.median(), "--"),
            ("95 %", gap.quantile(0.95), ":"),
        ):
            axes.axvline(float(value), color="black", linestyle=style, linewidth=1, label=f"{name} {float(value):.3g}")
        axes.legend(frameon=False)
    lost = len(rows.gap) - len(gap)
    axes.set(xlabel=f"gap: {objective} of network minus solver", ylabel="contexts")
    axes.set_title(f"Amortization gap on {len(gap)} contexts" + (f" ({lost} diverged, not shown)" if lost else ""))
    return figure


def draw_budget(budget: Budget, objective: str) -> Figure:
    """Mean objective against time: each solver's best so far, and the network's one forward pass."""
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    for curve in budget.curves:
        axes.plot(
            [1e3 * t for t in curve.seconds],
            curve.objective,
            label=curve.name,
            linewidth=2 if curve.name == budget.rival else 1,
        )
    axes.axhline(budget.network_objective, color="black", linewidth=0.5, linestyle=":")
    axes.plot(1e3 * budget.network_seconds, budget.network_objective, "k*", markersize=12, label="network")
    axes.set(xscale="log", xlabel=f"milliseconds for {budget.contexts} contexts", ylabel=f"mean {objective}")
    low = min([budget.network_objective, *(curve.objective[-1] for curve in budget.curves)])
    high = max([budget.network_objective, *(curve.objective[0] for curve in budget.curves[:1])])
    axes.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
    axes.legend(frameon=False)
    axes.set_title("Objective against time, solvers started cold")
    return figure


class Report(Callback):
    """Prints the table and writes ``results.json`` and ``pictures/*.png`` at the end of a test.

    Args:
        name: of the run, for the title.
        gap: the monitor to take the gap from.
        budget: the monitor to take the times from.
        examples: contexts in the picture of solutions.
    """

    def __init__(self, name: str, gap: GapMonitor, budget: BudgetMonitor | None = None, examples: int = 8) -> None:
        self.name, self.gap, self.budget, self.examples = name, gap, budget, examples

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero or not isinstance(pl_module, AmortizedModule):
            return
        directory = Path(trainer.default_root_dir)
        budget = self.budget.budget if self.budget is not None else None
        found = results(self.gap.results, budget, self.gap.shifted)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "results.json").write_text(json.dumps(found, indent=2) + "\n")
        pictures = self._pictures(pl_module, budget)
        for name, figure in pictures.items():
            path = directory / "pictures" / f"{name}.png"
            path.parent.mkdir(exist_ok=True)
            figure.savefig(path, dpi=120)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                paths = [directory / "pictures" / f"{name}.png" for name in pictures]
                log_results(logger, found, paths, trainer.global_step)
        print(f"\n{table(found, self.name, pl_module.objective_name)}\nwritten to {directory}")

    def _pictures(self, module: AmortizedModule, budget: Budget | None) -> dict[str, Figure]:
        pictures = {"gap": draw_gap(self.gap.table, module.objective_name)}
        if budget is not None:
            pictures["budget"] = draw_budget(budget, module.objective_name)
        if self.gap.example is not None:
            a, network, solver = (take(part, slice(0, self.examples)) for part in self.gap.example)
            with torch.no_grad():
                solutions = module.draw(a, {"network": network, "solver": solver})
            if solutions is not None:
                pictures["solutions"] = solutions
        return pictures
