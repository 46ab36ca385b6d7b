r"""Classification of images, seen as amortized optimization over the simplex.

An image comes with a distribution ``p`` over the ten classes: 1 at its label, smoothed. Its solution, the logits ``b``
of a distribution, minimizes the cross-entropy

    ``L(b; a) = -sum_k p_k log softmax(b)_k = H(p) + KL(p || softmax(b))``,

at ``b = log p``. Given ``p`` that is easy; the difficulty is all in the amortization, for the model observes the image
alone. So a classifier is an amortized optimizer, and its gap on held-out images is ``KL(p || softmax(b))``.

That gap is the usual test cross-entropy less a constant: the solver is told the label, so where classes look alike no model of
the image could close it, and it does not say how well a solver was replaced. It ranks models as the likelihood does; how many are
right, and whether 90 % means 90 %, :class:`~amortized.problems.classification.Accuracy` measures beside it.

Source: Shu (2017), *Amortized optimization*, where classification stands in, supervised, for a survival problem.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.distributions import constraints

from amortized.contexts.images import show
from amortized.module import AmortizedModule

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Labelled(NamedTuple):
    """B images with the distributions to be found."""

    image: Tensor
    """``(B, pixels)``: square images, in [0, 1]."""
    target: Tensor
    """``p``: ``(B, 10)``, on the simplex."""


class _Simplex(constraints.Constraint):
    """As ``constraints.simplex``, whose sums must be 1 to 1e-6, which those of many classes or in half precision are not."""

    event_dim = 1

    def check(self, value: Tensor) -> Tensor:
        return (value >= 0).all(-1) & ((value.sum(-1) - 1).abs() < 1e-2)


class Classification(AmortizedModule):
    """The class distribution of an image. Solutions ``(B, 10)``: logits; only the image is observed."""

    objective_name = "cross-entropy (nats)"

    def objective(self, b: Tensor, a: Labelled) -> Tensor:
        return -(a.target * b.log_softmax(1)).sum(1)

    def optimum(self, a: Labelled) -> Tensor:
        """The minimal value, ``H(p)`` of shape ``(B,)``, at ``b = log p``."""
        return -torch.xlogy(a.target, a.target).sum(1)

    def support(self) -> dict[str, constraints.Constraint]:
        """A target is a distribution over the classes."""
        return {"target": _Simplex()}

    def observe(self, a: Labelled) -> Tensor:
        """The image ``(B, pixels)``."""
        return a.image

    def decode(self, b: Tensor, a: Labelled) -> Tensor:
        """The distribution ``softmax(b)``, ``(B, 10)``."""
        return b.softmax(1)

    def draw(self, a: Labelled, solutions: dict[str, Tensor]) -> Figure:
        """The images, and below each the network's distribution beside the solver's, which is given the target."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(1.3 * len(a.image), 2.6), layout="constrained")
        images, bars = figure.subplots(2, len(a.image), squeeze=False, sharey="row")
        for i, (above, below) in enumerate(zip(images, bars, strict=True)):
            show(above, a.image[i])
            above.set_axis_off()
            for k, (name, b) in enumerate(solutions.items()):
                below.bar(
                    [c + 0.4 * k - 0.2 for c in range(10)],
                    self.decode(b, a)[i].tolist(),
                    width=0.4,
                    color=f"C{k}",
                    label=name,
                )
            below.set(xticks=range(10), ylim=(0, 1))
            below.tick_params(labelsize=6)
        figure.legend(*bars[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
        return figure
