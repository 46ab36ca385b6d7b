"""Few-shot classification: which of N classes, each known from a few examples."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from amortized.problems.meta.few_shot import Embedded, FewShot

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class FewShotClassification(FewShot):
    """Few-shot classification by cross-entropy; ``y`` are labels ``(B, K)``, the template puts out a logit for each class."""

    objective_name = "query cross-entropy (nats)"

    def error(self, out: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(out.movedim(-1, 1), y.long(), reduction="none")

    def classes(self, b: Tensor, a: Any) -> Tensor:
        """The likeliest class of each query point, ``(B, Q)``."""
        return self.template.head(b, self.prepare(a, support=False).query_x).argmax(-1)

    def accuracy(self, b: Tensor, a: Any) -> Tensor:
        """The share of query points that are classified rightly, ``(B,)``."""
        there = self.prepare(a, support=False).query_mask
        return ((self.classes(b, a) == a.query_y) * there).sum(1) / there.sum(1).clamp(min=1)

    def draw(self, a: Any, solutions: dict[str, Tensor]) -> Figure | None:
        """Of each task an example of each class, and beneath query images that the network takes for that class; red: wrongly."""
        from matplotlib.figure import Figure
        from matplotlib.patches import Rectangle

        guess, labels = self.classes(solutions["network"], a).cpu(), a.support_y.cpu()
        n, ways, shown = len(guess), int(labels.max()) + 1, 4
        side = a.support_x.shape[-1]
        columns = min(n, 4)
        rows = -(-n // columns)
        figure = Figure(figsize=(2.2 * columns, 2.2 * rows * (shown + 1) / ways), layout="constrained")
        for i, axes in enumerate(figure.subplots(rows, columns, squeeze=False).flat):
            axes.set_axis_off()
            if i >= n:
                continue
            page = torch.zeros(side * (shown + 1), side * ways)
            for k in range(ways):
                page[:side, side * k :][:, :side] = a.support_x[i, (labels[i] == k).nonzero()[0, 0]]
                for row, j in enumerate((guess[i] == k).nonzero()[:shown, 0].tolist(), 1):
                    page[side * row :, side * k :][:side, :side] = a.query_x[i, j]
                    if a.query_y[i, j] != k:
                        at = (side * k, side * row)
                        axes.add_patch(Rectangle(at, side - 1, side - 1, fill=False, edgecolor="C3"))
            axes.imshow(page.numpy(), cmap="gray_r", vmin=0, vmax=1)
            axes.axhline(side - 0.5, color="0.5", linewidth=0.8)
        return figure


class Prototypes(nn.Module):
    """``w_k = 2 s c_k, v_k = -s |c_k|^2``, with c_k the mean of class k: the linear layer that decides by the nearest mean.

    Its logits are ``-s |x - c_k|^2`` but for what all classes share; the scale s is learned. For a template with ``adapt: last``.
    A class without an example has a logit of -1000: tasks may have fewer classes than the model.

    Source: Snell, Swersky & Zemel (2017), *Prototypical networks for few-shot learning*, section 2.4.

    Args:
        ways: N, the number of classes.
        scale: s at first, in units of one over the number of features.
    """

    def __init__(self, ways: int, scale: float = 10.0) -> None:
        super().__init__()
        self.ways = ways
        self.log_scale = nn.Parameter(torch.tensor(scale).log())

    def forward(self, a: Embedded) -> Tensor:
        x = a.support_x.flatten(2)
        member = nn.functional.one_hot(a.support_y.long(), self.ways).to(x) * a.support_mask.unsqueeze(2)
        count = member.sum(1)
        c = (member / count.unsqueeze(1).clamp(min=1)).mT @ x
        s = self.log_scale.exp() / x.shape[2]
        return torch.cat([2 * s * c.flatten(1), torch.where(count > 0, -s * c.square().sum(2), -1000.0)], 1)
