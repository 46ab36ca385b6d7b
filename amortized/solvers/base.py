"""What every solver takes and gives: B problems at once, each row with its own progress, its own end."""

from __future__ import annotations

import abc
import enum
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from amortized.contract import (
    CommonDraws,
    Context,
    Problem,
    differentiable,
    is_random,
    leaves,
    map_leaves,
    take,
    value_and_grad,
    violation,
)

Trace: TypeAlias = Callable[[int, Tensor, Tensor], None]
"""Called after every round with the evaluations so far, the best ``b`` of each row ``(B, *)`` and its value ``(B,)``."""

_UNKNOWN = torch.empty(0)


class Status(enum.IntEnum):
    """How a row ended."""

    CONVERGED = 0
    """The residual is at most ``tol``, as the solver measures it."""
    LIMIT = 1
    """Out of steps, or no further progress is possible at this precision; the best iterate is returned."""
    DIVERGED = 2
    """A value or a gradient was not finite, and the solver could not step back; the best finite iterate is returned."""
    RUNNING = 3
    """Not ended: only inside the loop."""
    INFEASIBLE = 4
    """Proved to have no solution: constraints that contradict each other, or an objective that falls for ever."""


class Solution(NamedTuple):
    """What a solver found, row by row; all tensors detached, on the problem's device."""

    b: Tensor
    """The best iterate ``(B, *)``, in the shape and dtype of the start."""
    value: Tensor
    """Its objective ``(B,)``."""
    residual: Tensor
    """Its gradient norm ``(B,)``, or the residual by which the solver stops, which it documents."""
    iterations: Tensor
    """Steps taken ``(B,)``, integer."""
    evaluations: Tensor
    """Evaluations of the objective (with its gradient where the solver uses one) ``(B,)``, integer."""
    status: Tensor
    """A :class:`Status` for each row ``(B,)``, integer."""
    violation: Tensor = _UNKNOWN
    """How far ``b`` is from meeting its constraints ``(B,)``, in their units; :meth:`Solver.solve` sets it."""
    dual: Tensor | None = None
    """The multipliers ``(B, m)``, in an order that the solver documents; ``None`` of solvers that have none."""

    @property
    def converged(self) -> Tensor:
        """Which rows reached the tolerance ``(B,)``."""
        return self.status == Status.CONVERGED

    @property
    def idle(self) -> Tensor:
        """Which rows converged without a step: from a cold start, a sign of a tolerance above all there is to find ``(B,)``."""
        return self.converged & (self.iterations == 0)

    @property
    def infeasible(self) -> Tensor:
        """Which rows were proved to have no solution ``(B,)``; only solvers with such a proof say so."""
        return self.status == Status.INFEASIBLE

    @property
    def diverged(self) -> Tensor:
        """Which rows met a value that is not finite and stopped there ``(B,)``."""
        return self.status == Status.DIVERGED


class Optimality(NamedTuple):
    """What holds where a solver ended: equations ``F(w) = 0``, row by row, which :class:`Implicit` differentiates."""

    equations: Callable[[Tensor], Tensor]
    """F, ``(B, k) -> (B, k)``, on the graph of all else that the problem sees."""
    w: Tensor
    """Their root ``(B, k)``; the first n numbers of a row are its solution's."""
    adjoint: Callable[[Tensor], Tensor] | None = None
    """``v -> (∂F/∂w)⁻ᵀ v``, where structure makes that cheap; None leaves it to :class:`Implicit`."""


def tolerance(tol: float | None, dtype: torch.dtype) -> float:
    """``tol``, or what the dtype can be asked for: 1e-6 in float64, 1e-4 in float32, 1e-2 below."""
    if tol is not None:
        return tol
    return {torch.float64: 1e-6, torch.float32: 1e-4}.get(dtype, 1e-2)


class Solver(nn.Module, abc.ABC):
    """Improves ``b`` for each context ``a``: ``min_b L(b; a)``, B independent problems at once.

    A module, so that learned step sizes are parameters of the model that refines with it. A subclass writes
    :meth:`_solve`, and :meth:`_iterates` if it can be differentiated through.

    Args:
        steps: rounds at most; a round is one evaluation of every row (of its population, for solvers that have one).
        tol: residual at which a row is finished; None chooses by dtype (1e-6 in float64, 1e-4 in float32). A gradient is
            measured against ``tol · min(1, max(|L|, ‖∇L‖))``, with L at the row's start: an objective in small units is
            solved as far as one in large. A row that gets no further at its precision has converged at ``tol`` itself.
    """

    needs: tuple[str, ...] = ("objective",)
    """The methods of a problem that the solver calls."""

    uses_gradient = True
    """Whether it follows gradients of the objective; such a solver refuses a :class:`~amortized.contract.BlackBox`."""

    def __init__(self, steps: int = 1000, tol: float | None = None) -> None:
        super().__init__()
        if steps < 0:
            raise ValueError(f"steps must not be negative, got {steps}")
        self.steps, self.tol = steps, tol

    def require(self, problem: Any) -> None:
        """Raises ``TypeError`` unless the problem has the methods that the solver needs, which it names, and its gradient."""
        missing = [method for method in self.needs if not hasattr(problem, method)]
        if missing:
            raise TypeError(
                f"{type(self).__name__} needs more of a problem than {type(problem).__name__} has: "
                f"{', '.join(missing)} (see amortized.contract); write it, or use LBFGS, which needs only objective."
            )
        if self.uses_gradient and not differentiable(problem):
            raise TypeError(
                f"{type(self).__name__} follows gradients, and {type(problem).__name__} has none (differentiable = False): use "
                "CMAES, or MultiStart around it"
            )

    def solve(
        self, problem: Problem, a: Context, b: Tensor, *, dual: Tensor | None = None, trace: Trace | None = None
    ) -> Solution:
        """The best ``b`` found for each row, from the start ``b`` ``(B, *)``.

        Never raises because of a row, never returns a row worse than it started (beyond rounding), and no row
        touches another. B may be 0. Works under ``no_grad`` and ``inference_mode``.

        A random objective is searched with its draws fixed, by a seed drawn once from torch's generator; its rows then
        keep their places, so finished ones cost as much as others.

        Args:
            problem: anything with ``objective(b, a) -> (B,)``.
            a: contexts, B rows.
            b: where to start ``(B, *)``, floating point.
            dual: multipliers to start from ``(B, m)``, as in :class:`Solution`; solvers that have none pass it over.
            trace: called after each round with the evaluations so far, the best ``b`` and their values ``(B,)``; rows then
                keep their places. With constraints a value means nothing until its ``b`` is feasible.

        Raises:
            TypeError: if the problem lacks what the solver needs of it.
            ValueError: if the objective does not return one value per row, or contexts, starts and multipliers differ in
                number.
        """
        with self._prepared(problem, a, b, dual) as (problem, a, b, dual):
            found = self._solve(problem, a, b, dual, trace) if len(b) else _nothing(b, dual)
            return found._replace(violation=violation(problem, found.b, a))

    @contextmanager
    def _prepared(
        self, problem: Problem, a: Context, b: Tensor, dual: Tensor | None
    ) -> Iterator[tuple[Problem, Context, Tensor, Tensor | None]]:
        """Checked, with the draws of a random objective fixed; inside, no graph is built, and autograd works."""
        self.require(problem)
        with torch.inference_mode(False), torch.no_grad():
            a, b, dual = map_leaves(ordinary, a), ordinary(b), None if dual is None else ordinary(dual).to(b.dtype)
            for leaf in leaves(a):
                if len(leaf) != len(b):
                    raise ValueError(
                        f"got {len(b)} starts and contexts with {len(leaf)} rows; give one start to each context"
                    )
            if dual is not None and (dual.ndim != 2 or len(dual) != len(b)):
                raise ValueError(
                    f"dual must have one row of multipliers for each start, ({len(b)}, m); got {tuple(dual.shape)}"
                )
            yield fixed(problem, b, a), a, b, dual

    @abc.abstractmethod
    def _solve(self, problem: Any, a: Context, b: Tensor, dual: Tensor | None, trace: Trace | None) -> Solution:
        """As :meth:`solve`, of one row at least; a random ``problem`` is in :class:`~amortized.contract.CommonDraws`.

        The violation is left to :meth:`solve`.
        """

    def iterates(self, problem: Problem, a: Context, b: Tensor) -> Iterator[Tensor]:
        """The ``steps`` iterates after ``b``, each ``(B, *)``; nothing is stopped early, no row is dropped.

        Where gradients are on, they are on the graph of ``b``, of the objective's and of the solver's parameters, and
        can be differentiated through. Where they are off, no graph is built.

        Raises:
            TypeError: if the solver cannot be differentiated through, or the problem lacks what it needs.
        """
        self.require(problem)
        graph = torch.is_grad_enabled()
        with torch.inference_mode(False):
            a, b = (a, b) if graph else (map_leaves(ordinary, a), ordinary(b))
        found = self._iterates(problem, a, b)
        while True:
            # Not around the yield: between iterates the caller's own modes hold.
            with torch.inference_mode(False), torch.set_grad_enabled(graph):
                point = next(found, None)
            if point is None:
                return
            yield point

    def _iterates(self, problem: Any, a: Context, b: Tensor) -> Iterator[Tensor]:
        """As :meth:`iterates`."""
        raise TypeError(
            f"{type(self).__name__} cannot be differentiated through, so it cannot refine a prediction inside forward; "
            "use GradientDescent, Adam or LBFGS there."
        )

    def optimality(self, problem: Any, a: Context, found: Solution) -> Optimality:
        """The equations that hold where the solver ended: here, that the objective's gradient is zero."""

        def gradient(w: Tensor) -> Tensor:
            return value_and_grad(problem, w.view_as(found.b), a, create_graph=True)[1].flatten(1)

        return Optimality(gradient, found.b.flatten(1))


def size(value: Tensor, residual: Tensor) -> Tensor:
    """``min(1, max(|L|, ‖∇L‖))`` of each row ``(B,)``: what tolerances on gradients are relative to."""
    return torch.maximum(value.abs(), residual).clamp(max=1)


def fixed(problem: Problem, b: Tensor, a: Context) -> Problem:
    """The problem; if its objective draws random numbers, with its draws fixed by a seed from torch's generator."""
    if len(b) and hasattr(problem, "objective") and is_random(problem, b[:1], take(a, slice(0, 1))):
        return CommonDraws(problem)
    return problem


def check_value(value: Tensor, b: Tensor) -> None:
    """Raises ``ValueError`` unless an objective returned one number per row."""
    if value.shape != b.shape[:1]:
        raise ValueError(
            f"objective(b, a) returned shape {tuple(value.shape)} for b of shape {tuple(b.shape)}; it must return one "
            f"value per row, shape ({len(b)},). Sum or average over every dimension but the first."
        )


def ordinary(x: Tensor) -> Tensor:
    """A detached copy of ``x`` that autograd can work with, also where ``x`` was made under ``inference_mode``."""
    return x.detach().clone() if x.is_inference() else x.detach()


def _nothing(b: Tensor, dual: Tensor | None) -> Solution:
    value, count = b.new_empty(0), torch.empty(0, dtype=torch.int64, device=b.device)
    return Solution(b, value, value.clone(), count, count.clone(), count.clone(), dual=dual)
