r"""Deep equilibrium models: a network whose last layer is where a map comes to rest.

For an input x the state ``z ∈ ℝⁿ`` is the fixed point of

    ``T(z; x) = tanh(A z + U x + c)``,

and the output is ``W z + d``. A is kept to ``‖A‖₂ ≤ κ < 1``, so T is a contraction: there is one fixed point, and every start
leads to it. :class:`~amortized.solvers.Anderson` finds it; the gradient is that of the
fixed point by the implicit function theorem (:class:`~amortized.solvers.Implicit`), at the memory of one application of T.

So :class:`Equilibrium` is a network for any problem, :class:`~amortized.problems.Classification` in the recipe; and finding its
state is a problem in its turn, :class:`EquilibriumState`, whose solution a second network can predict: a learned start.

Sources: Bai, Kolter & Koltun (2019), *Deep equilibrium models*; Bai, Koltun & Kolter (2022), *Neural deep equilibrium solvers*,
for the learned start.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from amortized.module import AmortizedModule
from amortized.solvers import Anderson, Implicit, Solution, Solver

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class _Layer:
    """T, for a matrix and inputs that were worked out once: the context is ``U x + c``, ``(B, n)``."""

    def __init__(self, A: Tensor) -> None:
        self.A = A

    def update(self, b: Tensor, a: Tensor) -> Tensor:
        return (b @ self.A.T + a).tanh()


class Equilibrium(nn.Module):
    """``W z* + d`` with ``z* = T(z*; x)``: ``(B, in_features) -> (B, out_features)``.

    Args:
        in_features: numbers in an input.
        out_features: numbers in an output.
        features: n, numbers in the state.
        contraction: κ, the most that the spectral norm of A may be.
        solver: finds the fixed point, from zero; ``None``: :class:`~amortized.solvers.Anderson`, to 1e-4 in float32.

    Raises:
        ValueError: if ``contraction`` is not in (0, 1).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        features: int = 64,
        contraction: float = 0.95,
        solver: Solver | None = None,
    ) -> None:
        super().__init__()
        if not 0 < contraction < 1:
            raise ValueError(
                f"Equilibrium: contraction must be in (0, 1), or there may be no fixed point; got {contraction}"
            )
        self.contraction = contraction
        self.inward, self.outward = nn.Linear(in_features, features), nn.Linear(features, out_features)
        self.recurrent = nn.Parameter(torch.randn(features, features) / features**0.5)
        self.solver = Implicit(Anderson(steps=100) if solver is None else solver)

    def matrix(self) -> Tensor:
        """A, ``(n, n)``: what is learned, scaled down to κ where its norm is above."""
        M = self.recurrent
        return M * (self.contraction / torch.linalg.matrix_norm(M, 2)).clamp(max=1)

    def update(self, b: Tensor, a: Tensor) -> Tensor:
        """``T(z; x)``, for states ``b`` ``(B, n)`` and inputs ``a`` ``(B, in_features)``."""
        return _Layer(self.matrix()).update(b, self.inward(a))

    def initial(self, a: Tensor) -> Tensor:
        """The state that a search starts from, ``(B, n)``: zero."""
        return a.new_zeros(len(a), len(self.recurrent))

    def solve(self, a: Tensor, start: Tensor | None = None) -> Solution:
        """The states of inputs, without a graph, and what it took to find them."""
        with torch.no_grad():
            problem: Any = _Layer(self.matrix())
            return self.solver.solve(problem, self.inward(a), self.initial(a) if start is None else start)

    def forward(self, a: Tensor) -> Tensor:
        problem: Any = _Layer(self.matrix())
        (state,) = self.solver.iterates(problem, self.inward(a), self.initial(a))
        output: Tensor = self.outward(state)
        return output


class EquilibriumState(AmortizedModule):
    """``min_z ½ ‖T(z; x) − z‖²``: the state of a deep equilibrium model, to start its solver from.

    Contexts are the model's inputs, solutions its states. The model is not trained here. Best trained by
    :class:`~amortized.losses.FixedPointLoss`, which judges a start by what a few applications of T make of it.

    Args:
        network: ``(B, in_features) -> (B, n)``.
        model: whose map T is.
        **kwargs: see :class:`~amortized.AmortizedModule`.
    """

    objective_name = "half the squared residual"

    def __init__(self, network: nn.Module, model: Equilibrium, **kwargs: Any) -> None:
        super().__init__(network, **kwargs)
        self.model = model.requires_grad_(False)

    def update(self, b: Tensor, a: Tensor) -> Tensor:
        """The model's map."""
        return self.model.update(b, a)

    def objective(self, b: Tensor, a: Tensor) -> Tensor:
        return (self.update(b, a) - b).square().sum(1) / 2

    def optimum(self, a: Tensor) -> Tensor:
        """Zero: there is a fixed point."""
        return a.new_zeros(len(a))

    def initial(self, a: Tensor) -> Tensor:
        return self.model.initial(a)

    def draw(self, a: Tensor, solutions: dict[str, Tensor]) -> Figure:
        """The states, number by number."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(2 * len(a), 2.2), layout="constrained")
        for i, axes in enumerate(figure.subplots(1, len(a), squeeze=False, sharey="row")[0]):
            for (name, b), style in zip(solutions.items(), ("-", ":"), strict=False):
                axes.plot(b[i].cpu(), style, label=name)
            axes.set(xlabel="unit of the state", ylim=(-1, 1))
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
        return figure
