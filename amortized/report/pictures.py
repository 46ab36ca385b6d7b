"""Pictures of a run: its curves, the gap's histogram, the budget."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor

from amortized.evaluation.budget import Budget
from amortized.evaluation.metric import GapRows

GRID = {"color": "#e5e7eb", "linewidth": 0.6}


def draw_curves(lines: list[dict[str, str]], objective: str) -> Figure | None:
    """Training loss, validation objective and validation gap against steps, those that were logged; ``None`` where none was.

    Args:
        lines: of ``metrics.csv``.
        objective: what the objective is called.
    """
    gaps = ("val/gap/mean", "val/gap/median", "val/gap/p95")
    named = ((objective, ("train/loss", "val/objective")), ("amortization gap", gaps))
    panels = [(title, {name: _points(lines, name) for name in names}) for title, names in named]
    panels = [(title, curves) for title, curves in panels if any(x for x, _ in curves.values())]
    if not panels:
        return None
    figure = Figure(figsize=(4.5 * len(panels), 3.6), layout="constrained")
    for axes, (title, curves) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for (name, (x, y)), color in zip(curves.items(), COLORS[len(curves)], strict=True):
            if x:
                axes.plot(x, y, color=color, linewidth=1.3, marker="o" if len(x) < 25 else "", markersize=3, label=name)
        if "val/gap/mean" in curves:
            title += _band(axes, lines)
        drawn = [v for _, y in curves.values() for v in y if math.isfinite(v)]
        if drawn and min(drawn) > 0 and max(drawn) > 20 * min(drawn):
            axes.set_yscale("log")
        axes.set(xlabel="training step", title=title)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(**GRID)
        axes.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=3)
    return figure


def _band(axes: Axes, lines: list[dict[str, str]]) -> str:
    """Shade two standard errors around the mean gap, and say of how many contexts it is."""
    x, mean = _points(lines, "val/gap/mean")
    error = dict(zip(*_points(lines, "val/gap/stderr"), strict=True))
    band = torch.tensor([[m, 2 * error.get(at, math.nan)] for at, m in zip(x, mean, strict=True)]).reshape(-1, 2)
    axes.fill_between(x, *torch.stack([band[:, 0] - band[:, 1], band[:, 0] + band[:, 1]]).numpy(), color="#1f4e8c22")
    totals = sorted({int(n) for n in _points(lines, "val/gap/total")[1]})
    return f" on {'–'.join(map(str, totals[:: max(len(totals) - 1, 1)]))} contexts, mean ± 2 s.e." if totals else ""


COLORS = {2: ("#9ca3af", "#1f4e8c"), 3: ("#1f4e8c", "#5b9bd5", "#e07b39")}


def histogram(values: Tensor, bins: int = 40) -> tuple[np.ndarray, np.ndarray]:
    """Counts and edges of the bins of those that are finite, also where all are (nearly) equal, however large."""
    finite = values[values.isfinite()].double().cpu().numpy()
    low, high = finite.min(), finite.max()
    least = 1e-9 * max(abs(low), abs(high)) or 1.0
    pad = max(0.0, (least - (high - low)) / 2)
    return np.histogram(finite, bins=bins, range=(low - pad, high + pad))


def _points(lines: list[dict[str, str]], name: str) -> tuple[list[int], list[float]]:
    points = [(int(line["step"]), float(line[name])) for line in lines if line.get(name)]
    return [x for x, _ in points], [y for _, y in points]


def draw_gap(rows: GapRows, objective: str) -> Figure:
    """Histogram of the gap over contexts, with its mean, median and 95th percentile; with constraints of the feasible ones."""
    gap = rows.gap[rows.comparable].cpu()
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    if len(gap):
        axes.stairs(*histogram(gap), fill=True, color="#5b9bd5")
        for name, value, style in (
            ("mean", gap.mean(), "-"),
            ("median", gap.median(), "--"),
            ("95 %", gap.quantile(0.95), ":"),
        ):
            axes.axvline(float(value), color="black", linestyle=style, linewidth=1, label=f"{name} {float(value):.3g}")
        axes.legend(frameon=False)
    lost, why = len(rows.gap) - len(gap), "not feasible" if rows.constrained else "diverged"
    axes.set(xlabel=f"gap: {objective} of network minus solver", ylabel="contexts")
    axes.set_title(f"Amortization gap on {len(gap)} contexts" + (f" ({lost} {why}, not shown)" if lost else ""))
    return figure


def draw_violation(rows: GapRows, objective: str) -> Figure | None:
    """The gap of each context against the violation of its prediction; ``None`` without constraints."""
    if not rows.constrained or rows.violation is None or rows.tolerance is None:
        return None
    shown = rows.gap.isfinite() & rows.violation.isfinite() & rows.solved
    tol = float(rows.tolerance[~rows.tolerance.isnan()][0])
    x, y, feasible = (v[shown].cpu() for v in (rows.violation.clamp(min=1e-6 * tol), rows.gap, rows.feasible))
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    for which, color, label in ((feasible, "#1f4e8c", "feasible"), (~feasible, "#e07b39", "infeasible")):
        axes.plot(x[which], y[which], ".", color=color, label=f"{label}: {int(which.sum())}")
    axes.axvline(tol, color="black", linewidth=0.8, linestyle=":")
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set(xscale="log", xlabel="violation of the prediction", ylabel=f"gap: {objective}")
    axes.set_title(f"Gap against violation; dotted: feasible within {tol:g}")
    axes.legend(frameon=False)
    return figure


def draw_budget(budget: Budget, objective: str) -> Figure:
    """Mean objective, and the share of rows solved, against time and against evaluations.

    Solid: solvers started cold; dashed: the same from the prediction. A row that is not finite on some side is left out
    of the mean, which would not be a number, and stays in the shares.
    """
    figure = Figure(figsize=(9, 6.4), layout="constrained")
    panels = figure.subplots(2, 2, sharex="col", sharey="row")
    goal = budget.goal
    names = [curve.name for curve in budget.cold]

    def solved(values: Tensor) -> Tensor:
        return 100 * (values.isfinite() & (values <= goal)).double().mean(-1)

    for curve in [*budget.cold, *budget.warm]:
        style: dict[str, Any] = {
            "linestyle": "--" if curve.warm else "-",
            "color": f"C{names.index(curve.name) % 10}",
            "linewidth": 2.2 if curve.name in (budget.rival, budget.warm_rival) else 0.9,
        }
        for column, x in enumerate((1e3 * curve.seconds, curve.evaluations)):
            panels[0, column].plot(x, budget.mean(curve.values), **style)
            panels[1, column].plot(x, solved(curve.values), **style)
    level = float(budget.mean(budget.network))
    for row, height in enumerate((level, float(solved(budget.network)))):
        panels[row, 0].plot(1e3 * budget.network_seconds, height, "k*", markersize=13, zorder=5)
        for axes in panels[row]:
            axes.axhline(height, color="black", linewidth=0.8, linestyle=":")
            axes.grid(**GRID)
    out = int((~budget.finite).sum())
    panels[0, 0].set(ylabel=f"mean {objective}", xscale="log", ylim=_range(budget, level))
    panels[1, 0].set(
        xlabel=f"milliseconds for {len(goal)} contexts in one batch", ylabel="% of rows solved", ylim=(-4, 104)
    )
    panels[1, 1].set(xlabel="evaluations for each row", xscale="log")
    if out:
        infeasible = bool((budget.network.isposinf() | budget.start.isposinf()).any())
        why = "feasible on all sides" if infeasible else "finite"
        panels[0, 0].set_title(f"{out} of {len(goal)} rows are not {why}: not in this mean", fontsize=9)
    handles = [Line2D([], [], color=f"C{i % 10}", label=name) for i, name in enumerate(names)]
    handles += [Line2D([], [], color="#555", linestyle=s, label=label) for s, label in STARTS]
    handles += [Line2D([], [], color="black", linestyle=":", marker="*", markersize=11, label="network")]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    return figure


STARTS: tuple[tuple[Any, str], ...] = (("-", "started cold"), ("--", "from the prediction"))


def _range(budget: Budget, level: float) -> tuple[float, float] | None:
    """From the best end to above the network; a cold start far above comes in from the top."""
    ends = [level, *(float(budget.mean(curve.values[-1])) for curve in budget.cold + budget.warm)]
    heights = [h for h in (*ends, float(budget.mean(budget.start))) if math.isfinite(h)]
    if not heights or max(heights) == min(heights):
        return None
    low, high = min(heights), max(heights)
    high = min(high, low + max(5 * (level - low), 0.05 * (high - low)))
    return low - 0.05 * (high - low), high + 0.05 * (high - low)
