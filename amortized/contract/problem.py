"""Protocols: what a problem offers, and evaluating it."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from amortized.contract.rows import Context


@runtime_checkable
class Problem(Protocol):
    """Anything with an objective: an :class:`~amortized.AmortizedModule`, or a plain class."""

    def objective(self, b: Tensor, a: Context) -> Tensor:
        """``L(b; a)`` of each row, shape ``(B,)``; row i depends on row i of ``b`` and ``a`` alone."""
        ...


class Predictor(Problem, Protocol):
    """A problem with a model that predicts its solutions: what a loss trains."""

    def iterates(self, a: Context) -> list[Tensor]:
        """The network's prediction and every refinement of it, each ``(B, *)``; the last one is the prediction."""
        ...

    def initial(self, a: Context) -> Tensor:
        """Where a solver starts cold, ``(B, *)``."""
        ...


def value_and_grad(problem: Problem, b: Tensor, a: Context, create_graph: bool = False) -> tuple[Tensor, Tensor]:
    """``L(b; a)`` of shape ``(B,)`` and its gradient with respect to ``b``, in one backward pass.

    Rows are independent, so the gradient of the sum holds each row's own. With ``create_graph`` both stay on the
    graph of ``b``; without, both are detached. Works under ``no_grad`` (not under ``inference_mode``: leave that first).
    """
    with torch.enable_grad():
        b = b if create_graph and b.requires_grad else b.detach().requires_grad_()
        value = problem.objective(b, a)
        if not len(b):  # an objective of no rows may have no graph
            return value.detach(), torch.zeros_like(b)
        (grad,) = torch.autograd.grad(value.sum(), b, create_graph=create_graph)
    return (value, grad) if create_graph else (value.detach(), grad)


def evaluate(problem: Problem, b: Tensor, a: Context) -> Tensor:
    """``L(b; a)`` without a graph, shape ``(B,)``."""
    with torch.no_grad():
        return problem.objective(b, a)


class BlackBox(Problem, Protocol):
    """An objective without a useful gradient: computed outside torch (a simulator), or constant almost everywhere.

    It says ``differentiable = False``, and is then trained, solved and certified by its values alone: losses and solvers that
    follow gradients refuse it. No solver here keeps constraints by values alone: put them into the objective, as a penalty.
    """

    differentiable: bool


def differentiable(problem: Any) -> bool:
    """Whether gradients of the objective may be followed; a problem that is a :class:`BlackBox` says that they may not."""
    return bool(getattr(problem, "differentiable", True))


class Composite(Problem, Protocol):
    """``L(b; a) = smooth(b; a) + r(b; a)``, where r need not be differentiable but has a proximal map."""

    def smooth(self, b: Tensor, a: Context) -> Tensor:
        """The differentiable part ``(B,)``."""
        ...

    def prox(self, b: Tensor, t: Tensor, a: Context) -> Tensor:
        """``argmin_x r(x; a) + ‖x − b‖² / 2t`` of each row, for ``t`` of shape ``(B,)``."""
        ...


class Projectable(Problem, Protocol):
    """An objective to be minimized over a set that each row can be projected on; how far off it is, is the violation."""

    def project(self, b: Tensor, a: Context) -> Tensor:
        """The nearest point of the set ``(B, *)``."""
        ...


class LeastSquares(Problem, Protocol):
    """``L(b; a) = ½ ‖residuals(b; a)‖²``: ``objective`` must return just that."""

    def residuals(self, b: Tensor, a: Context) -> Tensor:
        """``(B, m)``."""
        ...


class Constrained(Problem, Protocol):
    """An objective subject to ``equality(b; a) = 0`` and ``inequality(b; a) ≤ 0``; one of the two may be left out.

    A solution counts as feasible while its :func:`~amortized.contract.violation` is at most ``feasibility_tol``, in the
    constraints' own units: an attribute that the problem may have, 1e-4 where it has none. That holds of a program and of a
    set with ``project`` too.
    """

    def equality(self, b: Tensor, a: Context) -> Tensor:
        """``c(b; a)``, ``(B, p)``: zero where feasible, either sign elsewhere."""
        ...

    def inequality(self, b: Tensor, a: Context) -> Tensor:
        """``d(b; a)``, ``(B, m)``: at most zero where feasible."""
        ...


class QuadraticProgram(NamedTuple):
    """``min ½ bᵀ P b + qᵀ b`` subject to ``lower ≤ A b ≤ upper``: equalities have equal bounds, free ones infinite."""

    P: Tensor
    """``(n, n)`` where all rows share it, else ``(B, n, n)``; positive semidefinite."""
    q: Tensor
    """``(B, n)``."""
    A: Tensor
    """``(m, n)`` where all rows share it, else ``(B, m, n)``."""
    lower: Tensor
    """``(B, m)``."""
    upper: Tensor
    """``(B, m)``."""


class Quadratic(Problem, Protocol):
    """A problem that is a quadratic program: ``objective`` is its value, without the constraints."""

    def program(self, a: Context) -> QuadraticProgram:
        """The program of each context."""
        ...


class Polyhedron(NamedTuple):
    """``lower ≤ A b ≤ upper``: equalities have equal bounds, free ones infinite."""

    A: Tensor
    """``(m, n)`` where all rows share it, else ``(B, m, n)``."""
    lower: Tensor
    """``(B, m)``."""
    upper: Tensor
    """``(B, m)``."""


class LinearlyConstrained(Problem, Protocol):
    """Any objective, over a polyhedron; a :class:`Quadratic` problem has that of its program."""

    def polyhedron(self, a: Context) -> Polyhedron:
        """Where the solutions of each context lie."""
        ...


def polyhedron(problem: Any, a: Context) -> Polyhedron:
    """What a problem's ``polyhedron`` says, or else the constraints of its ``program``."""
    if hasattr(problem, "polyhedron"):
        found: Polyhedron = problem.polyhedron(a)
        return found
    program: QuadraticProgram = problem.program(a)
    return Polyhedron(program.A, program.lower, program.upper)


class Known(Problem, Protocol):
    """A problem that declares its true minimum; what a prediction lacks can then be told apart: ``metrics.decomposition``.

    If it also has a method ``family_optimum(a) -> (B,)``, that is ``min_b L(b; a)``, the best that any ``b`` attains. It lies
    above ``optimum`` where solutions are approximations of a family (a mean-field Gaussian for a correlated posterior).
    """

    def optimum(self, a: Context) -> Tensor | None:
        """``L*``, the true minimal value ``(B,)``; no ``b`` is below it. ``None``: not known after all."""
        ...


class FixedPoint(Protocol):
    """A map whose fixed point is sought; with an ``objective`` as well, solutions report it.

    Where ``‖update(b, a) − b‖`` means little, a method ``fixed_point_error(b, moved, a) -> (B,)``, with
    ``moved = update(b, a)``, says in the problem's own units how far ``b`` is from a fixed point.
    """

    def update(self, b: Tensor, a: Context) -> Tensor:
        """The map ``(B, *) -> (B, *)``, one row independent of another."""
        ...
