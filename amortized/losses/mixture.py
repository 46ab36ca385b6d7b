"""Regression to solutions of which a context may have several, by a network of several predictions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from amortized.contract import Context, Predictor, ProblemError
from amortized.losses.distances import Distance
from amortized.losses.regression import RegressionLoss, Targets
from amortized.solvers.base import Solver


class MixtureLoss(RegressionLoss):
    r"""``−log Σ_k π_k exp(−d(b_k, b*) / 2σ²)``, with K predictions b_k and weights π_k: one near b*, and likely, is enough.

    The model's network is a :class:`~amortized.networks.Mixture`. What ``refine`` does to the likeliest prediction is not
    learned from. Where a context comes with several solutions, ``(B, k, *)``, the mean over those that are there.

    Source: Bishop (1994), *Mixture density networks*, with one σ that is given.

    Args:
        field: see :class:`RegressionLoss`.
        solver: see :class:`RegressionLoss`.
        distance: see :class:`RegressionLoss`.
        unsolved: see :class:`RegressionLoss`.
        sigma: σ, by how much solutions may be missed: well below how far those of one context are from each other.

    Raises:
        ProblemError: as :class:`RegressionLoss`, and if the network is no mixture.
    """

    def __init__(
        self,
        field: str | None = None,
        solver: Solver | None = None,
        distance: Distance | None = None,
        unsolved: float = 0.0,
        sigma: float = 0.1,
    ) -> None:
        super().__init__(field, solver, distance, unsolved)
        if sigma <= 0:
            raise ValueError(f"MixtureLoss: sigma must be positive; got {sigma}")
        self.sigma = sigma

    def _off(self, model: Predictor, a: Context, target: Targets) -> Tensor:
        learner: Any = model
        if not hasattr(learner.network, "mixture"):
            raise ProblemError(
                f"MixtureLoss needs a network of several predictions, Mixture(network, components); it is a "
                f"{type(learner.network).__name__}"
            )
        log_weight, b = learner.network.mixture(learner.observe(a))
        b_star = target.b.to(b.dtype)
        b_star = b_star if b_star.ndim == 3 else b_star.unsqueeze(1)
        B, K, n = b.shape
        if b_star.shape != (B, b_star.shape[1], n):
            raise ProblemError(f"solutions have shape {tuple(target.b.shape)}, the network predicts {(B, n)}")
        there = b_star.isfinite().all(2)
        known = torch.where(there.unsqueeze(2), b_star, 0).unsqueeze(2).expand(B, -1, K, n)
        each = b.unsqueeze(1).expand_as(known)
        off = self.distance(each.flatten(0, 2), known.flatten(0, 2)).view(B, -1, K)
        missed = -(log_weight.unsqueeze(1) - off / (2 * self.sigma**2)).logsumexp(2)
        mean = torch.where(there, missed, 0).sum(1) / there.sum(1).clamp(min=1)
        return mean if target.weight is None else target.weight.to(mean.dtype) * mean
