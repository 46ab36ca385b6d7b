r"""Steps of ISTA or FISTA with learned weights, thresholds and momentum: networks that are short solvers.

FISTA is ``b_k = soft(y − s Dᵀ(D y − a), s λ)`` with ``y = b_{k-1} + β_k (b_{k-1} − b_{k-2})``, ISTA the same with ``β = 0``;
both take hundreds of steps. Here a few steps have numbers of their own,

    ``b_k = soft(y − W_kᵀ(D y − a), θ_k)``,

learned, as the module's ``refine``, by the loss of where they end.
"""

from __future__ import annotations

import abc
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from amortized.contract import evaluate
from amortized.solvers.base import Solution, Solver, Status, Trace
from amortized.solvers.structured import proximal


class UnrolledISTA(Solver, abc.ABC):
    """``b_k = soft(y − W_kᵀ(D y − a), θ_k)``, ``y = b_{k-1} + β_k (b_{k-1} − b_{k-2})``, k = 1 … ``steps``.

    For :class:`SparseCoding`; a subclass says ``W_k``. Thresholds are learned as multiples of ISTA's, ``λ / ‖D‖₂²``, by their
    logarithms; ``β_k``, which the sources of the subclasses do not have, as they are. As a solver it gives the best of its
    iterates, and no row is said to have converged; ``residual`` is that of :class:`~amortized.solvers.FISTA`.

    Args:
        steps: layers.
        momentum: learn ``β_k`` too, from 0.3; otherwise they are 0.
    """

    needs = ("dictionary", "weight", "objective")

    def __init__(self, steps: int = 16, momentum: bool = True) -> None:
        super().__init__(steps)
        self.log_threshold = nn.Parameter(torch.zeros(steps))
        self.momentum = nn.Parameter(torch.full((max(steps - 1, 0),), 0.3)) if momentum and steps > 1 else None

    @abc.abstractmethod
    def weights(self, D: Tensor, curvature: Tensor) -> Iterator[Tensor]:
        """``W_k``, each ``(m, n)``, for D of that shape with ``curvature`` ``‖D‖₂²``."""

    def _iterates(self, problem: Any, a: Tensor, b: Tensor) -> Iterator[Tensor]:
        D, curvature = problem.dictionary(), problem.dictionary.curvature()
        thresholds = problem.weight / curvature * self.log_threshold.exp()
        before = b
        for k, W in enumerate(self.weights(D, curvature)):
            # The first step has no step before it.
            y = b + self.momentum[k - 1] * (b - before) if self.momentum is not None and k else b
            before, b = b, proximal.l1(y - (y @ D.T - a) @ W, thresholds[k].expand(len(b)))
            yield b

    def _solve(self, problem: Any, a: Tensor, b: Tensor, dual: Tensor | None, trace: Trace | None) -> Solution:
        value = evaluate(problem, b, a)
        for k, ahead in enumerate(self._iterates(problem, a, b)):
            after = evaluate(problem, ahead, a)
            better = after < value
            b, value = torch.where(better.unsqueeze(1), ahead, b), torch.where(better, after, value)
            if trace is not None:
                trace(k + 1, b, value)
        count = torch.full_like(value, self.steps, dtype=torch.int64)
        status = torch.full_like(count, int(Status.LIMIT))
        residual = (problem.update(b, a) - b).norm(dim=1) * problem.dictionary.curvature()
        return Solution(b, value, residual, count, count.clone(), status)


class LISTA(UnrolledISTA):
    r"""``W_k = exp(g_k) (D + V_k) / ‖D‖₂²`` with a matrix ``V_k`` and a number ``g_k`` for each step, at first 0: ISTA.

    ``D b − a`` is the problem's own, so that what is learned is how to use it (weights "coupled" in the source), and a
    dictionary that learns takes its layers along.

    Source: Gregor & LeCun (2010); the coupling, Chen, Liu, Wang & Yin (2018), *Theoretical linear convergence of unfolded ISTA*.

    Args:
        features: m, numbers in a signal.
        atoms: n, columns of the dictionary.
        steps: layers.
        momentum: see :class:`UnrolledISTA`.
    """

    def __init__(self, features: int, atoms: int, steps: int = 16, momentum: bool = True) -> None:
        super().__init__(steps, momentum)
        self.log_step = nn.Parameter(torch.zeros(steps))
        self.change = nn.Parameter(torch.zeros(steps, features, atoms))

    def weights(self, D: Tensor, curvature: Tensor) -> Iterator[Tensor]:
        """As :meth:`UnrolledISTA.weights`."""
        if D.shape != self.change.shape[1:]:
            raise ValueError(
                f"LISTA was made for dictionaries {tuple(self.change.shape[1:])}; this one is {tuple(D.shape)}"
            )
        yield from (self.log_step.exp() / curvature)[:, None, None] * (D + self.change)


class ALISTA(UnrolledISTA):
    r"""``W_k = exp(g_k) W m / n``: few numbers a step are learned, and W is worked out from the dictionary beforehand.

    W is least coherent with D: column by column ``argmin ‖Dᵀ w_j‖²`` subject to ``d_jᵀ w_j = 1``, in closed form
    ``w_j = S⁻¹ d_j / (d_jᵀ S⁻¹ d_j)`` with ``S = D Dᵀ``. The denominators have the mean m / n, so that training starts, with
    ``g_k = 0``, at steps of about unit length.

    Source: Liu, Chen, Wang & Yin (2019), *ALISTA: analytic weights are as good as learned weights in LISTA*, (16).

    Args:
        steps: layers.
        momentum: see :class:`UnrolledISTA`.
    """

    def __init__(self, steps: int = 16, momentum: bool = True) -> None:
        super().__init__(steps, momentum)
        self.log_step = nn.Parameter(torch.zeros(steps))

    def weights(self, D: Tensor, curvature: Tensor) -> Iterator[Tensor]:
        """As :meth:`UnrolledISTA.weights`."""
        W = analytic_weights(D) * len(D) / D.shape[1]
        yield from (step * W for step in self.log_step.exp())


def analytic_weights(D: Tensor) -> Tensor:
    """W of :class:`ALISTA`, ``(m, n)``."""
    W = torch.linalg.solve(D @ D.T, D)
    return W / (W * D).sum(0)
