"""Adam, row by row: the fallback that needs no line search."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from amortized.solvers.engine.gradient import GradientSolver


class AdamState(NamedTuple):
    """Where Adam is, and its running means of the gradient and of its square."""

    b: Tensor
    mean: Tensor
    square: Tensor
    iterations: Tensor


class Adam(GradientSolver):
    r"""Adam: ``b ← b − α_k m̂ / √(v̂ + ε²)``, with bias-corrected running means m̂ of ∇L and v̂ of its square.

    The best iterate of each row comes back, so an oscillating end does no harm. A fixed step size seldom reaches a
    small gradient; ``decay`` lets it fall along a half cosine, ``α_k = α (1 + cos(π k / steps)) / 2``, which gets
    further. Use it for noisy or kinked objectives, else :class:`~amortized.solvers.LBFGS`.

    ε sits under the root, unlike in the paper, so that a zero gradient can be differentiated through.

    Source: Kingma & Ba (2015), Algorithm 1.

    Args:
        steps: steps at most; in :meth:`iterates`, the number of iterates.
        lr: step size α, in units of b; where it is learned, what it starts from.
        betas: decay of the two running means, in [0, 1).
        eps: ε, in units of the gradient.
        decay: let the step size fall to zero over ``steps``.
        learn_lr: make the step size a parameter (its logarithm, so that it stays positive).
        tol: gradient norm at which a row is finished; None chooses by dtype.
        unroll: last steps whose gradients are differentiated; None all, 0 none (first-order).
        chunk: rows at work at a time; None for all.
        compile: fuse each round with ``torch.compile``; see :class:`~amortized.solvers.GradientSolver`.

    Raises:
        ValueError: if ``lr`` or ``betas`` is out of range.
    """

    def __init__(
        self,
        steps: int = 1000,
        lr: float = 0.05,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        decay: bool = True,
        learn_lr: bool = False,
        tol: float | None = None,
        unroll: int | None = None,
        chunk: int | None = None,
        compile: bool = False,
    ) -> None:
        super().__init__(steps, tol, unroll, chunk, compile)
        if lr <= 0 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"lr must be positive and betas in [0, 1), got lr={lr}, betas={betas}")
        self.betas, self.eps, self.decay = betas, eps, decay
        self.lr = lr
        self.log_lr = nn.Parameter(torch.tensor(math.log(lr))) if learn_lr else None

    def step_size(self, k: Tensor) -> Tensor:
        """The step size α_k of each row, after k steps (a floating-point tensor)."""
        lr = self.lr if self.log_lr is None else self.log_lr.exp()
        fall = 0.5 * (1 + torch.cos(math.pi * k / self.steps)) if self.decay else torch.ones_like(k)
        return lr * fall

    def init(self, b: Tensor, value: Tensor, grad: Tensor) -> AdamState:
        """The first step, from means of zero."""
        zero = torch.zeros_like(b)
        return self.step(AdamState(b, zero, zero, b.new_zeros(len(b), dtype=torch.int32)), value, grad)

    def step(self, state: AdamState, value: Tensor, grad: Tensor) -> AdamState:
        """One step from ``state.b``."""
        beta1, beta2 = self.betas
        iterations = state.iterations + 1
        k = iterations.to(grad.dtype).unsqueeze(1)
        lr = self.step_size(k - 1).to(grad.dtype)
        mean = beta1 * state.mean + (1 - beta1) * grad
        square = beta2 * state.square + (1 - beta2) * grad * grad
        size = (square / (1 - beta2**k) + self.eps**2).sqrt()
        return AdamState(state.b - lr * mean / (1 - beta1**k) / size, mean, square, iterations)
