"""Several losses at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from amortized.contract import Context, Predictor, ProblemError, Solved
from amortized.losses.objective import Loss


class SumLoss(Loss, nn.Module):
    """``Σ_i w_i loss_i(f, a)``, on one prediction: regression to known solutions beside the objective, say.

    Args:
        losses: at least one; a loss that draws rows (:class:`~amortized.HardContexts`) goes around this one, not into it.
        weights: w, one for each; ``None``: 1.

    Raises:
        ProblemError: if losses give different numbers of values.
    """

    def __init__(self, losses: list[Loss], weights: list[float] | None = None) -> None:
        super().__init__()
        weights = [1.0] * len(losses) if weights is None else weights
        if not losses or len(weights) != len(losses):
            raise ValueError(
                f"SumLoss takes a weight for each of at least one loss; got {len(weights)} for {len(losses)} losses"
            )
        self.losses, self.weights = losses, weights
        self.parts = nn.ModuleList(loss for loss in losses if isinstance(loss, nn.Module))

    @property
    def uses_gradient(self) -> bool:  # type: ignore[override]
        """Whether one of them does."""
        return any(loss.uses_gradient for loss in self.losses)

    def __call__(self, model: Predictor, a: Context) -> Tensor:
        shared = _Once(model)
        return self._sum([loss(shared, a) for loss in self.losses])

    def on_solved(self, model: Predictor, a: Solved) -> Tensor:
        shared = _Once(model)
        return self._sum([loss.on_solved(shared, a) for loss in self.losses])

    def _sum(self, values: list[Tensor]) -> Tensor:
        if len({value.shape for value in values}) > 1:
            shapes = ", ".join(f"{type(loss).__name__} {len(v)}" for loss, v in zip(self.losses, values, strict=True))
            raise ProblemError(f"SumLoss: its losses must give a value for each context; got {shapes}")
        return torch.stack([w * value for w, value in zip(self.weights, values, strict=True)]).sum(0)


class _Once:
    """A model that predicts for a batch once, however often it is asked."""

    def __init__(self, model: Predictor) -> None:
        self._model = model
        self._asked: Context | None = None
        self._found: list[Tensor] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def objective(self, b: Tensor, a: Context) -> Tensor:
        return self._model.objective(b, a)

    def initial(self, a: Context) -> Tensor:
        return self._model.initial(a)

    def iterates(self, a: Context) -> list[Tensor]:
        if self._asked is not a:
            self._asked, self._found = a, self._model.iterates(a)
        return self._found
