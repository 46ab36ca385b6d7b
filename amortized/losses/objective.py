"""Losses that ask for the objective at the prediction and its refinements."""

from __future__ import annotations

import abc

import torch
from torch import Tensor

from amortized.contract import Context, Predictor, Solved


class Loss(abc.ABC):
    """The training signal of each row, differentiable with respect to the model's parameters."""

    uses_gradient = True
    """Whether it differentiates the objective; such a loss cannot train for a :class:`~amortized.contract.BlackBox`."""

    @abc.abstractmethod
    def __call__(self, model: Predictor, a: Context) -> Tensor:
        """``(B,)``, to be averaged over the batch."""

    def on_solved(self, model: Predictor, a: Solved) -> Tensor:
        """The signal on contexts whose solutions are known, ``(B,)``; a loss that does not learn from those overrides nothing."""
        return self(model, a.context)


class ObjectiveLoss(Loss):
    """``L(f(a); a)``: the objective of the prediction itself. Needs no solutions."""

    def __call__(self, model: Predictor, a: Context) -> Tensor:
        return model.objective(model.iterates(a)[-1], a)


class LogObjectiveLoss(Loss):
    """``log L(f(a); a)``, for a positive objective: a context counts by what its prediction lacks relatively.

    Where some contexts have far larger values than others, the mean objective is theirs alone.
    """

    def __call__(self, model: Predictor, a: Context) -> Tensor:
        return model.objective(model.iterates(a)[-1], a).log()


class IterateLoss(Loss):
    r"""``sum_t decay^(T-t) L(b_t; a)`` over the prediction and its refinements ``b_0, ..., b_T``, weights summing to one.

    Args:
        decay: 1 weighs all iterates alike; towards 0 only the last one counts (Andrychowicz et al. 2016; Amos 2023, 2.2.3).
    """

    def __init__(self, decay: float = 1.0) -> None:
        if not 0 < decay <= 1:
            raise ValueError(f"IterateLoss: decay must be in (0, 1]; got {decay}")
        self.decay = decay

    def __call__(self, model: Predictor, a: Context) -> Tensor:
        iterates = model.iterates(a)
        weights = [self.decay ** (len(iterates) - 1 - t) for t in range(len(iterates))]
        values = [w * model.objective(b, a) for w, b in zip(weights, iterates, strict=True)]
        return torch.stack(values).sum(0) / sum(weights)
