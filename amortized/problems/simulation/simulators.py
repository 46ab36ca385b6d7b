"""Simulators: a prior, and how parameters make an observation; the standard test beds of the field."""

from __future__ import annotations

import abc
import functools
import math

import torch
from torch import Tensor, nn
from torch.distributions import Independent, Normal

from amortized.contract import ProblemError
from amortized.problems.simulation.priors import LogNormalPrior, NormalPrior, Prior, UniformPrior


class Simulator(nn.Module, abc.ABC):
    """``theta ~ p(theta)``, ``x ~ p(x | theta)``.

    Args:
        prior: of the parameters.
        names: what the parameters are called in pictures; ``None`` numbers them.
    """

    def __init__(self, prior: Prior, names: list[str] | None = None) -> None:
        super().__init__()
        self.prior = prior
        self.names = names or [f"theta {i + 1}" for i in range(prior.dimension)]

    @abc.abstractmethod
    def simulate(self, theta: Tensor, generator: torch.Generator) -> Tensor:
        """An observation ``(n, *)`` for each theta ``(n, d)``; a row that is not finite is a simulation that failed."""

    def posterior(self, x: Tensor, n: int, generator: torch.Generator) -> Tensor | None:
        """``(B, n, d)`` draws of the true posterior of each observation ``(B, *)``; ``None`` where nobody has them."""
        return None

    @functools.cached_property
    def shape(self) -> torch.Size:
        """Of one observation."""
        generator = torch.Generator().manual_seed(0)
        return self.simulate(self.prior.sample(1, generator), generator).shape[1:]


class Recorded(Simulator):
    """A simulator that is known by a file of its simulations alone.

    Args:
        prior: that the file's parameters were drawn from.
        shape: of one observation.
        names: of the parameters.
    """

    def __init__(self, prior: Prior, shape: list[int], names: list[str] | None = None) -> None:
        super().__init__(prior, names)
        self.shape = torch.Size(shape)

    def simulate(self, theta: Tensor, generator: torch.Generator) -> Tensor:
        raise ProblemError("Recorded cannot simulate: give data.file, and diagnostics without predictive checks")


class GaussianLinear(Simulator):
    """``theta ~ N(0, 0.1 I)``, ``x ~ N(theta, 0.1 I)``, whose posterior is ``N(x / 2, 0.05 I)``.

    Its draws of the posterior are moved and stretched to have the very mean and covariance of it (so there must be more of
    them than parameters): their mean of ``-log q`` is exact for every Gaussian q.

    Source: Lueckmann et al. (2021), *Benchmarking simulation-based inference*, T.1.

    Args:
        dimension: of theta and of x.
    """

    VARIANCE = 0.1

    def __init__(self, dimension: int = 10) -> None:
        super().__init__(NormalPrior([0.0] * dimension, [self.VARIANCE**0.5] * dimension))

    def simulate(self, theta: Tensor, generator: torch.Generator) -> Tensor:
        noise = torch.randn(theta.shape, generator=generator, device=generator.device)
        return theta + self.VARIANCE**0.5 * noise

    def exact(self, x: Tensor) -> Independent:
        """The true posterior of each observation."""
        return Independent(Normal(x / 2, (self.VARIANCE / 2) ** 0.5 + 0 * x), 1)

    def posterior(self, x: Tensor, n: int, generator: torch.Generator) -> Tensor | None:
        d = x.shape[1]
        if n <= d:
            return None
        noise = torch.randn(len(x), n, d, generator=generator, device=generator.device).double()
        noise -= noise.mean(1, keepdim=True)
        root = torch.linalg.cholesky(noise.mT @ noise / n)
        noise = torch.linalg.solve_triangular(root, noise.mT, upper=False).mT
        return x[:, None] / 2 + (self.VARIANCE / 2) ** 0.5 * noise.to(x.dtype)


class TwoMoons(Simulator):
    r"""``x = p + (-|theta_1 + theta_2|, theta_2 - theta_1) / sqrt(2)``, p on a crescent: the posterior is two of them.

    ``p = (r cos a + 1/4, r sin a)``, ``a ~ U(-pi/2, pi/2)``, ``r ~ N(0.1, 0.01^2)``; theta is uniform on ``(-1, 1)^2``. Given p,
    the parameters are a rotation of ``x - p``, up to a sign: the posterior is drawn by drawing p, as often as it takes.

    Source: Greenberg et al. (2019), *Automatic posterior transformation*; Lueckmann et al. (2021), T.8.
    """

    def __init__(self) -> None:
        super().__init__(UniformPrior([-1.0, -1.0], [1.0, 1.0]))

    def simulate(self, theta: Tensor, generator: torch.Generator) -> Tensor:
        s = torch.stack([-(theta[:, 0] + theta[:, 1]).abs(), theta[:, 1] - theta[:, 0]], 1) / 2**0.5
        return self._crescent(theta.shape[:1], generator) + s

    def _crescent(self, shape: torch.Size, generator: torch.Generator) -> Tensor:
        a = math.pi * (torch.rand(shape, generator=generator, device=generator.device) - 0.5)
        r = 0.1 + 0.01 * torch.randn(shape, generator=generator, device=generator.device)
        return torch.stack([r * a.cos() + 0.25, r * a.sin()], -1)

    def posterior(self, x: Tensor, n: int, generator: torch.Generator) -> Tensor:
        parts = []
        for start in range(0, len(x), 256):
            part = x[start : start + 256]
            found = torch.full((len(part), n, 2), torch.nan, device=x.device)
            for _ in range(10_000):
                if not (missing := found[..., 0].isnan()).any():
                    break
                s = part[:, None] - self._crescent(found.shape[:2], generator)
                sign = torch.randint(2, s.shape[:2], generator=generator, device=generator.device) * 2 - 1
                total = -s[..., 0] * sign
                theta = torch.stack([total - s[..., 1], total + s[..., 1]], -1) / 2**0.5
                legal = (s[..., 0] <= 0) & self.prior.contains(theta)
                found = torch.where((missing & legal)[..., None], theta, found)
            else:
                raise ProblemError("TwoMoons: an observation that no parameters of the prior make has no posterior")
            parts.append(found)
        return torch.cat([*parts, x.new_empty(0, n, 2)])


class SLCP(Simulator):
    r"""Simple likelihood, complex posterior: four points of a Gaussian, ``(B, 4, 2)``, whose order means nothing.

    ``x_k ~ N(m, S)``, ``m = (theta_1, theta_2)``, standard deviations ``theta_3^2`` and ``theta_4^2``, correlation
    ``tanh theta_5``, theta uniform on ``(-3, 3)^5``: the posterior has four modes, cut off at the box.

    Source: Papamakarios, Sterratt & Murray (2019), *Sequential neural likelihood*; Lueckmann et al. (2021), T.3.
    """

    def __init__(self) -> None:
        super().__init__(UniformPrior([-3.0] * 5, [3.0] * 5))

    def simulate(self, theta: Tensor, generator: torch.Generator) -> Tensor:
        noise = torch.randn(len(theta), 4, 2, generator=generator, device=generator.device)
        m, s, r = theta[:, None, :2], theta[:, 2:4].square(), theta[:, 4:].tanh()
        second = r * noise[..., 0] + (1 - r.square()).sqrt() * noise[..., 1]
        return m + s[:, None] * torch.stack([noise[..., 0], second], -1)


class LotkaVolterra(Simulator):
    r"""Hares X and lynxes Y over 19 years: ``X' = alpha X - beta X Y``, ``Y' = -gamma Y + delta X Y``, from (30, 1).

    The observation is ``(B, 10, 2)``: the logarithms of both at ten times, 2.1 years apart, between 1e-10 and 1e4, each with
    normal noise of standard deviation 0.1. Rates are log-normal. Integrated by Runge and Kutta's fourth order in the
    logarithms, all rows at once; where a step is too long for the rates it may diverge, and such a simulation has failed.

    Source: Lueckmann et al. (2021), T.10, with the logarithm of their observation.

    Args:
        step: of time, in years; a divisor of 2.1.
    """

    def __init__(self, step: float = 0.05) -> None:
        prior = LogNormalPrior([-0.125, -3.0, -0.125, -3.0], [0.5] * 4)
        super().__init__(prior, ["alpha", "beta", "gamma", "delta"])
        self.step, self.steps = step, round(2.1 / step) if step > 0 else 0
        if not self.steps or abs(2.1 / step - self.steps) > 1e-6:
            raise ValueError(f"LotkaVolterra: step must divide 2.1 years; got {step}")

    def simulate(self, theta: Tensor, generator: torch.Generator) -> Tensor:
        growth = torch.stack([theta[:, 0], -theta[:, 2]], 1)
        coupling = torch.stack([-theta[:, 1], theta[:, 3]], 1)

        def slope(z: Tensor) -> Tensor:
            return growth + coupling * z.exp().flip(1)

        z = torch.tensor([30.0, 1.0], device=theta.device).log().expand(len(theta), 2)
        seen, h = [], self.step
        for k in range(9 * self.steps + 1):
            if k % self.steps == 0:
                seen.append(z)
            k1 = slope(z)
            k2 = slope(z + h / 2 * k1)
            k3 = slope(z + h / 2 * k2)
            k4 = slope(z + h * k3)
            z = z + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        z = torch.stack(seen, 1).clamp(math.log(1e-10), math.log(1e4))
        return z + 0.1 * torch.randn(z.shape, generator=generator, device=generator.device)
