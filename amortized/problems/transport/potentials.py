r"""Wasserstein-2 transport between two measures by one convex potential, whose conjugate a network predicts.

For measures alpha of x and beta of y in R^d and the cost ``|x - y|^2``, the potential f that minimizes the dual

    ``V(f) = E_alpha f(x) + E_beta f*(y)``,   ``f*(y) = max_x <x, y> - f(x)``

has in its gradient the map that carries alpha to beta at the least cost (Brenier 1991); the least cost is
``W_2^2 = E |x|^2 + E |y|^2 - 2 min V``. The maximum is a problem of its own at each y, and the one that is amortized here: the
context is y, the solution x, and

    ``L(x; y) = f(x) - <x, y>``,   so that   ``f*(y) = -min_x L(x; y)``.

Its solution carries y back to where it came from. By the theorem of Danskin the potential learns from solutions as they are,

    ``dV = E_alpha df(x) - E_beta df(x*(y))``,

so that no gradient of it goes through a solver, or through the network. The network learns by any loss, of f as it is.

Sources: Makkuva et al. (2020), *Optimal transport mapping via input convex neural networks*; Amos (2023), *On amortizing convex
conjugates for optimal transport*: the prediction finished by a solver, which makes all three losses work.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from amortized.losses import RegressionLoss
from amortized.module import AmortizedModule
from amortized.problems.transport.gaussians import square_root
from amortized.solvers import Solver

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Draws(NamedTuple):
    """B draws of each of two measures, independent of each other."""

    y: Tensor
    """``(B, d)``, of beta: where f is to be conjugated."""
    x: Tensor
    """``(B, d)``, of alpha."""


class Conjugated(NamedTuple):
    """B points, and the solutions that a solver found there."""

    y: Tensor
    """``(B, d)``."""
    conjugate: Tensor
    """``(B, d)``: what :class:`~amortized.losses.RegressionLoss` takes with ``field: conjugate``."""


class Wasserstein2(AmortizedModule):
    r"""The conjugate of a potential, and the potential with it. Solutions ``(B, d)``: ``argmax_x <x, y> - f(x)``.

    Contexts are :class:`Draws`; where the potential is given and frozen, points y ``(B, d)`` alone will do. The network sees y.
    Its losses: ``ObjectiveLoss``, the value of f*; ``FixedPointLoss`` with 0 steps, the cycle ``|grad f(x) - y|^2``;
    ``RegressionLoss(field="conjugate")``, the distance to what the solver makes of the prediction.

    Args:
        network: ``(B, d) -> (B, d)``.
        potential: f, ``(B, d) -> (B,)``, such as :class:`ConvexPotential`.
        conjugate: finishes the predictions that the potential learns from; ``None``: it learns from them as they are.
        freeze_potential: learn the conjugate of a potential that stays as it is.
        **kwargs: see :class:`~amortized.AmortizedModule`.

    Raises:
        ValueError: if the loss would remember solutions of a potential that changes.
    """

    objective_name = "f(x) − ⟨x, y⟩"
    free_settings = (*AmortizedModule.free_settings, "conjugate", "freeze_potential")

    def __init__(
        self,
        network: nn.Module,
        potential: nn.Module,
        conjugate: Solver | None = None,
        freeze_potential: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(network, **kwargs)
        self.potential = potential.requires_grad_(not freeze_potential)
        self.conjugate = conjugate
        self.learns = any(p.requires_grad for p in potential.parameters())
        if self.learns and isinstance(self.loss, RegressionLoss) and self.loss.solver is not None:
            raise ValueError(
                "Wasserstein2: RegressionLoss(solver) remembers solutions, and this potential changes: write field: conjugate in "
                "place of solver, and give the solver as model.conjugate; or set freeze_potential"
            )

    def observe(self, a: Any) -> Tensor:
        """What the network sees, y alone."""
        return a if isinstance(a, Tensor) else a.y

    def objective(self, b: Tensor, a: Any) -> Tensor:
        """Of the potential as it is: what it learns comes from :meth:`amortized_step` alone."""
        fixed = {name: p.detach() for name, p in self.potential.named_parameters()}
        f: Tensor = functional_call(self.potential, fixed, (b,))
        return f - (b * self.observe(a)).sum(1)

    def optimum(self, a: Any) -> Tensor | None:
        """``-f*(y)``, where the potential has its conjugate in closed form; else ``None``."""
        known = getattr(self.potential, "conjugate", None)
        return None if known is None else -known(self.observe(a))

    def update(self, b: Tensor, a: Any) -> Tensor:
        """``x - (grad f(x) - y)``, whose fixed points are the solutions."""
        return b - self.transport(b) + self.observe(a)

    def initial(self, a: Any) -> Tensor:
        """At y itself, as if no mass moved."""
        return self.observe(a).clone()

    def amortized_step(self, a: Any) -> Tensor:
        """The loss, and ``f(x) - f(x*(y))`` of the potential at the solutions as they are."""
        if not self.learns:
            return super().amortized_step(a)
        with torch.no_grad():
            b = self(a)
        if self.conjugate is not None:
            b = self.conjugate.solve(self, a.y, b).b
        signal = super().amortized_step(Conjugated(a.y, b))
        return signal + self.potential(a.x) - self.potential(b)

    def transport(self, x: Tensor) -> Tensor:
        """``grad f(x)``, where the mass at x ``(B, d)`` goes; keeps the graph where gradients are taken."""
        keep = torch.is_grad_enabled() and x.requires_grad
        with torch.enable_grad():
            x = x if keep else x.detach().requires_grad_()
            fixed = {name: p.detach() for name, p in self.potential.named_parameters()}
            f: Tensor = functional_call(self.potential, fixed, (x,))
            (moved,) = torch.autograd.grad(f.sum(), x, create_graph=keep)
        return moved

    def dual_value(self, b: Tensor, a: Draws) -> Tensor:
        """``f(x) + <x*, y> - f(x*)`` of each pair of draws ``(B,)``, with ``x*`` given by b; V is its mean."""
        with torch.no_grad():
            value: Tensor = self.potential(a.x) - self.objective(b, a)
        return value

    def draw(self, a: Any, solutions: dict[str, Tensor]) -> Figure | None:
        """Where points in the plane came from; ``None`` in other dimensions."""
        from matplotlib.figure import Figure

        y = self.observe(a).cpu()
        if y.shape[1] != 2:
            return None
        figure = Figure(figsize=(4, 4), layout="constrained")
        axes = figure.subplots()
        axes.plot(*y.T, "o", color="C1", label="y")
        for (name, b), colour, width in zip(solutions.items(), ("C3", "C0"), (0.012, 0.005), strict=False):
            way = b.detach().cpu() - y
            axes.quiver(*y.T, *way.T, angles="xy", scale_units="xy", scale=1, width=width, color=colour, label=name)
        axes.set_aspect("equal", "datalim")
        axes.legend(frameon=False)
        return figure


class ConvexPotential(nn.Module):
    r"""``f(x) = |x|^2 mu / 2 + |L x|^2 / 2 + <v, x> + w^T z_K(x)``, mu-strongly convex; L is square, the identity at first.

    ``z_1 = s(A_1 x + c_1)``, ``z_k = s(W_k z_(k-1) + A_k x + c_k)``, with s the softplus, and W and w positive: sums and growing
    convex functions of convex functions are convex. The first weights are large and the c spread out, so that the layers bend
    all over the data, which should have coordinates of size about one: nearly linear ones take long to learn to.

    Source: Amos, Xu & Kolter (2017), *Input convex neural networks*.

    Args:
        dimension: d.
        hidden: widths of the layers z.
        strong_convexity: mu; so the map is never flatter, and the conjugate exists everywhere.

    Raises:
        ValueError: if ``strong_convexity`` is not positive, or there is no layer.
    """

    def __init__(self, dimension: int, hidden: Sequence[int] = (64, 64), strong_convexity: float = 0.1) -> None:
        super().__init__()
        if not strong_convexity > 0 or not hidden:
            raise ValueError(
                f"ConvexPotential: strong_convexity must be positive and hidden name a layer; got {strong_convexity}, {hidden}"
            )
        self.mu = strong_convexity
        straight = [nn.Linear(dimension, width) for width in hidden]
        for layer in straight:
            nn.init.normal_(layer.weight, std=3 / dimension**0.5)
            nn.init.uniform_(layer.bias, -3, 3)
        self.straight = nn.ModuleList(straight)
        pairs = zip(hidden, [*hidden[1:], 1], strict=True)
        self.log_weights = nn.ParameterList(torch.randn(out, inward).mul(0.5).sub(1) for inward, out in pairs)
        self.root = nn.Parameter(torch.eye(dimension))
        self.slope = nn.Parameter(torch.zeros(dimension))

    def forward(self, x: Tensor) -> Tensor:
        z = torch.zeros_like(x[:, :0])
        for straight, before in zip(self.straight, [None, *self.log_weights[:-1]], strict=True):
            inward = straight(x)
            z = nn.functional.softplus(inward if before is None else inward + z @ _mean(before))
        quadratic = self.mu * x.square().sum(1) + (x @ self.root).square().sum(1)
        return quadratic / 2 + x @ self.slope + (z @ _mean(self.log_weights[-1])).squeeze(1)


def _mean(log_weights: Tensor) -> Tensor:
    """Positive weights ``(in, out)``, of the size of one over their number."""
    return log_weights.exp().mT / log_weights.shape[1]


class GaussianPotential(nn.Module):
    """``f(x) = (x - m)^T A (x - m) / 2 + <n, x>``: that from N(m, S) to N(n, R), with its conjugate; nothing to learn.

    ``A = S^(-1/2) (S^(1/2) R S^(1/2))^(1/2) S^(-1/2)``, and the map is ``x -> n + A (x - m)``.

    Source: Peyré & Cuturi (2019), *Computational optimal transport*, remark 2.31.

    Args:
        source_mean: m, d numbers.
        source_covariance: S, d times d numbers; positive definite.
        target_mean: n.
        target_covariance: R; positive definite.
    """

    m: Tensor
    n: Tensor
    A: Tensor

    def __init__(
        self,
        source_mean: Sequence[float] | Tensor,
        source_covariance: Sequence[Sequence[float]] | Tensor,
        target_mean: Sequence[float] | Tensor,
        target_covariance: Sequence[Sequence[float]] | Tensor,
    ) -> None:
        super().__init__()
        m, S, n, R = (
            torch.as_tensor(part, dtype=torch.float64)
            for part in (source_mean, source_covariance, target_mean, target_covariance)
        )
        root = square_root(S[None])[0]
        inverse = torch.linalg.inv(root)
        A = inverse @ square_root((root @ R @ root)[None])[0] @ inverse
        self.W2_squared = float((m - n).square().sum() + (S + R - 2 * S @ A).trace())
        for name, part in (("m", m), ("n", n), ("A", A)):
            self.register_buffer(name, part.float())

    def forward(self, x: Tensor) -> Tensor:
        apart = x - self.m
        return ((apart @ self.A) * apart).sum(1) / 2 + x @ self.n

    def carry(self, x: Tensor) -> Tensor:
        """The map from source to target."""
        return self.n + (x - self.m) @ self.A

    def carry_back(self, y: Tensor) -> Tensor:
        """The map from target to source, where the conjugate's maximum is."""
        return self.m + torch.linalg.solve(self.A, (y - self.n).mT).mT

    def conjugate(self, y: Tensor) -> Tensor:
        """``f*(y)``, ``(B,)``."""
        x = self.carry_back(y)
        return (x * y).sum(1) - self(x)
