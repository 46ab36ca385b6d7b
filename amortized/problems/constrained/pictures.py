"""Pictures of constrained solutions: cost against violation, and which constraints are active."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from amortized.contract import Context, feasibility_tol, polyhedron, violation
from amortized.solvers.engine.rows import times

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LEAST = 1e-9
"""What counts as no violation, on a logarithmic axis."""


def draw_constrained(problem: Any, a: Context, solutions: dict[str, Tensor]) -> Figure:
    """Objective against violation, a mark for each solution; and beside it the slack of every inequality, zero where active."""
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.2), layout="constrained")
    cost, slacks = figure.subplots(1, 2, width_ratios=(1, 1.6))
    rows = []
    for (name, b), marker in zip(solutions.items(), "ox", strict=False):
        off = violation(problem, b, a).clamp(min=LEAST)
        cost.plot(off.tolist(), problem.objective(b, a).tolist(), marker, fillstyle="none", label=name)
        rows.append(slack(problem, b, a))
    cost.axvline(feasibility_tol(problem), color="0.7", linewidth=1)
    cost.set(xscale="log", xlabel="violation", ylabel=problem.objective_name, xlim=(LEAST / 2, None))
    cost.legend(frameon=False)
    picture = torch.stack(rows, 1).flatten(0, 1).clamp(min=1e-5)
    shown = slacks.imshow(picture.cpu(), aspect="auto", cmap="magma", norm=LogNorm(1e-5, 1e1), interpolation="none")
    names = [name for _ in range(len(rows[0])) for name in solutions]
    slacks.set(xlabel="inequality", yticks=range(len(names)), yticklabels=names)
    for edge in range(len(solutions), len(names), len(solutions)):
        slacks.axhline(edge - 0.5, color="white", linewidth=1)
    figure.colorbar(shown, ax=slacks, label="slack; dark where active")
    return figure


def slack(problem: Any, b: Tensor, a: Context) -> Tensor:
    """Of each inequality of a polyhedron, how far the nearer of its bounds is ``(B, m)``: negative where it is broken."""
    A, lower, upper = polyhedron(problem, a)
    free = ~(lower == upper).all(0)
    ab = times(A, b.flatten(1))
    return torch.minimum(upper - ab, ab - lower)[:, free]
