r"""The evidence ``log p(a)`` of a latent-variable model, estimated: how far a bound on it can still be improved.

Both estimators are unbiased for ``p(a)`` (annealing but for the adaptation of its steps), so they underestimate ``log p(a)``
on average, and their bound tightens with more draws.
"""

from __future__ import annotations

import abc
import math
from typing import Protocol

import torch
from torch import Tensor, nn

from amortized.contract import Context, num_rows
from amortized.posteriors import Posterior, standard_normal


class LatentVariableModel(Protocol):
    """``p(a, z) = p(a | z) N(z; 0, I)``, with a family of posteriors and a prediction of its coordinates."""

    posterior: Posterior

    def distortion(self, z: Tensor, a: Context) -> Tensor:
        """``-log p(a | z)`` in nats, ``(S, B)`` for ``z`` ``(S, B, latent)``."""
        ...

    def __call__(self, a: Context) -> Tensor:
        """The predicted coordinates ``b``, ``(B, posterior.features)``."""
        ...


class Evidence(nn.Module, abc.ABC):
    """An estimate of ``log p(a)``."""

    @abc.abstractmethod
    def forward(self, model: LatentVariableModel, a: Context, b: Tensor | None = None) -> Tensor:
        """``log p(a)`` in nats ``(B,)``, with ``q`` at the coordinates ``b``, or at the model's prediction."""


class ImportanceSampling(Evidence):
    r"""``log p(a) ~ log 1/N sum_n p(a, z_n) / q(z_n)``, ``z_n ~ q``.

    Source: Burda, Grosse & Salakhutdinov (2016), *Importance weighted autoencoders*, section 5.

    Args:
        draws: N, for each image.
        chunk: images times draws at a time.
        scale: widens the noise of ``q`` by this factor, for tails that ``q`` lacks; 1 draws from ``q`` itself.
    """

    def __init__(self, draws: int = 5000, chunk: int = 16384, scale: float = 1.0) -> None:
        super().__init__()
        if draws < 1 or chunk < 1 or scale < 1:
            raise ValueError(
                f"ImportanceSampling: draws, chunk and scale must be at least 1; got {draws}, {chunk}, {scale}"
            )
        self.draws, self.chunk, self.scale = draws, chunk, scale

    @torch.no_grad()
    def forward(self, model: LatentVariableModel, a: Context, b: Tensor | None = None) -> Tensor:
        b = model(a) if b is None else b
        total, left = torch.full((num_rows(b),), -torch.inf, dtype=b.dtype, device=b.device), self.draws
        while left:
            n = min(left, max(1, self.chunk // max(num_rows(b), 1)))
            left -= n
            noise = torch.randn(n, num_rows(b), model.posterior.latent, dtype=b.dtype, device=b.device)
            wide = self.scale * noise
            z, log_q = model.posterior.draw(b, wide)
            # The density of the wider noise, carried along by the same map.
            log_q = log_q - standard_normal(wide) + standard_normal(noise) - noise.shape[2] * math.log(self.scale)
            log_weights = standard_normal(z) - model.distortion(z, a) - log_q
            total = torch.logaddexp(total, log_weights.logsumexp(0))
        return total - math.log(self.draws)


class AnnealedImportanceSampling(Evidence):
    r"""``log p(a)`` by a path of Hamiltonian Monte Carlo from ``q`` to the true posterior.

    Along ``f_t(z) = q(z)^(1 - beta_t) p(a, z)^beta_t``, ``0 = beta_0 < ... < beta_T = 1``, chains of ``z`` start from
    ``q``, collect

        ``log w = sum_t (beta_t - beta_{t-1}) (log p(a, z_{t-1}) - log q(z_{t-1}))``,

    and move by one transition that leaves ``f_t`` invariant; ``log p(a) ~ log 1/N sum_n w_n`` over the chains. The step
    size of each image follows the acceptance of all its chains so far, towards 65 % (which is exact only for many
    chains). ``q`` is carried into the noise space of its family, ``z = T(eps; b)``, where it is standard normal: there
    a Gaussian ``q`` is also the preconditioner of the moves.

    Source: Neal (2001), *Annealed importance sampling*; Wu et al. (2017), *On the quantitative analysis of decoder-based
    generative models*; from ``q`` rather than the prior as in Ding & Freedman (2019).

    Args:
        steps: T, intermediate distributions.
        leapfrog: leapfrog steps of a transition, each with a gradient.
        chains: N, for each image.
        chunk: chains at a time.
    """

    def __init__(self, steps: int = 100, leapfrog: int = 5, chains: int = 16, chunk: int = 4096) -> None:
        super().__init__()
        if min(steps, leapfrog, chains, chunk) < 1:
            raise ValueError(
                f"AnnealedImportanceSampling: steps, leapfrog, chains and chunk must be at least 1; got {steps}, "
                f"{leapfrog}, {chains}, {chunk}"
            )
        self.steps, self.leapfrog, self.chains, self.chunk = steps, leapfrog, chains, chunk

    def forward(self, model: LatentVariableModel, a: Context, b: Tensor | None = None) -> Tensor:
        with torch.inference_mode(False), torch.no_grad():
            a = a.clone()
            b = model(a) if b is None else b.clone()
            width = max(1, self.chunk // self.chains)
            parts = [self._run(model, x, y) for x, y in zip(a.split(width), b.split(width), strict=True)]
        return torch.cat(parts) if parts else a.new_empty(0)

    def _run(self, model: LatentVariableModel, a: Context, b: Tensor) -> Tensor:
        eps = torch.randn(self.chains, num_rows(b), model.posterior.latent, dtype=b.dtype, device=b.device)
        log_w = eps.new_zeros(eps.shape[:2])
        step = torch.full_like(log_w[:1], 0.3)
        ratio, grad = self._ratio(model, a, b, eps)
        schedule = torch.sin(torch.linspace(0, math.pi / 2, self.steps + 1)).square().tolist()
        for before, beta in zip(schedule, schedule[1:], strict=False):
            log_w += (beta - before) * ratio
            if beta < 1:  # after the last weight no move counts
                eps, ratio, grad, step = self._move(model, a, b, beta, eps, ratio, grad, step)
        return log_w.logsumexp(0) - math.log(self.chains)

    def _ratio(self, model: LatentVariableModel, a: Context, b: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
        """``log p(a, z) - log q(z)`` at ``z = T(eps; b)`` of each chain, and its gradient in ``eps``."""
        with torch.enable_grad():
            eps = eps.detach().requires_grad_()
            z, log_q = model.posterior.draw(b, eps)
            ratio = standard_normal(z) - model.distortion(z, a) - log_q
            (grad,) = torch.autograd.grad(ratio.sum(), eps)
        return ratio.detach(), grad

    def _move(
        self,
        model: LatentVariableModel,
        a: Context,
        b: Tensor,
        beta: float,
        eps: Tensor,
        ratio: Tensor,
        grad: Tensor,
        step: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        """One Hamiltonian transition for the density ``N(eps; 0, I) exp(beta ratio(eps))``."""
        momentum = torch.randn_like(eps)
        h = step[..., None]
        x, r, g = eps, ratio, grad
        p = momentum + 0.5 * h * (beta * g - x)
        for k in range(self.leapfrog):
            x = x + h * p
            r, g = self._ratio(model, a, b, x)
            p = p + (h if k < self.leapfrog - 1 else 0.5 * h) * (beta * g - x)

        def energy(x: Tensor, r: Tensor, p: Tensor) -> Tensor:
            return 0.5 * (x.square() + p.square()).sum(-1) - beta * r

        change = energy(eps, ratio, momentum) - energy(x, r, p)
        accepted = torch.rand_like(change).log() < change.nan_to_num(nan=-torch.inf)
        step = (step * (0.2 * (accepted.to(step.dtype).mean(0, keepdim=True) - 0.65)).exp()).clamp(1e-3, 1.0)
        return (
            torch.where(accepted[..., None], x, eps), torch.where(accepted, r, ratio),
            torch.where(accepted[..., None], g, grad), step,
        )  # fmt: skip
