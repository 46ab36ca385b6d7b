r"""Sparse coding: the few atoms of a dictionary that a signal is made of.

A context is a signal ``a``, a solution its code ``b``, one number for each of the n columns of a dictionary D, and

    ``L(b; a) = ½ ‖D b − a‖² + λ ‖b‖₁``,

the lasso, convex, with minima on kinks: most entries of a solution are zero. With ``smooth`` and ``prox`` it has a solver,
:class:`~amortized.solvers.FISTA`; a step of ISTA, plain proximal gradient, is a map whose fixed points are the solutions
(``update``), for :class:`~amortized.solvers.Anderson` and :class:`~amortized.losses.FixedPointLoss`.

With a dictionary that learns (``learn: true``) atoms and network train jointly on the same objective: dictionary learning.

Sources: Olshausen & Field (1996); Beck & Teboulle (2009), FISTA; Gregor & LeCun (2010), *Learning fast approximations of
sparse coding*: the network that predicts codes.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn

from amortized.contexts.images import show
from amortized.module import AmortizedModule
from amortized.problems.coding.dictionaries import Dictionary
from amortized.solvers.structured import proximal

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Code(NamedTuple):
    """B decoded codes."""

    code: Tensor
    """``b``, ``(B, n)``."""
    signal: Tensor
    """What it stands for, ``D b``, ``(B, m)``."""


class SparseCoding(AmortizedModule):
    """The sparse code of a signal. Contexts ``(B, m)``, solutions ``(B, n)``.

    Args:
        network: ``(B, m) -> (B, n)``.
        dictionary: D.
        weight: λ, in units of ``‖a‖²`` over those of b.
        patches: whether signals are square patches of an image, to be drawn as such.
        **kwargs: see :class:`~amortized.AmortizedModule`.

    Raises:
        ValueError: if ``weight`` is not positive.
    """

    objective_name = "lasso"

    def __init__(
        self,
        network: nn.Module,
        dictionary: Dictionary,
        weight: float = 0.005,
        patches: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(network, **kwargs)
        if not weight > 0:
            raise ValueError(f"SparseCoding: weight must be positive; got {weight}")
        self.dictionary, self.weight, self.patches = dictionary, weight, patches

    def smooth(self, b: Tensor, a: Tensor) -> Tensor:
        """``½ ‖D b − a‖²``."""
        return (b @ self.dictionary().T - a).square().sum(1) / 2

    def objective(self, b: Tensor, a: Tensor) -> Tensor:
        return self.smooth(b, a) + self.weight * b.abs().sum(1)

    def prox(self, b: Tensor, t: Tensor, a: Tensor) -> Tensor:
        """Soft thresholding by ``λ t``."""
        return proximal.l1(b, self.weight * t)

    def update(self, b: Tensor, a: Tensor) -> Tensor:
        """A step of ISTA, ``soft(b − Dᵀ(D b − a) / C, λ / C)`` with ``C = ‖D‖₂²``."""
        D, step = self.dictionary(), 1 / self.dictionary.curvature()
        return self.prox(b - step * (b @ D.T - a) @ D, step.expand(len(b)), a)

    def initial(self, a: Tensor) -> Tensor:
        return a.new_zeros(len(a), self.dictionary.atoms.shape[1])

    def decode(self, b: Tensor, a: Tensor) -> Code:
        """The code and the signal that it stands for."""
        return Code(b, b @ self.dictionary().T)

    def draw(self, a: Tensor, solutions: dict[str, Tensor]) -> Figure:
        """The codes, entry by entry; above, where signals are patches, those and what the codes stand for."""
        from matplotlib.figure import Figure

        side = math.isqrt(a.shape[1]) if self.patches else 0
        rows = 1 + (1 + len(solutions)) * bool(side)
        figure = Figure(figsize=(2 * len(a), 1.4 * rows + 0.8), layout="constrained")
        grid = figure.subplots(rows, len(a), squeeze=False, sharey="row")
        for i, axes in enumerate(grid.T):
            shown = {"signal": a, **{name: self.decode(b, a).signal for name, b in solutions.items()}} if side else {}
            top = a[i].abs().max()
            for above, (name, signal) in zip(axes, shown.items(), strict=False):
                show(above, 0.5 - signal[i] / (2 * top))
                above.set(xticks=[], yticks=[], ylabel="" if i else name)
            for k, (name, b) in enumerate(solutions.items()):
                used = b[i].nonzero()[:, 0].cpu()
                axes[-1].vlines(used + 0.3 * k, 0, b[i].cpu()[used], color=f"C{k}", label=name)
            axes[-1].axhline(0, color="0.7", linewidth=0.5, zorder=0)
            axes[-1].set(xlabel="atom", xlim=(-1, b.shape[1]))
        grid[-1, 0].set_ylabel("code")
        figure.legend(*grid[-1, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
        return figure
