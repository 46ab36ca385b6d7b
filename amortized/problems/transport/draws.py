"""Draws of two measures: Gaussians, between which the transport is known, and shapes in the plane."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from amortized.contexts.data_module import ContextDataModule
from amortized.problems.transport.potentials import Draws, GaussianPotential


class GaussianPair(ContextDataModule):
    """Draws of two Gaussians, of which the transport is known: ``known`` has the potential, the maps and the cost.

    Means are normal with standard deviation 0.5, standard deviations along random axes log-uniform on [0.5, 2].

    Args:
        dimension: d.
        pair: which pair of Gaussians; another number, other ones.
        **kwargs: see :class:`~amortized.ContextDataModule`.
    """

    def __init__(self, dimension: int = 2, pair: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if dimension < 1:
            raise ValueError(f"GaussianPair: dimension must be at least 1; got {dimension}")
        generator = torch.Generator().manual_seed(pair)
        self.means = torch.randn(2, dimension, generator=generator) / 2
        axes = torch.linalg.qr(torch.randn(2, dimension, dimension, generator=generator)).Q
        self.roots = axes * 0.5 * 4 ** torch.rand(2, 1, dimension, generator=generator)
        (m, n), (S, R) = self.means, self.roots.double() @ self.roots.mT.double()
        self.known = GaussianPotential(m, S, n, R)

    def sample(self, n: int, generator: torch.Generator) -> Draws:
        device = generator.device
        z = torch.randn(2, n, self.means.shape[1], generator=generator, device=device)
        x, y = self.means.to(device).unsqueeze(1) + z @ self.roots.to(device).mT
        return Draws(y, x)


class Shapes(ContextDataModule):
    """Draws of two shapes in the plane: ``gaussian``, ``eight`` Gaussians on a circle, ``moons``, ``spiral``, ``checkerboard``.

    All lie around the origin, with coordinates of size about one.

    Args:
        source: alpha, of which x is drawn.
        target: beta, of which y is drawn.
        **kwargs: see :class:`~amortized.ContextDataModule`.

    Raises:
        ValueError: if there is no such shape.
    """

    def __init__(self, source: str = "gaussian", target: str = "eight", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in (source, target):
            if name not in SHAPES:
                raise ValueError(f"Shapes: source and target must be one of {', '.join(SHAPES)}; got {name!r}")
        self.source, self.target = source, target

    def sample(self, n: int, generator: torch.Generator) -> Draws:
        return Draws(SHAPES[self.target](n, generator), SHAPES[self.source](n, generator))


def _rand(n: int, generator: torch.Generator) -> Tensor:
    return torch.rand(n, generator=generator, device=generator.device)


def _noise(n: int, generator: torch.Generator) -> Tensor:
    return torch.randn(n, 2, generator=generator, device=generator.device)


def _turned(radius: Tensor | float, angle: Tensor) -> Tensor:
    """The points ``(n, 2)`` at these radii and angles."""
    return torch.stack([radius * angle.cos(), radius * angle.sin()], 1)


def _eight(n: int, generator: torch.Generator) -> Tensor:
    return _turned(1.5, (8 * _rand(n, generator)).floor() * math.pi / 4) + 0.15 * _noise(n, generator)


def _moons(n: int, generator: torch.Generator) -> Tensor:
    angle = 2 * math.pi * _rand(n, generator)
    lower = (angle > math.pi).unsqueeze(1)
    shift = torch.where(lower, angle.new_tensor([0.5, 0.25]), angle.new_tensor([-0.5, -0.25]))
    return _turned(1.0, angle) + shift + 0.08 * _noise(n, generator)


def _spiral(n: int, generator: torch.Generator) -> Tensor:
    along = _rand(n, generator).sqrt()
    return _turned(1.8 * along, 3 * math.pi * along) + 0.08 * _noise(n, generator)


def _checkerboard(n: int, generator: torch.Generator) -> Tensor:
    across, up = (4 * _rand(n, generator) for _ in range(2))
    column = across.floor()
    row = 2 * (up / 2).floor() + column % 2
    return torch.stack([across - 2, (row + up % 1) - 2], 1)


SHAPES: dict[str, Callable[[int, torch.Generator], Tensor]] = {
    "gaussian": _noise,
    "eight": _eight,
    "moons": _moons,
    "spiral": _spiral,
    "checkerboard": _checkerboard,
}
"""``(n, generator) -> (n, 2)``."""
