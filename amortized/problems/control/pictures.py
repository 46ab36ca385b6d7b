"""Pictures of control: paths among the states (the phase portrait), and what was done to make them."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLORS, LINES = ("#1f4e8c", "#e07b39", "#5a8f5a", "#8c4a8c"), ("-", "--", ":", "-.")


class Portrait(NamedTuple):
    """How to show a system."""

    parts: tuple[int, int]
    """The two parts of a state that are shown."""
    names: tuple[str, str]
    limit: float
    """Of the control, to either side."""
    period: float
    """Seconds between two controls."""
    box: tuple[float, float] | None = None
    """Limits of the two parts, where there are any."""


def draw_plans(portrait: Portrait, paths: dict[str, Tensor], controls: dict[str, Tensor], few: int = 4) -> Figure:
    """Left, the paths of a few contexts by each method; right, the controls of each context.

    Args:
        portrait: what to show of the system.
        paths: ``(B, T + 1, d)``, by method.
        controls: ``(B, T, m)``, by method.
        few: contexts to show, at most.
    """
    from matplotlib.figure import Figure

    shown = min(few, len(next(iter(paths.values()))))
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = np.asarray(figure.subfigures(1, 2, width_ratios=(1, 1.1)))
    phase = left.subplots()
    for (name, path), line in zip(paths.items(), LINES, strict=False):
        for i in range(shown):
            x, y = path[i, :, list(portrait.parts)].detach().cpu().unbind(1)
            phase.plot(x, y, line, color=COLORS[i % len(COLORS)], linewidth=1.4, label=name if i == 0 else None)
            phase.plot(x[0], y[0], "o", color=COLORS[i % len(COLORS)], markersize=5)
    if portrait.box is not None:
        w, h = portrait.box
        phase.plot([-w, w, w, -w, -w], [-h, -h, h, h, -h], color="0.5", linewidth=1, label="limits")
    phase.set(xlabel=portrait.names[0], ylabel=portrait.names[1])
    phase.grid(color="#e5e7eb", linewidth=0.6)
    phase.legend(frameon=False, fontsize=8)
    for i, axes in enumerate(right.subplots(shown, 1, sharex=True, squeeze=False)[:, 0]):
        for plan, line in zip(controls.values(), LINES, strict=False):
            u = plan[i].detach().cpu()
            at = portrait.period * torch.arange(len(u))
            axes.step(at, u, line, where="post", color=COLORS[i % len(COLORS)], linewidth=1.4)
        for edge in (-portrait.limit, portrait.limit):
            axes.axhline(edge, color="0.5", linewidth=1)
        axes.set(ylim=(-1.15 * portrait.limit, 1.15 * portrait.limit), ylabel="control")
    axes.set_xlabel("time [s]")
    return figure
