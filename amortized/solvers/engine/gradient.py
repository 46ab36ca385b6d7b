"""Solvers that look at values and gradients: by rows that end each for itself, or as steps to differentiate through."""

from __future__ import annotations

import abc
import math
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from amortized.contract import Context, Problem, value_and_grad
from amortized.solvers.base import check_value
from amortized.solvers.engine.rows import Engine, Rows, RowSolver


class State(Protocol):
    """What a solver remembers of its rows: a ``NamedTuple`` of tensors with rows along the axis of the solver's layout."""

    @property
    def b(self) -> Tensor:
        """The point to evaluate next ``(L, n)``."""

    @property
    def iterations(self) -> Tensor:
        """Steps taken so far ``(L,)``, integer."""


class GradientSolver(RowSolver):
    """A solver that looks at values and gradients: a subclass writes :meth:`init` and :meth:`step`, on rows ``(L, n)``.

    Args:
        steps: evaluations of each row after the first, at most; in :meth:`iterates`, the number of iterates.
        tol: gradient norm at which a row is finished; None chooses by dtype.
        unroll: in :meth:`iterates`, the number of last steps in which the gradient's own dependence on ``b`` is
            followed. None follows all; 0 none: first-order, as in first-order MAML; no second derivatives needed.
        chunk: rows at work at a time; None lets the solver choose.
        compile: fuse each round, the objective included, into a few kernels with ``torch.compile``, which takes tens of
            seconds for each problem, dtype and n. A random objective, a trace and :meth:`iterates` are not compiled. An
            objective that cannot be traced stays as it is, with a warning.
    """

    recovers: bool = False
    """Whether the solver itself steps back from a value that is not finite. Otherwise such a row has diverged."""

    def __init__(
        self,
        steps: int = 1000,
        tol: float | None = None,
        unroll: int | None = None,
        chunk: int | None = None,
        compile: bool = False,
    ) -> None:
        super().__init__(steps, tol, chunk)
        self.unroll, self.compiled = unroll, compile

    @abc.abstractmethod
    def init(self, b: Tensor, value: Tensor, grad: Tensor) -> State:
        """The state after the first evaluation; ``state.b`` is where to look next. No operation in place."""

    @abc.abstractmethod
    def step(self, state: Any, value: Tensor, grad: Tensor) -> State:
        """The state after ``value`` ``(L,)`` and ``grad`` ``(L, n)`` at ``state.b``; rows independent of each other."""

    def stalled(self, state: Any) -> Tensor | None:
        """Which rows can make no more progress ``(L,)``, if the solver can tell."""
        return None

    def visited(self, state: Any) -> Tensor:
        """The iterate to hand out ``(L, n)``: the next point, or the last accepted one where points are only trials."""
        return state.b

    def begin(self, problem: Problem, a: Context, b: Tensor) -> Rows:
        """Rows that start at ``b`` ``(L, *)``, evaluated there."""
        return self.first(b, *value_and_grad(problem, b, a))

    def first(self, b: Tensor, value: Tensor, grad: Tensor) -> Rows:
        """Rows that start at ``b`` ``(L, *)``, where value and gradient are these."""
        check_value(value, b)
        at, grad = self.layout.flat(b), self.layout.flat(grad)
        return self.enter(at, value, self.layout.dot(grad, grad).sqrt(), self.init(at, value, grad))

    def advance(self, problem: Problem, a: Context, rows: Rows, shape: torch.Size) -> Rows:
        """One round: value and gradient of every row where its state asks for them, and what follows from that."""
        value, grad = value_and_grad(problem, self.layout.shaped(rows.state.b, shape), a)
        return self.tell(rows, value, self.layout.flat(grad))

    def tell(self, rows: Rows, value: Tensor, grad: Tensor) -> Rows:
        """What one evaluation means for each row: its best so far, its status, and its next point."""
        state = self.step(rows.state, value, grad)
        residual = self.layout.dot(grad, grad).sqrt()
        return self.settle(
            rows, rows.state.b, value, residual, state, state.iterations,
            stalled=self.stalled(state), recovers=self.recovers,
        )  # fmt: skip

    def engine(self) -> Engine:
        """As :meth:`RowSolver.engine`; compiled where that is asked for."""
        if not self.compiled:
            return super().engine()
        from amortized.solvers.engine.compiled import (
            Compiled,  # and with it the compiler, which takes seconds to import
        )

        return Compiled(self)

    def between(self, rows: Rows) -> int:
        """As :meth:`RowSolver.between`; whole graphs of them, where rounds are compiled."""
        together = self.together(rows.b.shape[self.layout.across]) if self.compiled else 1
        return together * math.ceil(super().between(rows) / together)

    def together(self, n: int) -> int:
        """Rounds of n numbers compiled as one graph: more where a call costs as much as a round."""
        return 4 if self.tiny(n) else 1

    def tiny(self, n: int) -> bool:
        """Whether rows of n numbers have so few that a compiler unrolls every sum over them."""
        return n <= 8

    def _iterates(self, problem: Problem, a: Context, b: Tensor) -> Iterator[Tensor]:
        """As :meth:`Solver.iterates`; ``unroll`` says how far gradients are followed."""
        graph, state, at = torch.is_grad_enabled(), None, self.layout.flat(b)
        for k in range(self.steps):
            follow = graph and (self.unroll is None or k >= self.steps - self.unroll)
            value, grad = value_and_grad(problem, self.layout.shaped(at, b.shape), a, create_graph=follow)
            check_value(value, b)
            value, grad = value if follow else value.detach(), self.layout.flat(grad)
            state = self.init(at, value, grad) if state is None else self.step(state, value, grad)
            at = state.b
            yield self.layout.shaped(self.visited(state), b.shape)
