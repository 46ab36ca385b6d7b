"""Few-shot regression: the function that goes through a few points."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from amortized.problems.meta.few_shot import FewShot, mask, points

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class FewShotRegression(FewShot):
    """Few-shot regression by squared error; ``y`` ``(B, K)``, or ``(B, K, d)`` for the d outputs of the template."""

    objective_name = "query error"

    def error(self, out: Tensor, y: Tensor) -> Tensor:
        return (out - points(y)).square().flatten(2).mean(2)

    def draw(self, a: Any, solutions: dict[str, Tensor]) -> Figure | None:
        """The points of each task and the function that each solution is; of one variable, else nothing."""
        xs = torch.cat([points(a.support_x), points(a.query_x)], 1)
        if xs.shape[2:] != (1,):
            return None
        from matplotlib.figure import Figure

        n, x = len(xs), torch.linspace(float(xs.min()), float(xs.max()), 201, dtype=xs.dtype, device=xs.device)
        curves = {name: self.template(b, x.view(1, -1, 1).expand(n, -1, -1)).cpu() for name, b in solutions.items()}
        figure = Figure(figsize=(10, 1.8 * math.ceil(n / 4) + 0.4), layout="constrained")
        panels = figure.subplots(math.ceil(n / 4), 4, squeeze=False, sharey=True).flat
        for i, axes in enumerate(panels):
            if i >= n:
                axes.set_axis_off()
                continue
            for (name, curve), style in zip(curves.items(), ("-", ":"), strict=False):
                axes.plot(x.cpu(), curve[i, :, 0], style, color="C3", label=name)
            for part, marker in (("support", "ok"), ("query", "xk")):
                there = mask(a, part)[i]
                at, y = (points(getattr(a, f"{part}_{of}"))[i, there, 0].cpu() for of in "xy")
                axes.plot(at, y, marker, markersize=4, label=part)
            axes.set(xticks=[])
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
        return figure
