"""How far a prediction is from a fixed point."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from amortized.contract import Context, Predictor, ProblemError
from amortized.losses.objective import Loss


class FixedPointLoss(Loss):
    r"""``‖T(b_k; a) − b_k‖²`` with ``b_k = T^k(f(a); a)``: the residual that k applications of the problem's map leave.

    For models that start an iteration, which then has to be short: the prediction is judged by where the iteration comes from it.
    The map is the problem's ``update`` (:class:`~amortized.contract.FixedPoint`), differentiated through k times.

    Source: Sambharya et al. (2024), *Learning to warm-start fixed-point optimization algorithms*, section 3.

    Args:
        steps: k, applications before the residual is taken.

    Raises:
        ProblemError: if the problem has no ``update``.
    """

    uses_gradient = False

    def __init__(self, steps: int = 5) -> None:
        if steps < 0:
            raise ValueError(f"FixedPointLoss: steps must not be negative; got {steps}")
        self.steps = steps

    def __call__(self, model: Predictor, a: Context) -> Tensor:
        problem: Any = model
        if not hasattr(problem, "update"):
            raise ProblemError(f"FixedPointLoss needs {type(model).__name__} to have a map, update(b, a) -> (B, *)")
        b = model.iterates(a)[-1]
        for _ in range(self.steps):
            b = problem.update(b, a)
        return (problem.update(b, a) - b).flatten(1).square().sum(1)
