r"""Losses of a prediction and of its multipliers, from two networks.

Constraints are ``lower ≤ v(b; a) ≤ upper``, and y are their multipliers, from the model's second network, ``model.dual(a)``:
positive where an upper bound pushes, negative where a lower one does. With z the nearest to ``v + y/ρ`` within the bounds, the
augmented Lagrangian of a row is ``L + ρ/2 ‖v + y/ρ − z‖²``, and ``y⁺ = ρ (v + y/ρ − z)`` are its next multipliers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from amortized.contract import Context, Predictor, ProblemError, bounded
from amortized.losses.objective import Loss


class PrimalDualLoss(Loss, nn.Module):
    r"""``L(b; a) + ρ/2 ‖v + y/ρ − z‖²`` for the prediction and ``‖y − y⁺‖² / 2ρ`` for the multipliers, both at once.

    The prediction sees the multipliers as they are, and they the prediction as it is: each network follows the other's last
    state, as the steps of an augmented Lagrangian method do, for all contexts. No solution is needed. ρ grows by ``growth`` after
    every ``every`` calls in training, up to ``largest``: a count that is the same on every process and goes into checkpoints.

    The model has a network of ``multipliers``; what it learned starts solvers as well.

    Source: Park & Van Hentenryck (2023), *Self-supervised primal-dual learning for constrained optimization*, with both networks
    trained together in place of in turns.

    Args:
        rho: ρ at the start, in units of L over those of the constraints, squared.
        growth: factor of ρ.
        every: calls between.
        largest: bound on ρ.

    Raises:
        ProblemError: if the model predicts no multipliers, or not one for each constraint.
    """

    calls: Tensor

    def __init__(self, rho: float = 1.0, growth: float = 2.0, every: int = 500, largest: float = 1e3) -> None:
        super().__init__()
        if not 0 < rho <= largest or growth < 1 or every < 1:
            raise ValueError(
                "PrimalDualLoss: rho must be positive and at most largest, growth and every at least 1; "
                f"got {rho}, {largest}, {growth} and {every}"
            )
        self.rho, self.growth, self.every, self.largest = rho, growth, every, largest
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def __call__(self, model: Predictor, a: Context) -> Tensor:
        b = model.iterates(a)[-1]
        v = bounded(model, b, a)
        y = predicted(model, a, v.value)
        rho = (self.rho * self.growth ** (self.calls // self.every).to(v.value.dtype)).clamp(max=self.largest)
        if torch.is_grad_enabled() and getattr(model, "training", True):
            self.calls += 1
        shift = y.detach() / rho
        off = v.value + shift - v.nearest(shift)
        primal = model.objective(b, a) + rho / 2 * off.square().sum(1)
        dual = (y - rho * off.detach()).square().sum(1) / (2 * rho)
        return primal + dual


class KKTLoss(Loss):
    r"""``‖∇L + (∂v/∂b)ᵀ y‖² + weight ‖v − nearest(v + y)‖²``: the conditions of Karush, Kuhn and Tucker, as a residual.

    The second term is zero just where the constraints are met, multipliers have their signs, and none is left where a bound has
    room. A prediction and its multipliers with no residual solve a convex program. Second derivatives of L are needed.

    Source: Sambharya et al. (2024), *Learning to warm-start fixed-point optimization algorithms*, for residuals as losses.

    Args:
        weight: of the second term, in units of L² over those of b² and of the constraints, squared.

    Raises:
        ProblemError: if the model predicts no multipliers, or not one for each constraint.
    """

    def __init__(self, weight: float = 1.0) -> None:
        if weight <= 0:
            raise ValueError(f"KKTLoss: weight must be positive; got {weight}")
        self.weight = weight

    def __call__(self, model: Predictor, a: Context) -> Tensor:
        with torch.enable_grad():
            b = model.iterates(a)[-1]
            if not b.requires_grad:
                b = b.requires_grad_()
            v = bounded(model, b, a)
            y = predicted(model, a, v.value)
            lagrangian = model.objective(b, a) + (v.value * y).sum(1)
            (slope,) = torch.autograd.grad(lagrangian.sum(), b, create_graph=True)
        off = v.value - v.nearest(y)
        return slope.flatten(1).square().sum(1) + self.weight * off.square().sum(1)


def predicted(model: Predictor, a: Context, v: Tensor) -> Tensor:
    """The multipliers of a model, one for each constraint ``(B, m)``."""
    y = model.dual(a) if hasattr(model, "dual") else None
    if y is None or y.shape != v.shape:
        given = "predicts none" if y is None else f"predicts {y.shape[1]}"
        raise ProblemError(
            f"this loss needs a multiplier for each of the {v.shape[1]} constraints, and the model {given}: give it a network, "
            f"--model.multipliers MLP with out_features {v.shape[1]}"
        )
    return y
