r"""Portfolio choice: how to split money between assets whose returns are known in mean and covariance.

    ``min_b  γ/2 bᵀ Σ b − μᵀ b``   subject to ``b ≥ 0``, ``Σ_i b_i = 1``.

A context is one market: expected returns μ and a covariance Σ of its own, from a model with a few common factors,

    ``Σ = F Fᵀ + diag(s²)``,  ``μ = λᵀ-weighted exposures + noise``.

Neither the order of the assets nor a constant added to μ changes the choice, nor does one factor of μ and Σ: the network sees
neither. Source: Markowitz (1952), *Portfolio selection*; factor models: Boyd et al. (2017), *Multi-period trading via convex
optimization*, section 4.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from amortized.contexts.data_module import ContextDataModule
from amortized.contract import QuadraticProgram
from amortized.module import AmortizedModule
from amortized.solvers.structured import proximal

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Market(NamedTuple):
    """B markets of n assets, in units of a year."""

    mean: Tensor
    """``μ``, expected returns ``(B, n)``."""
    covariance: Tensor
    """``Σ``, of returns ``(B, n, n)``."""


class Portfolio(AmortizedModule):
    """The weights of the assets ``(B, n)``: at least zero, and one in all.

    Args:
        network: ``Market -> (B, n)``; what it sees is scaled as :meth:`observe` says.
        risk_aversion: γ, what a unit of variance costs in return, halved.
        **kwargs: see :class:`~amortized.AmortizedModule`.
    """

    objective_name = "risk less return"

    def __init__(self, network: nn.Module, risk_aversion: float = 5.0, **kwargs: Any) -> None:
        super().__init__(network, **kwargs)
        if risk_aversion <= 0:
            raise ValueError(f"Portfolio: risk_aversion must be positive; got {risk_aversion}")
        self.risk_aversion = risk_aversion

    def objective(self, b: Tensor, a: Market) -> Tensor:
        risk = (b.unsqueeze(1) @ a.covariance).squeeze(1) * b
        return self.risk_aversion / 2 * risk.sum(1) - (a.mean * b).sum(1)

    def project(self, b: Tensor, a: Market) -> Tensor:
        """The nearest portfolio."""
        return proximal.simplex(b)

    def program(self, a: Market) -> QuadraticProgram:
        """The same as a program; the first constraint is the budget."""
        n, one = a.mean.shape[1], torch.ones_like(a.mean[:, :1])
        eye = torch.eye(n, dtype=one.dtype, device=one.device)
        lower = torch.cat([one, torch.zeros_like(a.mean)], 1)
        upper = torch.cat([one, torch.full_like(a.mean, torch.inf)], 1)
        return QuadraticProgram(
            self.risk_aversion * a.covariance, -a.mean, torch.cat([torch.ones_like(eye[:1]), eye]), lower, upper
        )

    def interior(self, a: Market) -> Tensor:
        """Equal weights."""
        return torch.full_like(a.mean, 1 / a.mean.shape[1])

    def initial(self, a: Market) -> Tensor:
        return self.interior(a)

    def observe(self, a: Market) -> Market:
        """``(μ − mean μ) / γv`` and ``Σ / v``, with v the mean variance: what the choice depends on."""
        scale = a.covariance.diagonal(dim1=1, dim2=2).mean(1, keepdim=True)
        mean = (a.mean - a.mean.mean(1, keepdim=True)) / (self.risk_aversion * scale)
        return Market(mean, a.covariance / scale.unsqueeze(2))

    def draw(self, a: Market, solutions: dict[str, Tensor]) -> Figure:
        """The weights of each market, the largest first, network beside solver."""
        from matplotlib.figure import Figure

        figure, n = Figure(figsize=(10, 2.2 * -(-len(a.mean) // 4) + 0.4), layout="constrained"), len(a.mean)
        order = next(reversed(solutions.values())).argsort(1, descending=True)[:, :20]
        for i, axes in zip(range(n), figure.subplots(-(-n // 4), min(n, 4), squeeze=False).flat, strict=False):
            for k, (name, b) in enumerate(solutions.items()):
                weights = b[i, order[i]].tolist()
                axes.bar([j + 0.4 * k for j in range(len(weights))], weights, width=0.4, color=f"C{k}", label=name)
            axes.set(xticks=[], xlabel="assets", ylabel="weight" if i % 4 == 0 else None)
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
        return figure


class FactorMarkets(ContextDataModule):
    """Markets without end: n assets, k common factors.

    The factors' yearly volatilities fall from 20 % as ``1 / √j``; exposures are normal, those to the first factor around 1;
    volatilities of the assets' own are uniform on 10 to 40 %. Expected returns are 6 % for a unit of exposure to the first
    factor, 2 % to the others with either sign, and 2 % of noise.

    Args:
        assets: n.
        factors: k.
        **kwargs: see :class:`~amortized.ContextDataModule`.
    """

    def __init__(self, assets: int = 50, factors: int = 5, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if min(assets, factors) < 1:
            raise ValueError(f"FactorMarkets: assets and factors must be at least 1; got {assets} and {factors}")
        self.assets, self.factors = assets, factors

    def sample(self, n: int, generator: torch.Generator) -> Market:
        def normal(*shape: int) -> Tensor:
            return torch.randn(n, *shape, generator=generator, device=generator.device)

        exposure = 0.5 * normal(self.assets, self.factors)
        exposure[..., 0] += 1
        size = 0.2 / torch.arange(1, self.factors + 1, device=generator.device).sqrt()
        own = 0.1 + 0.3 * torch.rand(n, self.assets, generator=generator, device=generator.device)
        price = 0.02 * normal(self.factors)
        price[:, 0] = 0.06
        mean = (exposure @ price.unsqueeze(2)).squeeze(2) + 0.02 * normal(self.assets)
        loading = exposure * size
        return Market(mean, loading @ loading.mT + torch.diag_embed(own.square()))
