"""Pictures of optimal power flow: dispatch and voltages between their limits, and cost against violation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from amortized.contract import feasibility_tol, take, violation

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROWS = 3
"""Contexts shown one by one."""


def draw_dispatch(problem: Any, a: Any, solutions: dict[str, Tensor]) -> Figure:
    """For the first contexts: each generator's power and each bus's voltage between their limits; below, cost against violation.

    Args:
        problem: a :class:`~amortized.problems.PowerFlow`.
        a: contexts.
        solutions: by who found them.
    """
    from matplotlib.figure import Figure

    grid, n = problem.grid, min(ROWS, len(a.p))
    figure = Figure(figsize=(11, 2.1 * n + 2.8), layout="constrained")
    panels = figure.subplots(n + 1, 2, squeeze=False)
    upper, lower = (x.cpu() for x in problem.limits(next(iter(solutions.values()))))
    g = grid.generators
    buses, at = range(grid.buses), [grid.names[int(i)] for i in grid.at]
    for i in range(n):
        left, right = panels[i]
        left.bar(range(g), (upper - lower)[:g] * grid.base, bottom=lower[:g] * grid.base, color="0.9", label="limits")
        right.fill_between(buses, lower[2 * g :], upper[2 * g :], color="0.9", label="limits", step="mid")
        for (name, b), marker in zip(solutions.items(), "ox+", strict=False):
            found = problem.decode(b[i : i + 1], take(a, slice(i, i + 1)))
            left.plot(range(g), found.p[0].cpu(), marker, color="C3", fillstyle="none", label=name)
            right.plot(buses, found.voltage[0].cpu(), marker, color="C3", fillstyle="none", markersize=4)
        left.set(ylabel="MW", xticks=range(g) if g <= 12 else [], title="dispatch by generator" if i == 0 else "")
        left.set_xticklabels(at if g <= 12 else [])
        right.set(ylabel="voltage [p.u.]", title="voltage by bus" if i == 0 else "")
    _cost_against_violation(problem, a, solutions, panels[n])
    left = panels[0, 0]
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return figure


def _cost_against_violation(problem: Any, a: Any, solutions: dict[str, Tensor], panels: Any) -> None:
    """Each context's cost above the last solution's against its violation; and the power on limited branches."""
    left, right = panels
    (_, reference), tol = list(solutions.items())[-1], feasibility_tol(problem)
    least = problem.objective(reference, a)
    for (name, b), marker in zip(solutions.items(), "ox+", strict=False):
        above = 100 * (problem.objective(b, a) / least - 1)
        left.plot(
            violation(problem, b, a).clamp(min=1e-8).cpu(),
            above.cpu(),
            marker,
            color="C3",
            fillstyle="none",
            label=name,
        )
    left.axvline(tol, color="0.5", linewidth=0.8)
    left.set(xscale="log", xlabel="violation [p.u.]; left of the line is feasible", ylabel="cost above [%]")
    limited = len(problem.grid.limited)
    if not limited:
        right.set(xticks=[], yticks=[], title="no branch is limited")
        return
    for (_, b), marker in zip(solutions.items(), "ox+", strict=False):
        (rating,) = problem.grid.of(b, "rating")
        over = problem.inequality(b[:1], a._replace(p=a.p[:1], q=a.q[:1]))[0, -2 * limited :].view(2, -1).amax(0)
        loaded = 100 * (2 * over / rating + 1).clamp(min=0).sqrt()
        right.plot(range(limited), loaded.cpu(), marker, color="C3", fillstyle="none", markersize=4)
    right.axhline(100, color="0.5", linewidth=0.8)
    right.set(xlabel="limited branch", ylabel="load [% of limit]")
