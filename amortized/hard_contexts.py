r"""Train more where the prediction is poor: often, with the same expected gradient; or harder, for the tail of the gap.

A batch of N contexts is a pool of candidates. One forward pass without a graph gives each a score ``s_i >= 0``, which
stands for its gap; ``n = N / pool`` of them are drawn, with probabilities and weights

    ``p_i = (1 - mix) s_i / sum_j s_j + mix / N``,     ``w_i = 1 / (N p_i)``,

and the loss is the mean of ``w_i loss_i`` over the drawn. Row i is drawn ``n p_i`` times on average, so the expected
gradient is that of the mean loss over the pool, which is that of ``E_a[loss]``; and ``w_i <= 1 / mix``.

Weights ``(N p_i)^(focus - 1)`` give up some of that: the expected gradient is then that of

    ``mean_i (N p_i)^focus loss_i``,     ``p`` held fixed,

unbiased for ``focus = 0`` and for no other value; with 1 the rows drawn are not weighted at all. Where the score is the
loss and ``mix`` is small, that is the direction of the gradient of ``mean_i loss_i^(1 + focus)``: a higher norm of the
gap, ruled by its tail. It needs no draw: with ``pool = 1`` every row is trained on, with the weight ``(N p_i)^focus``,
and its score is the loss that training computes anyway.

It is no free lunch, and on the shipped recipes no gain (``benchmarks/hard_contexts.py``): after equal CPU time against a
plain run with a tuned learning rate, the 95th percentile of the gap is 1.03 ± 0.12 times the plain one on ``sphere`` (unbiased,
pool 4), 1.15 ± 0.09 times on ``maml_sinusoid`` (pool 1, focus 1), and higher on ``sinusoid``. There is more to be won where
a gradient costs many forward passes, or where hard contexts are rare. Tune the learning rate first.

Nothing is remembered from step to step: scores are those of the present weights, and the draw comes from torch's
generator, which starts anew at every training step. So a resumed run, and any number of processes, need nothing more.

Source: importance sampling by bounds of the gradient's norm, Katharopoulos & Fleuret (2018), *Not all samples are
created equal*; systematic draws, Carpenter, Clifford & Fearnhead (1999), *Improved particle filter for nonlinear problems*.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from amortized.losses import Loss, ObjectiveLoss
from amortized.problem import Context, Predictor, ProblemError, num_rows, take, value_and_grad


class HardContexts(Loss):
    r"""Another loss, on the part of each batch that is drawn by hardness: ``(N,)`` contexts give ``(N / pool,)`` values.

    The data's ``batch_size`` is N, so ``batch_size: 1024`` with ``pool: 4`` trains on 256 rows a step. A forward pass is
    about a third of a training step, so to score 4 candidates for each row costs more than to train on that row.

    Args:
        loss: what to train for; ``None`` is :class:`~amortized.losses.ObjectiveLoss`.
        pool: candidates for each row that is trained on; 1 draws nothing and only weighs.
        mix: the part of ``p`` that is uniform, in (0, 1].
        score: of a candidate: ``"gradient"``, the norm of the objective's gradient at the prediction, or ``"loss"``, its
            loss above the pool's lowest. Where the optimum differs from row to row the loss says less about the gap.
        focus: in [0, 1]: 0 trains for the mean, without bias; more trains for the tail, at the expense of easy rows.

    Example:
        >>> loss = HardContexts(pool=4)
        >>> p = loss.probabilities(torch.tensor([0.0, 0.0, 1.0, 3.0]))
        >>> p
        tensor([0.0500, 0.0500, 0.2500, 0.6500])
        >>> loss.drawn(p, 100).bincount()  # 100 p_i each
        tensor([ 5,  5, 25, 65])
    """

    def __init__(
        self,
        loss: Loss | None = None,
        pool: int = 4,
        mix: float = 0.2,
        score: Literal["gradient", "loss"] = "gradient",
        focus: float = 0.0,
    ) -> None:
        if pool < 1:
            raise ValueError(f"HardContexts: pool must be at least 1 candidate for each row trained on; got {pool}")
        if not 0 < mix <= 1:
            raise ValueError(f"HardContexts: mix must be in (0, 1], so that no row is left out; got {mix}")
        if not 0 <= focus <= 1:
            raise ValueError(f"HardContexts: focus must be in [0, 1], 0 for unbiased gradients; got {focus}")
        if pool == 1 and focus == 0:
            raise ValueError(
                "HardContexts: focus must be above 0 where pool is 1, or nothing is drawn and nothing weighted"
            )
        if score not in ("gradient", "loss"):
            raise ValueError(f"HardContexts: score must be 'gradient' or 'loss'; got {score!r}")
        self.loss = loss if loss is not None else ObjectiveLoss()
        self.pool, self.mix, self.score, self.focus = pool, mix, score, focus

    def __call__(self, model: Predictor, a: Context) -> Tensor:
        """The weighted losses of the rows drawn, ``(N / pool,)``."""
        N = num_rows(a)
        if self.pool > N:
            raise ProblemError(f"HardContexts draws one row of every {self.pool}: a batch of {N} contexts is too small")
        if self.pool == 1:
            value = self.loss(model, a)
            p = self.probabilities(_above_lowest(value) if self.score == "loss" else self.scores(model, a))
            return (N * p) ** self.focus * value
        p = self.probabilities(self.scores(model, a))
        index = self.drawn(p, N // self.pool)
        return (N * p[index]) ** (self.focus - 1) * self.loss(model, take(a, index))

    @torch.no_grad()
    def scores(self, model: Predictor, a: Context) -> Tensor:
        """``s``, shape ``(N,)``, without a graph."""
        if self.score == "loss":
            return _above_lowest(self.loss(model, a))
        _, grad = value_and_grad(model, model.iterates(a)[-1], a)
        return torch.linalg.vector_norm(grad.flatten(1), dim=1)

    def probabilities(self, score: Tensor) -> Tensor:
        """``p`` of a draw, ``(N,)``; uniform where all scores are zero."""
        score = score.float() + torch.finfo(torch.float32).tiny
        return (1 - self.mix) * score / score.sum() + self.mix / len(score)

    def drawn(self, p: Tensor, n: int) -> Tensor:
        """Row numbers ``(n,)``, row i ``n p_i`` times up to rounding: n equal steps through ``p`` from a random start."""
        at = (torch.arange(n, device=p.device) + torch.rand(1, device=p.device)) / n
        return torch.searchsorted(p.cumsum(0), at).clamp_max(len(p) - 1)


def _above_lowest(value: Tensor) -> Tensor:
    return value.detach() - value.detach().min()
