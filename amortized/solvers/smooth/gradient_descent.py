"""Gradient descent, with momentum, with step sizes fixed or learned."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from amortized.solvers.engine.gradient import GradientSolver


class GradientDescentState(NamedTuple):
    """Where gradient descent is, and how fast it moves."""

    b: Tensor
    velocity: Tensor
    iterations: Tensor


class GradientDescent(GradientSolver):
    r"""Gradient descent with heavy-ball momentum: ``v ← μ v − α_k ∇L(b; a)``, ``b ← b + v``.

    The step size suits curvatures up to ``2 / lr``; steeper rows run away, and are reported as diverged once they
    overflow, with the best iterate before that. As an inner loop prefer :class:`~amortized.solvers.LBFGS`; this is the
    one to differentiate through.

    With ``learn_lr`` the step sizes are parameters (their logarithms, so that they stay positive): one number, or one
    per step with ``per_step``, and with ``features`` one for each number of a solution (Meta-SGD). Beyond the learned steps the
    last one is used.

    Source: Polyak (1964); learned step sizes: Li et al. (2017), *Meta-SGD*, for each number of a solution; Antoniou
    et al. (2019), *How to train your MAML*, for each step.

    Args:
        steps: steps at most; in :meth:`iterates`, the number of iterates.
        lr: step size α, in units of b² per unit of L; where it is learned, what it starts from.
        momentum: μ in [0, 1).
        learn_lr: make the step size a parameter.
        per_step: a learned step size for each step. Needs ``learn_lr``.
        tol: gradient norm at which a row is finished; None chooses by dtype.
        unroll: last steps whose gradients are differentiated; None all, 0 none (first-order).
        chunk: rows at work at a time; None for all.
        compile: fuse each round with ``torch.compile``; see :class:`~amortized.solvers.GradientSolver`.
        features: n, the numbers of one solution, for a learned step size of each; ``None``: one for all. Needs ``learn_lr``.

    Raises:
        ValueError: if ``lr`` or ``momentum`` is out of range, or ``per_step`` or ``features`` is set without ``learn_lr``.
    """

    def __init__(
        self,
        steps: int = 1000,
        lr: float = 0.1,
        momentum: float = 0.0,
        learn_lr: bool = False,
        per_step: bool = False,
        tol: float | None = None,
        unroll: int | None = None,
        chunk: int | None = None,
        compile: bool = False,
        features: int | None = None,
    ) -> None:
        super().__init__(steps, tol, unroll, chunk, compile)
        if lr <= 0 or not 0 <= momentum < 1:
            raise ValueError(f"lr must be positive and momentum in [0, 1), got lr={lr}, momentum={momentum}")
        if (per_step or features) and not learn_lr:
            raise ValueError("per_step and features ask for learned step sizes: set learn_lr as well")
        self.momentum = momentum
        log_lr = torch.full((max(steps, 1) if per_step else 1, *([features] if features else [])), math.log(lr))
        self.lr = lr
        self.log_lr = nn.Parameter(log_lr) if learn_lr else None

    def step_size(self, iterations: Tensor) -> Tensor | float:
        """The step size α_k ``(L, 1)`` or ``(L, n)`` of rows after that many steps; a plain number where it is not learned."""
        if self.log_lr is None:
            return self.lr
        picked = self.log_lr[iterations.clamp(max=len(self.log_lr) - 1)].exp()
        return picked.unsqueeze(1) if picked.ndim == 1 else picked

    def init(self, b: Tensor, value: Tensor, grad: Tensor) -> GradientDescentState:
        """The first step, from rest."""
        return self.step(
            GradientDescentState(b, torch.zeros_like(b), b.new_zeros(len(b), dtype=torch.int32)), value, grad
        )

    def step(self, state: GradientDescentState, value: Tensor, grad: Tensor) -> GradientDescentState:
        """One step from ``state.b``."""
        velocity = (-self.step_size(state.iterations) * grad).to(grad.dtype)
        if self.momentum:
            velocity = self.momentum * state.velocity + velocity
        return GradientDescentState(state.b + velocity, velocity, state.iterations + 1)
