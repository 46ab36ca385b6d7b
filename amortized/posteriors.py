r"""Families of approximate posteriors ``q(z; b)``, each with real coordinates ``b`` of which every value is legal.

A family turns standard normal noise into a draw of ``q`` and its log density, differentiably in ``b``. All numbers of a
member are in ``b``, those of a flow's networks too: so a solver that improves ``b`` moves freely within the family, and what it
still lacks against the evidence is the family's approximation gap (Cremer, Li & Duvenaud 2018).
``b = 0`` is the prior ``N(0, I)``.
"""

from __future__ import annotations

import abc
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, MultivariateNormal, Normal
from torch.quasirandom import SobolEngine


class Posterior(nn.Module, abc.ABC):
    """A family of distributions of ``z`` with ``latent`` dimensions; a member has ``features`` coordinates."""

    def __init__(self, latent: int, features: int) -> None:
        super().__init__()
        if latent < 1:
            raise ValueError(f"{type(self).__name__}: latent must be at least 1; got {latent}")
        self.latent, self.features = latent, features

    @abc.abstractmethod
    def draw(self, b: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """``z`` ``(S, B, latent)`` and ``log q(z; b)`` ``(S, B)`` for ``b`` ``(B, features)`` and noise ``(S, B, latent)``."""

    @abc.abstractmethod
    def distribution(self, b: Tensor) -> Distribution:
        """``q`` of each row, with batch shape ``(B,)``."""

    def divergence(self, b: Tensor) -> Tensor | None:
        """``KL(q || N(0, I))`` of each row ``(B,)``, in nats; ``None`` where it has no closed form."""
        return None


class DiagonalGaussian(Posterior):
    """``N(mu, diag(sigma^2))``, the mean-field family: ``b = (mu, log sigma)``.

    Source: Kingma & Welling (2014).

    Args:
        latent: dimension d of z; ``b`` has 2 d numbers.
    """

    def __init__(self, latent: int) -> None:
        super().__init__(latent, 2 * latent)

    def draw(self, b: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        mu, log_sigma = b.chunk(2, 1)
        return mu + log_sigma.exp() * noise, standard_normal(noise) - log_sigma.sum(1)

    def distribution(self, b: Tensor) -> Independent:
        mu, log_sigma = b.chunk(2, 1)
        return Independent(Normal(mu, log_sigma.exp()), 1)

    def divergence(self, b: Tensor) -> Tensor:
        mu, log_sigma = b.chunk(2, 1)
        return 0.5 * (mu.square() + (2 * log_sigma).exp() - 1).sum(1) - log_sigma.sum(1)


class FullGaussian(Posterior):
    """``N(mu, L L^T)``, L lower triangular with a positive diagonal: ``b = (mu, log diag L, the entries below it)``.

    Args:
        latent: dimension d of z; ``b`` has ``d (d + 3) / 2`` numbers.
    """

    below: Tensor

    def __init__(self, latent: int) -> None:
        super().__init__(latent, latent * (latent + 3) // 2)
        self.register_buffer("below", torch.tril_indices(latent, latent, -1), persistent=False)

    def _parts(self, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mu, log_diagonal, entries = b.split([self.latent, self.latent, self.features - 2 * self.latent], 1)
        L = torch.diag_embed(log_diagonal.exp()).index_put((torch.arange(len(b))[:, None], *self.below), entries)
        return mu, log_diagonal, L

    def draw(self, b: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        mu, log_diagonal, L = self._parts(b)
        z = mu + torch.einsum("bij,sbj->sbi", L, noise)
        return z, standard_normal(noise) - log_diagonal.sum(1)

    def distribution(self, b: Tensor) -> MultivariateNormal:
        mu, _, L = self._parts(b)
        return MultivariateNormal(mu, scale_tril=L, validate_args=False)

    def divergence(self, b: Tensor) -> Tensor:
        mu, log_diagonal, L = self._parts(b)
        return 0.5 * (mu.square().sum(1) + L.square().sum((1, 2)) - self.latent) - log_diagonal.sum(1)


class Flow(Posterior):
    r"""``z = mu + sigma T(eps)``, T a stack of affine couplings with networks of their own for each row.

    A coupling leaves one half of its argument as it is and moves the other by ``y = exp(s) x + t``, where ``(s, t)`` come from
    the first half by one hidden layer of tanh units; the next one swaps the halves. ``b = (mu, log sigma, the weights of
    the couplings)``; at 0 every T is the identity (the hidden units have fixed random weights to which theirs are added, so
    gradients are not zero there).

    Source: Dinh, Sohl-Dickstein & Bengio (2017), *Density estimation using real NVP*, with the transforms of zuko; weights
    for each row as in van den Berg et al. (2018), *Sylvester normalizing flows*.

    Args:
        latent: dimension d of z, at least 2.
        couplings: their number.
        hidden: hidden units of each.
    """

    def __init__(self, latent: int, couplings: int = 4, hidden: int = 16) -> None:
        _transforms()
        if latent < 2:
            raise ValueError(f"Flow: latent must be at least 2, to be split in halves; got {latent}")
        near = latent // 2
        sizes = [near, latent - near]
        self._shapes = []
        for k in range(couplings):
            kept, moved = sizes[k % 2], sizes[1 - k % 2]
            self._shapes.append(((kept, hidden), (1, hidden), (hidden, 2 * moved), (1, 2 * moved)))
        super().__init__(latent, 2 * latent + sum(rows * n for shapes in self._shapes for rows, n in shapes))
        generator = torch.Generator().manual_seed(0)
        for k, (shape, *_) in enumerate(self._shapes):
            weights = torch.randn(shape, generator=generator) / shape[0] ** 0.5
            self.register_buffer(f"random{k}", weights, persistent=False)
            mask = torch.arange(latent) < near
            self.register_buffer(f"mask{k}", mask if k % 2 == 0 else ~mask, persistent=False)

    def _transform(self, b: Tensor) -> Any:
        mu, log_sigma, rest = b.split([self.latent, self.latent, self.features - 2 * self.latent], 1)
        parts = rest.split([rows * n for shapes in self._shapes for rows, n in shapes], 1)
        layers = []
        for k, shapes in enumerate(self._shapes):
            weights = [part.unflatten(1, shape) for part, shape in zip(parts[4 * k : 4 * k + 4], shapes, strict=True)]
            meta = _Conditioner(getattr(self, f"random{k}"), weights)
            layers.append(_transforms().CouplingTransform(meta, getattr(self, f"mask{k}")))
        affine = torch.distributions.AffineTransform(mu, log_sigma.exp(), event_dim=1)
        return _transforms().ComposedTransform(*layers, affine)

    def draw(self, b: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        if not len(b):  # transforms sum over the last dimension in a way that no rows defeat
            return noise, standard_normal(noise)
        z, log_volume = self._transform(b).call_and_ladj(noise)
        return z, standard_normal(noise) - log_volume

    def distribution(self, b: Tensor) -> Distribution:
        zero = torch.zeros(len(b), self.latent, dtype=b.dtype, device=b.device)
        return PushForward(self._transform(b), Independent(Normal(zero, 1 + zero), 1))


def _transforms() -> Any:
    try:
        import zuko.transforms
    except ImportError as error:
        raise ImportError("Flow needs zuko: pip install zuko (or '.[flows]' in a clone)") from error
    return zuko.transforms


class _Conditioner:
    """``x -> (s, t)`` of a coupling, as the transform it makes of the other half; inputs ``(..., B, kept)``."""

    def __init__(self, random: Tensor, weights: list[Tensor]) -> None:
        inward, self.bias, self.outward, self.offset = weights
        self.inward = random + inward

    def __call__(self, x: Tensor) -> torch.distributions.Transform:
        hidden = torch.tanh(torch.einsum("...bi,bij->...bj", x, self.inward) + self.bias.squeeze(1))
        out = torch.einsum("...bi,bij->...bj", hidden, self.outward) + self.offset.squeeze(1)
        shift, log_scale = out.chunk(2, -1)
        return _transforms().DependentTransform(_transforms().MonotonicAffineTransform(shift, log_scale), 1)


class PointMoments(Distribution):
    """A distribution whose mean and variance are those of points that it spreads evenly over itself."""

    def points(self) -> Tensor:
        """The points, ``(S, B, n)``."""
        raise NotImplementedError

    @property
    def mean(self) -> Tensor:
        return self.points().mean(0)

    @property
    def variance(self) -> Tensor:
        return self.points().var(0)


class PushForward(PointMoments, torch.distributions.TransformedDistribution):
    """A transformed distribution that also has the moments which its base has, estimated from 512 Sobol points."""

    def __init__(self, transform: torch.distributions.Transform, base: Distribution) -> None:
        super().__init__(base, [transform], validate_args=False)

    def points(self) -> Tensor:
        noise = normal_points(self.event_shape[0], 512).to(self.base_dist.mean)
        return self.transforms[0](noise[:, None].expand(-1, *self.batch_shape, -1))


def standard_normal(noise: Tensor) -> Tensor:
    """``log N(noise; 0, I)`` over the last dimension."""
    return -0.5 * (noise.square() + math.log(2 * math.pi)).sum(-1)


def normal_points(dimension: int, count: int) -> Tensor:
    """Sobol points ``(count, dimension)``, mapped to the standard normal; the first of them, all zeros, left out."""
    return torch.special.ndtri(SobolEngine(dimension).draw(count + 1)[1:])
