"""What a solver, a loss or a metric may ask of a problem: ``objective``, and nothing from Lightning.

A problem is any object with ``objective(b, a) -> (B,)``: B independent problems ``min_b L(b; a)`` at once, one to a
row. Contexts ``a`` are a tensor or a ``NamedTuple`` of tensors; solutions ``b`` are one real tensor ``(B, *)``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor

Context: TypeAlias = Any
"""A tensor ``(B, *)``, or a (nested) ``NamedTuple`` of tensors that all have the leading dimension B."""


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


def map_leaves(f: Callable[[Tensor], Tensor], a: Context) -> Context:
    """The context with ``f`` applied to each of its tensors."""
    if isinstance(a, Tensor):
        return f(a)
    if isinstance(a, tuple) and hasattr(a, "_fields"):
        return type(a)(*(map_leaves(f, leaf) for leaf in a))
    raise TypeError(
        f"a context is a tensor or a NamedTuple of tensors, all with the same leading dimension; got {type(a).__name__}. "
        "Wrap the parts in a typing.NamedTuple."
    )


def leaves(a: Context) -> list[Tensor]:
    """The tensors of a context, in order."""
    found: list[Tensor] = []
    map_leaves(lambda leaf: (found.append(leaf), leaf)[1], a)
    return found


def num_rows(a: Context) -> int:
    """B, the number of problems in a batch of contexts."""
    return len(leaves(a)[0])


def take(a: Context, index: Tensor | slice) -> Context:
    """The rows of a context that ``index`` names: a slice, or a tensor of row numbers."""
    if isinstance(index, slice):
        return map_leaves(lambda leaf: leaf[index], a)
    return map_leaves(lambda leaf: leaf.index_select(0, index), a)


def value_and_grad(problem: Problem, b: Tensor, a: Context, create_graph: bool = False) -> tuple[Tensor, Tensor]:
    """``L(b; a)`` of shape ``(B,)`` and its gradient with respect to ``b``, in one backward pass.

    Rows are independent, so the gradient of the sum holds each row's own. With ``create_graph`` both stay on the
    graph of ``b``; without, both are detached. Works under ``no_grad`` (not under ``inference_mode``: leave that first).
    """
    with torch.enable_grad():
        b = b if create_graph and b.requires_grad else b.detach().requires_grad_()
        value = problem.objective(b, a)
        (grad,) = torch.autograd.grad(value.sum(), b, create_graph=create_graph)
    return (value, grad) if create_graph else (value.detach(), grad)


@contextmanager
def draws(seed: int, device: torch.device) -> Iterator[None]:
    """Inside, torch's generators start from ``seed``; afterwards they are as if nothing had been drawn."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices, enabled=True):
        torch.manual_seed(seed)
        yield


def is_random(problem: Problem, b: Tensor, a: Context) -> bool:
    """Whether the objective draws random numbers: evaluating it moves torch's generator."""
    state = torch.cuda.get_rng_state if b.is_cuda else torch.get_rng_state
    with torch.no_grad(), draws(0, b.device):
        before = state()
        problem.objective(b, a)
        return not torch.equal(before, state())


class CommonDraws:
    """A random objective with its draws fixed (common random numbers): the same ``seed`` before every evaluation.

    The draws belong to places in the batch, so the rows of ``b`` and ``a`` must keep their places.
    """

    def __init__(self, problem: Problem, seed: int) -> None:
        self.problem, self.seed = problem, seed

    def objective(self, b: Tensor, a: Context) -> Tensor:
        with draws(self.seed, b.device):
            return self.problem.objective(b, a)

    def __getattr__(self, name: str) -> Any:
        """What else the problem has, under the same draws."""
        if name == "problem":  # not there yet: a copy being made
            raise AttributeError(name)
        attribute = getattr(self.problem, name)
        if not callable(attribute):
            return attribute

        def drawn(b: Tensor, *rest: Any) -> Any:
            with draws(self.seed, b.device):
                return attribute(b, *rest)

        return drawn


class Composite(Problem, Protocol):
    """``L(b; a) = smooth(b; a) + r(b; a)``, where r need not be differentiable but has a proximal map."""

    def smooth(self, b: Tensor, a: Context) -> Tensor:
        """The differentiable part ``(B,)``."""
        ...

    def prox(self, b: Tensor, t: Tensor, a: Context) -> Tensor:
        """``argmin_x r(x; a) + ‖x − b‖² / 2t`` of each row, for ``t`` of shape ``(B,)``."""
        ...


class Projectable(Problem, Protocol):
    """An objective to be minimized over a set that each row can be projected on."""

    def project(self, b: Tensor, a: Context) -> Tensor:
        """The nearest point of the set ``(B, *)``."""
        ...


class LeastSquares(Problem, Protocol):
    """``L(b; a) = ½ ‖residuals(b; a)‖²``: ``objective`` must return just that."""

    def residuals(self, b: Tensor, a: Context) -> Tensor:
        """``(B, m)``."""
        ...


class Constrained(Problem, Protocol):
    """An objective subject to ``equality(b; a) = 0`` and ``inequality(b; a) ≤ 0``; one of the two may be left out."""

    def equality(self, b: Tensor, a: Context) -> Tensor:
        """``(B, p)``."""
        ...

    def inequality(self, b: Tensor, a: Context) -> Tensor:
        """``(B, m)``."""
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


class FixedPoint(Protocol):
    """A map whose fixed point is sought; with an ``objective`` as well, solutions report it."""

    def update(self, b: Tensor, a: Context) -> Tensor:
        """The map ``(B, *) -> (B, *)``, one row independent of another."""
        ...
