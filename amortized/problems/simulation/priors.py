r"""Priors ``p(theta)`` as maps of a standard normal: ``theta = T(u)``, ``u ~ N(0, I)``, T one to one onto the support.

A posterior is learned in the coordinates u, where every value is legal and the prior has mean 0 and variance 1, whatever the
units of the parameters: no probability leaks out of the support, and parameters need no z-scores. Densities go back by

    ``log p(theta) = log N(u; 0, I) - log |det dT/du|``,   ``u = T^-1(theta)``.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from amortized.posteriors import standard_normal


class Prior(nn.Module, abc.ABC):
    """A distribution of ``theta`` ``(*, dimension)``, all of whose coordinates are independent and of one kind.

    Args:
        first: one number for each parameter.
        second: another, positive where it is a scale.
    """

    first: Tensor
    second: Tensor

    def __init__(self, first: Sequence[float], second: Sequence[float]) -> None:
        super().__init__()
        if len(first) != len(second) or not len(first):
            raise ValueError(
                f"{type(self).__name__} takes two numbers for each parameter; got {len(first)} and {len(second)}"
            )
        self.dimension = len(first)
        self.register_buffer("first", torch.tensor(first, dtype=torch.float32), persistent=False)
        self.register_buffer("second", torch.tensor(second, dtype=torch.float32), persistent=False)

    @abc.abstractmethod
    def forward(self, u: Tensor) -> Tensor:
        """``T(u)``, in the parameters' units."""

    @abc.abstractmethod
    def inverse(self, theta: Tensor) -> Tensor:
        """``T^-1(theta)``; where theta is outside the support, the coordinates of a point at its edge."""

    @abc.abstractmethod
    def log_det(self, u: Tensor) -> Tensor:
        """``log |det dT/du|``, summed over the last dimension."""

    def contains(self, theta: Tensor) -> Tensor:
        """Whether theta is in the support, ``(*,)``."""
        return theta.isfinite().all(-1)

    def log_prob(self, theta: Tensor) -> Tensor:
        """``log p(theta)``, ``(*,)``; minus infinity outside the support."""
        u = self.inverse(theta)
        return torch.where(self.contains(theta), standard_normal(u) - self.log_det(u), -torch.inf)

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """``(n, dimension)`` draws, on the generator's device."""
        u = torch.randn(n, self.dimension, generator=generator, device=generator.device)
        draws: Tensor = self.to(generator.device)(u)
        return draws


class NormalPrior(Prior):
    """``theta_i ~ N(mean_i, std_i^2)``: ``T(u) = mean + std u``.

    Args:
        mean: of each parameter.
        std: standard deviation of each, positive.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__(mean, std)
        if min(std) <= 0:
            raise ValueError(f"NormalPrior: std must be positive; got {list(std)}")

    def forward(self, u: Tensor) -> Tensor:
        return self.first + self.second * u

    def inverse(self, theta: Tensor) -> Tensor:
        return (theta - self.first) / self.second

    def log_det(self, u: Tensor) -> Tensor:
        return self.second.log().sum().expand(u.shape[:-1])


class LogNormalPrior(NormalPrior):
    """``log theta_i ~ N(mean_i, std_i^2)``: ``T(u) = exp(mean + std u)``, the support is the positive numbers."""

    def forward(self, u: Tensor) -> Tensor:
        return super().forward(u).exp()

    def inverse(self, theta: Tensor) -> Tensor:
        return super().inverse(theta.clamp_min(torch.finfo(theta.dtype).tiny).log())

    def log_det(self, u: Tensor) -> Tensor:
        return super().log_det(u) + super().forward(u).sum(-1)

    def contains(self, theta: Tensor) -> Tensor:
        return super().contains(theta) & (theta > 0).all(-1)


class UniformPrior(Prior):
    """``theta_i`` uniform on ``(low_i, high_i)``: ``T(u) = low + (high - low) Phi(u)``, Phi the standard normal's CDF.

    Args:
        low: of each parameter.
        high: of each, above ``low``.
    """

    def __init__(self, low: Sequence[float], high: Sequence[float]) -> None:
        super().__init__(low, high)
        if any(a >= b for a, b in zip(low, high, strict=True)):
            raise ValueError(f"UniformPrior: each low must be below its high; got {list(low)} and {list(high)}")

    def forward(self, u: Tensor) -> Tensor:
        return self.first + (self.second - self.first) * torch.special.ndtr(u)

    def inverse(self, theta: Tensor) -> Tensor:
        # Float32 has no number between 1 - 6e-8 and 1, whose coordinate would be infinite.
        share = ((theta - self.first) / (self.second - self.first)).clamp(1e-7, 1 - 1e-7)
        return torch.special.ndtri(share)

    def log_det(self, u: Tensor) -> Tensor:
        return standard_normal(u) + (self.second - self.first).log().sum()

    def contains(self, theta: Tensor) -> Tensor:
        return ((theta >= self.first) & (theta <= self.second)).all(-1)


class JointPrior(Prior):
    """Parameters of several kinds, one prior after the other, independent of each other.

    Args:
        parts: priors; the parameters are theirs, side by side.
    """

    def __init__(self, parts: Sequence[Prior]) -> None:
        nn.Module.__init__(self)
        if not parts:
            raise ValueError("JointPrior needs at least one prior")
        self.parts = nn.ModuleList(parts)
        self.sizes = [part.dimension for part in parts]
        self.dimension = sum(self.sizes)

    def forward(self, u: Tensor) -> Tensor:
        return torch.cat([part(v) for part, v in self._split(u)], -1)

    def inverse(self, theta: Tensor) -> Tensor:
        return torch.cat([part.inverse(v) for part, v in self._split(theta)], -1)

    def log_det(self, u: Tensor) -> Tensor:
        return torch.stack([part.log_det(v) for part, v in self._split(u)]).sum(0)

    def contains(self, theta: Tensor) -> Tensor:
        return torch.stack([part.contains(v) for part, v in self._split(theta)]).all(0)

    def _split(self, x: Tensor) -> list[tuple[Prior, Tensor]]:
        return list(zip(self.parts, x.split(self.sizes, -1), strict=True))  # type: ignore[arg-type]
