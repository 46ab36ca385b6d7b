r"""Optimal transport between clouds of points, each point with the same weight; the potential as a function of the point.

The context is two clouds, whose points have no order: the network sees each through a mean over its points, and gives the
potential at a point of the first from that point and the two means.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from amortized.contexts.data_module import ContextDataModule
from amortized.networks import MLP
from amortized.problems.transport.entropic import Measure, Transport, log_density
from amortized.problems.transport.gaussians import gaussian_potential

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Clouds(NamedTuple):
    """B pairs of clouds of points."""

    x: Tensor
    """``(B, n, d)``."""
    y: Tensor
    """``(B, m, d)``."""


def uniform(points: Tensor) -> Tensor:
    """Equal weights ``(B, n)`` that sum to one."""
    return torch.full_like(points[..., 0], 1 / points.shape[1])


class CloudTransport(Transport):
    """The potential between two clouds of equally heavy points; solutions ``(B, n)``, one number for each ``x_i``.

    Args:
        network: ``Clouds -> (B, n)``, such as :class:`CloudPotential`.
        **kwargs: see :class:`~amortized.problems.transport.Transport`.
    """

    def measures(self, a: Clouds) -> tuple[Measure, Measure]:
        return Measure(uniform(a.x), a.x), Measure(uniform(a.y), a.y)

    def carry(self, b: Tensor, a: Clouds, points: Tensor) -> Tensor:
        """Where the plan takes further points ``(B, k, d)``, which were not in the cloud: ``(B, k, d)``.

        The potential ``f^c`` defines the plan's conditional at any point x: ``y_j`` with the weight
        ``exp((f^c_j - c(x, y_j)) / epsilon)`` (Pooladian & Niles-Weed 2021).
        """
        further = a._replace(x=points)
        u = log_density(self.transform(b, a) / self.epsilon, uniform(a.y)).unsqueeze(1)
        return (u - self.costs(further) / self.epsilon).softmax(2) @ a.y

    def draw(self, a: Clouds, solutions: dict[str, Tensor]) -> Figure:
        """The first two coordinates of both clouds, and arrows to where each solution takes the first one's points."""
        from matplotlib.figure import Figure

        n = len(a.x)
        figure = Figure(figsize=(2.2 * n, 2.3 * len(solutions)), layout="constrained")
        panels = figure.subplots(len(solutions), n, squeeze=False)
        for line, (name, b) in zip(panels, solutions.items(), strict=True):
            moved = self.decode(b, a).map.cpu()
            line[0].set_ylabel(name)
            for axes, x, y, to in zip(line, a.x.cpu(), a.y.cpu(), moved, strict=True):
                way = (to - x)[:, :2]
                axes.quiver(*x[:, :2].T, *way.T, angles="xy", scale_units="xy", scale=1, width=0.004, color="#9ca3af")
                axes.plot(*y[:, :2].T, "o", color="C1", markersize=2)
                axes.plot(*x[:, :2].T, "o", color="C0", markersize=2)
                axes.set(xticks=[], yticks=[], aspect="equal")
        return figure


class CloudPotential(nn.Module):
    r"""``f(x_i) = f_0(x_i) + rho(x_i, mean_k phi(x_k), mean_k psi(y_k))``, ``f_0`` the potential of Gaussians.

    The same for any order of the points, and defined for any number of them (Zaheer et al. 2017).

    Args:
        dimension: d, of the points.
        epsilon: the temperature of ``f_0``.
        features: width of the means.
        hidden: widths of the hidden layers of ``phi``, ``psi`` and ``rho``.
    """

    def __init__(self, dimension: int, epsilon: float, features: int = 64, hidden: Sequence[int] = (128, 128)) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.phi = MLP(dimension, features, hidden, "silu")
        self.psi = MLP(dimension, features, hidden, "silu")
        self.rho = MLP(dimension + 2 * features, 1, hidden, "silu")

    def forward(self, a: Clouds) -> Tensor:
        pooled = torch.cat([_at_each(self.phi, a.x).mean(1), _at_each(self.psi, a.y).mean(1)], 1)
        at = torch.cat([a.x, pooled.unsqueeze(1).expand(-1, a.x.shape[1], -1)], 2)
        gaussian = gaussian_potential(uniform(a.x), a.x, uniform(a.y), a.y, self.epsilon)
        return gaussian + _at_each(self.rho, at).squeeze(2)


def _at_each(network: nn.Module, points: Tensor) -> Tensor:
    values: Tensor = network(points.flatten(0, 1))
    return values.unflatten(0, points.shape[:2])


class MixtureClouds(ContextDataModule):
    """Clouds without end: each of ``points`` draws from a mixture of Gaussians of its own in the unit cube.

    Centres are uniform on [0, 1]^d, standard deviations log-uniform on [0.02, 0.2] for each component and axis, weights
    exponential; draws are clipped to the cube. With d = 3 they may be colours.

    Args:
        points: n and m, points in a cloud.
        dimension: d.
        components: of a mixture.
        **kwargs: see :class:`~amortized.ContextDataModule`.
    """

    def __init__(self, points: int = 64, dimension: int = 2, components: int = 5, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if min(points, dimension, components) < 1:
            raise ValueError(
                f"MixtureClouds: points, dimension and components must be at least 1; got {points}, {dimension}, {components}"
            )
        self.points, self.dimension, self.components = points, dimension, components

    def sample(self, n: int, generator: torch.Generator) -> Clouds:
        return Clouds(self._cloud(n, generator), self._cloud(n, generator))

    def _cloud(self, n: int, generator: torch.Generator) -> Tensor:
        def rand(*shape: int) -> Tensor:
            return torch.rand(n, *shape, generator=generator, device=generator.device)

        centres = rand(self.components, self.dimension)
        scales = 0.02 * 10 ** rand(self.components, self.dimension)
        weights = -rand(self.components).clamp_min(1e-6).log()
        chosen = torch.multinomial(weights, self.points, replacement=True, generator=generator).unsqueeze(2)
        noise = torch.randn(n, self.points, self.dimension, generator=generator, device=generator.device)
        return (centres.take_along_dim(chosen, 1) + scales.take_along_dim(chosen, 1) * noise).clamp(0, 1)
