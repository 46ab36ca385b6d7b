r"""Train more often where the prediction is poor, with the same expected gradient and less noise in it.

A batch of N contexts is a pool of candidates. Each gets a score ``s_i > 0`` that stands for the norm of its gradient;
``n = N / pool`` of them are drawn, with probabilities and weights

    ``p_i = (1 - mix) s_i / sum_j s_j + mix / N``,     ``w_i = 1 / (N p_i)``,

and the loss is the mean of ``w_i loss_i`` over the drawn. Row i is drawn ``n p_i`` times on average, so the expected
gradient is that of the mean loss over the pool, which is that of ``E_a[loss]``; and ``w_i <= 1 / mix``.

Scores are learned, for a forward pass of the network over the pool would cost more than it saves: a linear regression

    ``log s_i = v . phi(a_i)``,     ``v = argmin sum_t 0.98^age_t sum_i (v . phi(a_i) - log |g_i|)^2 + ridge |v|^2``

on random features of the context, with the gradients ``g_i`` at the predictions that training computes anyway. Only the
draw depends on them: poor scores cost a gain, never the right expectation.

It is no free lunch. Draws in proportion to the norm lower the variance of the gradient to ``(E|g|)^2 / E|g|^2`` of what it was at
best, and what is not noise they leave alone. Where contexts differ widely in scale that is much: at equal CPU time the 95th
percentile of the gap is 0.44 ± 0.04 times the plain one on ``sinusoid_scales``, each side at its best learning rate. Elsewhere it
is no gain: 0.94 ± 0.08 times on ``maml_sinusoid``, 1.15 ± 0.06 on ``sphere``, 1.65 ± 0.12 on ``sinusoid`` (these three on shorter
runs, with a best learning rate at the edge of their grids: ``python -m benchmarks.hard_contexts``).

A resumed run continues exactly: the regression's sums are buffers, saved in checkpoints, and the draw comes from torch's
generator, which starts anew at every training step. Under several processes all take the sums of the first.

Sources: the best probabilities, Zhao & Zhang (2015), *Stochastic optimization with importance sampling*; the norm of the
gradient at the output in place of the parameters', Katharopoulos & Fleuret (2018), *Not all samples are created equal*;
systematic draws, Carpenter, Clifford & Fearnhead (1999), *Improved particle filter for nonlinear problems*; random features,
Rahimi & Recht (2008), *Weighted sums of random kitchen sinks*.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from amortized.contract import Context, Predictor, ProblemError, Solved, context_of, leaves, num_rows, take
from amortized.losses.objective import Loss, ObjectiveLoss

FEATURES, MEMORY, RIDGE = 64, 0.98, 1e-3


class HardContexts(Loss, nn.Module):
    r"""Another loss, on the part of each batch that is drawn by hardness: ``(N,)`` contexts give ``(N / pool,)`` values.

    The data's ``batch_size`` is N, so ``batch_size: 512`` with ``pool: 8`` trains on 64 rows a step. A candidate costs its draw
    from the data and a few hundred multiplications.

    Args:
        loss: what to train for; ``None`` is :class:`~amortized.losses.objective.ObjectiveLoss`.
        pool: candidates for each row that is trained on.
        mix: the part of ``p`` that is uniform, in (0, 1].

    Raises:
        ProblemError: if a batch holds fewer contexts than ``pool``.

    Example:
        >>> loss = HardContexts()
        >>> p = loss.probabilities(torch.tensor([0.0, 0.0, 1.0, 3.0]))
        >>> p
        tensor([0.0500, 0.0500, 0.2500, 0.6500])
        >>> loss.drawn(p, 100).bincount()  # 100 p_i each
        tensor([ 5,  5, 25, 65])
    """

    gram: Tensor
    moment: Tensor

    def __init__(self, loss: Loss | None = None, pool: int = 8, mix: float = 0.2) -> None:
        super().__init__()
        if pool < 2:
            raise ValueError(f"HardContexts: pool must be at least 2 candidates for each row trained on; got {pool}")
        if not 0 < mix <= 1:
            raise ValueError(f"HardContexts: mix must be in (0, 1], so that no row is left out; got {mix}")
        self.loss = loss if loss is not None else ObjectiveLoss()
        self.pool, self.mix = pool, mix
        self.register_buffer("gram", torch.zeros(FEATURES + 1, FEATURES + 1))
        self.register_buffer("moment", torch.zeros(FEATURES + 1))
        self._projection: Tensor | None = None

    @property
    def uses_gradient(self) -> bool:  # type: ignore[override]
        """As the loss that it trains for."""
        return self.loss.uses_gradient

    def __call__(self, model: Predictor, a: Context) -> Tensor:
        """The weighted losses of the rows drawn, ``(N / pool,)``; their backward pass teaches the scores."""
        return self._on_drawn(model, a, self.loss)

    def on_solved(self, model: Predictor, a: Solved) -> Tensor:
        return self._on_drawn(model, a, self.loss.on_solved)

    def _on_drawn(self, model: Predictor, a: Context, loss: Callable[[Any, Context], Tensor]) -> Tensor:
        N = num_rows(a)
        if self.pool > N:
            raise ProblemError(f"HardContexts draws one row of every {self.pool}: a batch of {N} contexts is too small")
        features = self.features(context_of(a))
        p = self.probabilities(self.scores(features))
        index = self.drawn(p, N // self.pool)
        weight, features = 1 / (N * p[index]), features[index]

        def learn(grad: Tensor) -> None:
            self.learn(features, torch.linalg.vector_norm(grad.flatten(1).float(), dim=1) / weight)

        return weight * loss(_Watched(model, learn), take(a, index))

    @torch.no_grad()
    def features(self, a: Context) -> Tensor:
        """``phi``, shape ``(N, F)``: logarithms of random projections, in which a power of the scale is linear; and one."""
        x = torch.cat([leaf.flatten(1).float() for leaf in leaves(a)], 1)
        x = (x - x.mean(0)) / (x.std(0, correction=0) + 1e-6)
        if self._projection is None or self._projection.device != x.device:
            generator = torch.Generator().manual_seed(0)
            F, dtype = FEATURES, x.dtype  # not the default one, which is the run's
            rows = torch.randn(x.shape[1], F, generator=generator, dtype=dtype) / x.shape[1] ** 0.5
            offset = 0.5 * torch.randn(1, F, generator=generator, dtype=dtype)
            self._projection = torch.cat([offset, rows]).to(x.device)
        z = torch.addmm(self._projection[0], x, self._projection[1:])
        return torch.cat([(z.abs() + 0.1).log(), z.new_ones(len(z), 1)], 1)

    @torch.no_grad()
    def scores(self, features: Tensor) -> Tensor:
        """``s``, shape ``(N,)``, the largest of them one; all alike before anything is learned."""
        gram = self.gram.float()
        ridge = RIDGE * gram.diagonal().mean() + torch.finfo(torch.float32).tiny
        v = torch.linalg.solve(
            gram + ridge * torch.eye(len(gram), dtype=gram.dtype, device=gram.device), self.moment.float()
        )
        log_s = features.float() @ v
        return (log_s - log_s.max()).exp()

    @torch.no_grad()
    def learn(self, features: Tensor, norm: Tensor) -> None:
        """Fit the scores to gradient norms ``(n,)``, known up to a common factor, plus a thousandth of their mean."""
        target = (norm + 1e-3 * norm.mean()).log()
        known = target.isfinite()
        features, target = torch.where(known[:, None], features.float(), 0), torch.where(known, target, 0)
        features, target = features.to(self.gram.dtype), target.to(self.gram.dtype)
        self.gram.mul_(MEMORY).addmm_(features.T, features)
        self.moment.mul_(MEMORY).addmv_(features.T, target)

    def probabilities(self, score: Tensor) -> Tensor:
        """``p`` of a draw, ``(N,)``; uniform where all scores are zero."""
        score = score.float() + torch.finfo(torch.float32).tiny
        return (1 - self.mix) * score / score.sum() + self.mix / len(score)

    def drawn(self, p: Tensor, n: int) -> Tensor:
        """Row numbers ``(n,)``, row i ``n p_i`` times up to rounding: n equal steps through ``p`` from a random start."""
        at = (torch.arange(n, device=p.device) + torch.rand(1, dtype=p.dtype, device=p.device)) / n
        return torch.searchsorted(p.cumsum(0), at).clamp_max(len(p) - 1)


class _Watched:
    """A model that tells the gradient at its predictions."""

    def __init__(self, model: Predictor, tell: Callable[[Tensor], None]) -> None:
        self._model, self._tell = model, tell

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def objective(self, b: Tensor, a: Context) -> Tensor:
        return self._model.objective(b, a)

    def initial(self, a: Context) -> Tensor:
        return self._model.initial(a)

    def iterates(self, a: Context) -> list[Tensor]:
        found = self._model.iterates(a)
        if found[-1].requires_grad:
            found[-1].register_hook(self._tell)
        return found
