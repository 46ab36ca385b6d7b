"""What a solver, a loss or a metric may ask of a problem: ``objective``, and nothing from Lightning.

A problem is any object with ``objective(b, a) -> (B,)``: B independent problems ``min_b L(b; a)`` at once, one to a
row. Contexts ``a`` are a tensor or a ``NamedTuple`` of tensors; solutions ``b`` are one real tensor ``(B, *)``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeAlias, runtime_checkable

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
