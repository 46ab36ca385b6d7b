"""Iterative amortization: a solver whose step is a network that sees the gradient."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from amortized.solvers.engine.gradient import GradientSolver


class LearnedUpdateState(NamedTuple):
    """Where the solver is, and how many steps it has taken."""

    b: Tensor
    iterations: Tensor


class LearnedUpdate(GradientSolver):
    r"""``b <- b - exp(p) g + r``, where a network gives ``(p, r)`` from ``b``, the gradient g and the number of the step.

    ``exp(p)`` is a learned diagonal preconditioner, ``r`` a learned move of its own. The network sees ``b``, ``g /
    |g|`` (scaled to entries of unit size) and ``log |g|``, so that gradients of all sizes are told apart. It starts as
    gradient descent with step size ``lr``, and learns as the module's ``refine``, with
    :class:`~amortized.losses.objective.IterateLoss` or the loss of the last iterate. All rows share it; n is fixed.

    By default gradients are inputs and not differentiated themselves (``unroll=0``), as in the source: no second derivatives.

    Source: Marino, Yue & Mandt (2018), *Iterative amortized inference*; Andrychowicz et al. (2016), *Learning to learn by
    gradient descent by gradient descent*.

    Args:
        features: n, the numbers of one solution.
        steps: of a refinement.
        lr: the step size it starts from, in units of ``b`` over those of g. Where gradient descent diverges with it, so does
            training.
        hidden: widths of the network's hidden layers.
        tol: gradient norm at which a row is finished; None chooses by dtype.
        unroll: last steps whose gradients are differentiated; None all, 0 none.
        chunk: rows at work at a time; None for all.

    Raises:
        ValueError: if ``lr`` is not positive, or solutions have another number of features.
    """

    def __init__(
        self,
        features: int,
        steps: int = 5,
        lr: float = 0.004,
        hidden: Sequence[int] = (256, 256),
        tol: float | None = None,
        unroll: int | None = 0,
        chunk: int | None = None,
    ) -> None:
        super().__init__(steps, tol, unroll, chunk)
        if lr <= 0:
            raise ValueError(f"lr must be positive, got {lr}")
        self.features, self.lr = features, lr
        widths = [2 * features + 1 + max(steps, 1), *hidden]
        layers: list[nn.Module] = []
        for inward, outward in zip(widths, widths[1:], strict=False):
            layers += [nn.Linear(inward, outward), nn.SiLU()]
        last = nn.Linear(widths[-1], 2 * features)
        nn.init.zeros_(last.bias)
        last.weight.data *= 0.01
        self.network = nn.Sequential(*layers, last)

    def init(self, b: Tensor, value: Tensor, grad: Tensor) -> LearnedUpdateState:
        """The first step."""
        if b.shape[1] != self.features:
            raise ValueError(
                f"LearnedUpdate was made for solutions of {self.features} numbers; these have {b.shape[1]}"
            )
        return self.step(LearnedUpdateState(b, b.new_zeros(len(b), dtype=torch.int32)), value, grad)

    def step(self, state: LearnedUpdateState, value: Tensor, grad: Tensor) -> LearnedUpdateState:
        """One step from ``state.b``."""
        size = (grad.square().mean(1, keepdim=True) + torch.finfo(grad.dtype).tiny).sqrt()
        steps = max(self.steps, 1)
        number = nn.functional.one_hot(state.iterations.long().clamp(max=steps - 1), steps)
        seen = torch.cat([state.b, grad / size, size.log(), number.to(grad.dtype)], 1)
        p, r = self.network(seen.to(next(self.parameters()).dtype)).to(grad.dtype).chunk(2, 1)
        return LearnedUpdateState(state.b - (math.log(self.lr) + p).exp() * grad + r, state.iterations + 1)
