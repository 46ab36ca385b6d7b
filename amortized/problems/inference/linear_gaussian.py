r"""Inference in a linear-Gaussian model: a VAE whose posterior, evidence and gaps are known in closed form.

``z ~ N(0, I_d)``, ``a | z ~ N(W z, sigma^2 I_D)`` with a fixed ``W``. Then

    ``p(z | a) = N(m, P^-1)``,   ``P = I + W^T W / sigma^2``,   ``m = P^-1 W^T a / sigma^2``,

and ``p(a) = N(0, W W^T + sigma^2 I)``.

Within a family of Gaussians the best mean is ``m``. With full covariance the bound is tight; the best mean-field posterior has
variances ``1 / P_ii`` and misses the evidence by ``1/2 (sum_i log P_ii - log det P)``, its approximation gap.
Contexts are drawn from ``p(a)`` without end: inference alone, for a given model.

Source: Tipping & Bishop (1999), *Probabilistic principal component analysis*; Shu (2017), whose second case draws contexts
from the model.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from amortized.contexts.data_module import ContextDataModule
from amortized.contract import ProblemError
from amortized.posteriors import DiagonalGaussian, FullGaussian, Posterior
from amortized.problems.inference.vae import VAE

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def loadings(observed: int, latent: int) -> Tensor:
    """``W`` ``(D, d)``, the same always: normal entries with variance ``1 / d``."""
    return torch.randn(observed, latent, generator=torch.Generator().manual_seed(0)) / latent**0.5


class LinearGaussian(VAE):
    """The posterior of the linear-Gaussian model. Solutions ``(B, posterior.features)``, contexts ``(B, observed)``.

    The objective is the ELBO in closed form, so nothing in it is random:

        ``E_q |a - W z|^2 = |a - W mu|^2 + tr(W S W^T)``,   S the covariance of q.

    Args:
        encoder: ``(B, observed) -> (B, posterior.features)``.
        posterior: a family of Gaussians.
        observed: D, numbers in one context.
        sigma: standard deviation of the noise.
        **kwargs: see :class:`~amortized.problems.VAE`.
    """

    def __init__(
        self, encoder: nn.Module, posterior: Posterior, observed: int = 10, sigma: float = 0.5, **kwargs: Any
    ) -> None:
        if not isinstance(posterior, DiagonalGaussian | FullGaussian):
            raise ProblemError(f"LinearGaussian needs a family of Gaussians; got {type(posterior).__name__}")
        decoder = nn.Linear(posterior.latent, observed, bias=False)
        decoder.weight.data = loadings(observed, posterior.latent)
        super().__init__(encoder, decoder, posterior, likelihood="gaussian", sigma=sigma, freeze_decoder=True, **kwargs)

    @property
    def W(self) -> Tensor:
        """The loadings ``(D, d)``."""
        weight = self.decoder.weight
        assert isinstance(weight, Tensor)
        return weight

    def _precision(self, a: Tensor) -> Tensor:
        W = self.W
        return torch.eye(W.shape[1], dtype=a.dtype, device=a.device) + W.T @ W / self.sigma**2

    def objective(self, b: Tensor, a: Tensor) -> Tensor:
        q = self.posterior.distribution(b)
        W = self.W
        spread = (W.T @ W * _covariance(q)).sum((1, 2))
        square = (a - q.mean @ W.T).square().sum(1) + spread
        constant = 0.5 * a.shape[1] * math.log(2 * math.pi * self.sigma**2)
        divergence = self.posterior.divergence(b)
        assert divergence is not None
        return 0.5 * square / self.sigma**2 + constant + divergence

    def optimum(self, a: Tensor) -> Tensor:
        """``-log p(a)``, shape ``(B,)``."""
        W = self.W
        covariance = W @ W.T + self.sigma**2 * torch.eye(len(W), dtype=a.dtype, device=a.device)
        zero = torch.zeros(len(W), dtype=a.dtype, device=a.device)
        return -torch.distributions.MultivariateNormal(zero, covariance).log_prob(a)

    def family_optimum(self, a: Tensor) -> Tensor:
        """The best bound that the family has, shape ``(B,)``: the evidence, and for mean-field posteriors its gap."""
        P = self._precision(a)
        missed = 0.5 * (P.diagonal().log().sum() - P.logdet()) if isinstance(self.posterior, DiagonalGaussian) else 0.0
        return self.optimum(a) + missed

    def draw(self, a: Tensor, solutions: dict[str, Tensor]) -> Figure:
        """The first two dimensions of each posterior, as ellipses of two standard deviations; the true one in grey."""
        from matplotlib.figure import Figure

        P = self._precision(a)
        cover = torch.linalg.inv(P)
        truth = torch.distributions.MultivariateNormal(a @ self.W @ cover / self.sigma**2, cover)
        figure = Figure(figsize=(1.6 * len(a) + 0.4, 2.3), layout="constrained")
        circle = torch.linspace(0, 2 * math.pi, 100, dtype=a.dtype, device=a.device)
        circle = 2 * torch.stack([circle.cos(), circle.sin()])
        for i, axes in enumerate(figure.subplots(1, len(a), squeeze=False)[0]):
            for name, q in {"posterior": truth, **{n: self.decode(b, a) for n, b in solutions.items()}}.items():
                S = _covariance(q)[i]
                x, y = (q.mean[i, :2, None] + torch.linalg.cholesky(S[:2, :2]) @ circle).cpu()
                style = {"color": "#bbbbbb", "linewidth": 4} if name == "posterior" else {"linewidth": 1.2}
                axes.plot(x.numpy(), y.numpy(), label=name, **style)
            axes.set(xticks=[], yticks=[], aspect="equal")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
        return figure


def _covariance(q: torch.distributions.Distribution) -> Tensor:
    """Of Gaussians, independent or not, ``(B, d, d)``."""
    return q.covariance_matrix if isinstance(q, torch.distributions.MultivariateNormal) else q.variance.diag_embed()


class LinearGaussianContexts(ContextDataModule):
    """Draws of ``p(a)``: ``W z + sigma e``, shape ``(B, observed)``.

    Args:
        observed: D.
        latent: d.
        sigma: standard deviation of the noise.
        **kwargs: see :class:`~amortized.ContextDataModule`.
    """

    def __init__(self, observed: int = 10, latent: int = 4, sigma: float = 0.5, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.observed, self.latent, self.sigma = observed, latent, sigma

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        device = generator.device
        z = torch.randn(n, self.latent, generator=generator, device=device)
        noise = torch.randn(n, self.observed, generator=generator, device=device)
        return z @ loadings(self.observed, self.latent).to(device).T + self.sigma * noise
