"""A price on what is outside the constraints."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from amortized.contract import Context, Predictor, ProblemError, bounded
from amortized.losses.objective import Loss


class PenaltyLoss(Loss):
    r"""``L(f(a); a) + Σ_i w_i |o_i|^p``, with ``o_i`` how far the i-th constraint is outside its bounds.

    The order of constraints is that of :func:`~amortized.contract.bounded`. With ``p = 1`` the minimum is feasible once every
    weight is above its multiplier, with ``p = 2`` it is always a little outside: by half the multiplier over the weight. Either
    way feasibility is learned, not ensured: the gap says how far it came.

    Source: Nocedal & Wright (2006), chapter 17.

    Args:
        weight: of every constraint, or a list with one for each.
        norm: p, 1 or 2.

    Raises:
        ProblemError: if the problem has no constraints, or not as many as weights.
    """

    def __init__(self, weight: float | list[float] = 10.0, norm: int = 2) -> None:
        weights = weight if isinstance(weight, Sequence) else [weight]
        if norm not in (1, 2) or not weights or min(weights) < 0:
            raise ValueError(f"PenaltyLoss: norm must be 1 or 2 and weights not negative; got {norm} and {weight}")
        self.weight, self.norm = weights, norm

    def __call__(self, model: Predictor, a: Context) -> Tensor:
        b = model.iterates(a)[-1]
        off = bounded(model, b, a).outside
        if len(self.weight) not in (1, off.shape[1]):
            raise ProblemError(f"PenaltyLoss has {len(self.weight)} weights, the problem {off.shape[1]} constraints")
        weight = torch.tensor(self.weight, dtype=off.dtype, device=off.device)
        return model.objective(b, a) + (weight * off**self.norm).sum(1)
