r"""Losses that know the objective by its values alone: for simulators, and for objectives that are flat almost everywhere.

What is trained for is the objective at a random solution near the prediction,

    ``J(b; a) = E_{x ~ q_b}[ L(x; a) ]``,     ``grad_b J = E[ (L(x; a) - c) grad_b log q_b(x) ]``,

which is smooth in ``b`` whatever L is, and whose gradient needs values of L alone (score function; REINFORCE). The baseline c
changes no expectation, but the noise, by orders of magnitude. With ``q_b = N(b, sigma^2 I)`` this is Gaussian smoothing,
``grad J = E[ u L(b + sigma u; a) ] / sigma``.

Sources: Williams (1992), *Simple statistical gradient-following algorithms*; Nesterov & Spokoiny (2017), *Random gradient-free
minimization of convex functions*; antithetic pairs, Salimans et al. (2017), *Evolution strategies as a scalable alternative to
reinforcement learning*; the mean of the other samples as baseline, Kool, van Hoof & Welling (2019), *Buy 4 REINFORCE samples, get
a baseline for free!*
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.distributions import Distribution

from amortized.contract import Context, Predictor, ProblemError, map_leaves
from amortized.losses.objective import Loss


class Stochastic(Predictor, Protocol):
    """A problem whose prediction stands for a distribution over solutions."""

    def policy(self, b: Tensor, a: Context) -> Distribution:
        """``q_b``, with batch shape ``(B,)`` and samples in the shape of solutions."""
        ...


class Samples(NamedTuple):
    """K solutions of each row, drawn around its prediction."""

    x: Tensor
    """``(K, B, *)``, detached."""
    log_q: Tensor
    """``log q_b(x)``, up to a constant, ``(K, B)``; on the graph of the prediction."""


class ZerothOrderLoss(Loss):
    r"""Gaussian smoothing: ``mean_k L(b + sigma u_k; a)``, with an estimate of its gradient by values of L alone.

    With antithetic pairs, and with independent samples whose baseline is the mean of the others, in this order,

        ``g = mean_k u_k (L(b + sigma u_k) - L(b - sigma u_k)) / (2 sigma)``,
        ``g = mean_k u_k (L_k - mean_{j != k} L_j) / sigma``.

    Both are unbiased for the smoothed objective. A step costs ``samples`` evaluations of each context, made in one batch.

    What to choose. ``sigma`` says what is smoothed away: no smaller than the width of the flat pieces, or most samples see no
    difference, and no larger than the distance over which the optimum is still one, for the prediction ends at the minimum of the
    smoothed objective. Where L is about linear within sigma the variance is ``(n + 1) |grad L|^2`` for n numbers in ``b``, over
    the number of pairs or of independent samples, whatever sigma and the level of L: so ``b`` of hundreds of numbers wants
    as many samples, or another loss; and independent samples are the better half. Near an optimum, where L curves, their noise
    stays and that of pairs, in which even terms cancel, vanishes. The batch averages too: many contexts with few samples each
    teach more than few contexts with many.

    Args:
        sigma: of the perturbations, in units of ``b``.
        samples: K, evaluations of each context in a step.
        antithetic: whether they are pairs ``± u``.

    Raises:
        ValueError: if ``sigma`` is not positive, or there are not two samples at least, of pairs an even number.
    """

    uses_gradient = False

    def __init__(self, sigma: float = 0.1, samples: int = 16, antithetic: bool = True) -> None:
        name = type(self).__name__
        if sigma <= 0:
            raise ValueError(f"{name}: sigma must be positive; got {sigma}")
        if samples < 2 or (antithetic and samples % 2):
            raise ValueError(f"{name}: samples must be {'even and ' if antithetic else ''}at least 2; got {samples}")
        self.sigma, self.samples, self.antithetic = sigma, samples, antithetic

    def __call__(self, model: Predictor, a: Context) -> Tensor:
        x, log_q = self.draw(model, model.iterates(a)[-1], a)
        K, B = x.shape[:2]
        many = map_leaves(lambda leaf: leaf.expand(K, *leaf.shape).flatten(0, 1), a)
        with torch.no_grad():
            value = model.objective(x.flatten(0, 1), many).view(K, B)
            mean = value.mean(0)
            # The mean of all is that of the others up to this factor; from pairs, any number may be subtracted.
            centred = (value - mean) * (1 if self.antithetic else K / (K - 1))
        surrogate = (centred * log_q).mean(0)
        return mean + surrogate - surrogate.detach()

    def draw(self, model: Predictor, b: Tensor, a: Context) -> Samples:
        """Normal around the predictions ``b`` ``(B, *)``."""
        u = torch.randn((self.samples // (1 + self.antithetic), *b.shape), dtype=b.dtype, device=b.device)
        u = torch.cat([u, -u]) if self.antithetic else u
        return Samples(b.detach() + self.sigma * u, (u * b).flatten(2).sum(2) / self.sigma)


class ScoreFunctionLoss(ZerothOrderLoss):
    r"""The expected objective of a random decision, ``E_{x ~ policy(b, a)}[ L(x; a) ]``, with the score function's gradient.

    For decisions that are discrete, or whose spread is predicted too: the problem has ``policy(b, a)``, a distribution of
    ``torch.distributions`` with samples in the shape of ``b`` (``OneHotCategorical(logits=b)``, where ``objective`` takes the
    largest), and what is trained is the policy. Samples are independent, the baseline of each is the mean of the others.

    Args:
        samples: K, evaluations of each context in a step.

    Raises:
        ProblemError: if the problem has no ``policy``, or its samples are not solutions.
    """

    def __init__(self, samples: int = 16) -> None:
        super().__init__(samples=samples, antithetic=False)

    def draw(self, model: Predictor, b: Tensor, a: Context) -> Samples:
        """From the problem's policy."""
        name = type(model).__name__
        if not hasattr(model, "policy"):
            raise ProblemError(
                f"ScoreFunctionLoss needs {name}.policy(b, a), a distribution of solutions; without one, ZerothOrderLoss"
            )
        policy: Distribution = model.policy(b, a)
        x = policy.sample((self.samples,))
        log_q = policy.log_prob(x)
        if x.shape[1:] != b.shape or log_q.shape != x.shape[:2]:
            raise ProblemError(
                f"{name}.policy must have batch shape ({len(b)},) and samples of shape {tuple(b.shape)}; they are "
                f"{tuple(policy.batch_shape)} and {tuple(x.shape[1:])}: see torch.distributions.Independent"
            )
        return Samples(x, log_q)
