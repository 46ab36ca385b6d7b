r"""Optimal transport between histograms on a square grid, and pairs of images as such histograms.

The squared distance on a grid is a sum over the two axes, so ``exp(-C / epsilon)`` is a Kronecker product: a convolution with
it is one along each axis, 28 x 28 in place of 784 x 784 for MNIST, and no matrix of all pairs is ever made.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

from amortized.contexts.images import Dataset, Images, handwritten_digits
from amortized.contract import Context
from amortized.networks import MLP
from amortized.problems.transport.entropic import Measure, Transport

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Histograms(NamedTuple):
    """B pairs of histograms on one grid, each row of each sums to one."""

    alpha: Tensor
    """``(B, side * side)``."""
    beta: Tensor
    """``(B, side * side)``."""


class HistogramTransport(Transport):
    r"""The potential between histograms on a ``side x side`` grid on the unit square; the cost is the squared distance.

    The convolution along an axis is, exactly, a logarithm of a sum of exponentials, or a matrix product of exponentials. The
    product is much faster, and as good where exponents of ``1 / epsilon`` fit the number format. With ``x`` counted from
    the middle of the axis,

        ``log sum_i exp(u_i - (x_i - y_j)^2 / epsilon) = t_j + log sum_i exp(v_i + s) exp(2 x_i y_j / epsilon)``,
        ``v_i = u_i - x_i^2 / epsilon - max_k (u_k - x_k^2 / epsilon)``,

    exponents of the matrix are at most ``R / 2`` in size, ``R = 1 / epsilon``, and the largest term of any sum has ``v_i >= -R``:
    it and all that matter beside it are normal numbers, if ``s`` makes the largest product just fit. So it is whatever ``u`` is,
    for ``epsilon`` down to 0.01 in float32 and 0.0012 in float64. Below, the sum is taken in the log domain.

    Args:
        network: ``Histograms -> (B, side * side)``.
        side: of the grid, in points, two at least.
        epsilon: the temperature, where the square has side 1.
        **kwargs: see :class:`~amortized.problems.transport.Transport`.
    """

    axis: Tensor
    points: Tensor

    def __init__(self, network: nn.Module, side: int = 8, epsilon: float = 0.01, **kwargs: Any) -> None:
        super().__init__(network, epsilon=epsilon, **kwargs)
        if side < 2:
            raise ValueError(f"HistogramTransport: side must be at least 2; got {side}")
        self.side = side
        axis = torch.linspace(0, 1, side)
        self.register_buffer("axis", axis, persistent=False)
        self.register_buffer("points", torch.cartesian_prod(axis, axis), persistent=False)

    def measures(self, a: Histograms) -> tuple[Measure, Measure]:
        return Measure(a.alpha, self.points), Measure(a.beta, self.points)

    def log_convolve(self, u: Tensor, a: Context, epsilon: float, back: bool = False) -> Tensor:
        grid = u.unflatten(1, (self.side, self.side))
        for _ in range(2):
            grid = self._along_last_axis(grid, 1 / epsilon).mT
        return grid.flatten(1)

    def _along_last_axis(self, u: Tensor, R: float) -> Tensor:
        x, limits = self.axis - 0.5, torch.finfo(u.dtype)
        shift = math.log(limits.max) - R / 2 - math.log(self.side) - 1
        if shift - R < math.log(limits.tiny / limits.eps):  # numbers that matter would underflow
            costs = (self.axis - self.axis.unsqueeze(1)).square()
            return (u.unsqueeze(-1) - R * costs).logsumexp(-2)
        tilt = R * x.square()
        v = u - tilt
        top = v.amax(-1, keepdim=True).detach() - shift
        sums = (v - top).exp() @ (2 * R * torch.outer(x, x)).exp()
        return sums.log() + top - tilt

    def draw(self, a: Histograms, solutions: dict[str, Tensor]) -> Figure:
        """Each pair of images with the way from one to the other by each solution's plan, at four steps between."""
        from matplotlib.figure import Figure

        times = torch.linspace(0, 1, 6)[1:-1].tolist()
        names = list(solutions)
        ways = {name: self.interpolate(b, a, times) for name, b in solutions.items()}
        n = len(a.alpha)
        figure = Figure(figsize=(0.8 * n * len(names) + 0.3, 0.8 * (len(times) + 2) + 0.5), layout="constrained")
        panels = figure.subplots(len(times) + 2, n * len(names), squeeze=False)
        for k, name in enumerate(names):
            columns = [a.alpha, *ways[name], a.beta]
            for row, images in enumerate(columns):
                for i in range(n):
                    axes = panels[row, i * len(names) + k]
                    axes.imshow(images[i].unflatten(0, (self.side, self.side)).cpu().numpy(), cmap="gray_r", vmin=0)
                    axes.set(xticks=[], yticks=[])
            for i in range(n):
                panels[0, i * len(names) + k].set_title(name, fontsize=7)
        return figure

    def interpolate(self, b: Tensor, a: Histograms, times: list[float]) -> list[Tensor]:
        """What lies between ``alpha`` (time 0) and ``beta`` (time 1) on the plan's straight ways: images ``(B, n)`` at each time.

        The mass ``P_ij`` is at ``(1 - t) x_i + t y_j``, spread over the four nearest grid points (displacement interpolation,
        McCann 1997).
        """
        frames = torch.zeros(len(times), *a.alpha.shape, dtype=a.alpha.dtype, device=a.alpha.device)
        for row in range(len(b)):
            one = Histograms(*(part[row : row + 1] for part in a))
            P = self.matrix(b[row : row + 1], one)[0]
            i, j = P.nonzero(as_tuple=True)
            for frame, t in zip(frames, times, strict=True):
                at = (self.side - 1) * torch.lerp(self.points[i], self.points[j], t)
                low = at.floor().clamp(max=self.side - 2)
                share = at - low
                for dy in (0, 1):
                    for dx in (0, 1):
                        weight = (share[:, 0] if dy else 1 - share[:, 0]) * (share[:, 1] if dx else 1 - share[:, 1])
                        place = ((low[:, 0] + dy) * self.side + low[:, 1] + dx).long()
                        frame[row].index_add_(0, place, P[i, j] * weight)
        return list(frames)


class HistogramPotential(nn.Module):
    """An MLP from both histograms, at a reduced resolution, to the potential, ``Histograms -> (B, side * side)``.

    Potentials vary slowly, except where one step of Sinkhorn's algorithm makes them right: they need no fine image.

    Args:
        side: of the grid.
        pool: side of the squares of points whose densities are averaged; a divisor of ``side``.
        hidden: widths of the hidden layers.
        activation: as for :class:`~amortized.networks.MLP`.
        scale: of the outputs, in the unit of the cost.
    """

    def __init__(
        self,
        side: int = 8,
        pool: int = 1,
        hidden: Sequence[int] = (256, 256, 128),
        activation: str = "silu",
        scale: float = 0.1,
    ) -> None:
        super().__init__()
        if side % pool:
            raise ValueError(f"HistogramPotential: pool must divide side; got {pool} and {side}")
        self.side, self.pool, self.scale = side, pool, scale
        self.mlp = MLP(2 * (side // pool) ** 2, side * side, hidden, activation)

    def forward(self, a: Histograms) -> Tensor:
        densities = self.side**2 * torch.stack([a.alpha, a.beta], 1).unflatten(2, (self.side, self.side))
        return self.scale * self.mlp(avg_pool2d(densities, self.pool))


class ImagePairs(Images):
    """Pairs of grey images as histograms: training pairs without end, and fixed pairs of held-out images.

    Any two images of a split make a pair; ``num_val`` and ``num_test`` say how many pairs there are.

    Args:
        dataset: as for :class:`~amortized.problems.Images`; by default the digits of 8 x 8 pixels inside the package.
        root: directory of the files.
        **kwargs: see :class:`~amortized.ContextDataModule`.
    """

    def __init__(self, dataset: Dataset = "digits", root: str | None = None, **kwargs: Any) -> None:
        super().__init__(dataset, root, binarise=False, **kwargs)
        self._images: dict[str, Tensor] = {}

    def images(self, split: str) -> Tensor:
        """The grey values of all images of a split, ``(N, pixels)``."""
        if split not in self._images:
            self._images[split] = handwritten_digits(split)[0] if self.dataset == "digits" else self._from_files(split)
        return self._images[split]

    def contexts(self, split: str) -> Histograms | None:  # type: ignore[override]  # pairs of images
        return None if split == "train" else self._pairs(split, self.num_rows[split], self._generator(split, 0))

    def sample(self, n: int, generator: torch.Generator) -> Histograms:
        self._images["train"] = self.images("train").to(generator.device)
        return self._pairs("train", n, generator)

    def _pairs(self, split: str, n: int, generator: torch.Generator) -> Histograms:
        images = self.images(split)
        chosen = torch.randint(len(images), (2, n), generator=generator, device=generator.device)
        return Histograms(*(histogram(images[index]) for index in chosen))


def histogram(images: Tensor) -> Tensor:
    """Grey values ``(B, pixels)``, not negative and not all zero, as weights that sum to one."""
    weights = images.float()
    return weights / weights.sum(1, keepdim=True)
