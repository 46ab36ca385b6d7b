"""The objective of a module, evaluated in float64, while the module stays as it is; a module in half precision, in float32."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from amortized.contract import Context, map_leaves

P = TypeVar("P")


def at_least_float32(problem: P, a: Context) -> tuple[P, Context]:
    """A module in half precision as a copy in float32, and its contexts so too; any other, and its contexts, as they are.

    Solvers search in float32 or better, and there the weights are the same numbers: the problem stays what it is.
    """
    if not isinstance(problem, nn.Module) or not any(_is_half(x) for x in problem.parameters()):
        return problem, a
    with torch.inference_mode(False):
        whole = copy.deepcopy(problem).float()
    return whole, map_leaves(lambda leaf: leaf.float() if _is_half(leaf) else leaf, a)


def _is_half(x: Tensor) -> bool:
    return x.dtype in (torch.bfloat16, torch.float16)


class _Call(nn.Module):
    def __init__(self, problem: nn.Module, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.problem, self.function = problem, function

    def forward(self, *args: Any) -> Tensor:
        return self.function(self.problem, *args)


def in_float64(problem: Any, of: str | Callable[..., Tensor] = "objective") -> Callable[..., Tensor | None]:
    """A method of a module, called without a graph and with all that is floating point in float64: what the module holds too.

    A difference of two float32 values has their rounding: at values of 1e8 nothing below 8 can be seen in it. What this returns
    gives ``None`` where the method cannot be called so, or computes in less by itself.

    Args:
        problem: the module; anything else that has the method gets its arguments in float64.
        of: the method's name, or a function of the problem; its further arguments are solutions and contexts.
    """
    function: Callable[..., Any] = (lambda p, *args: getattr(p, of)(*args)) if isinstance(of, str) else of
    method = functools.partial(function, problem)
    if isinstance(problem, nn.Module):
        whole = _Call(problem, function)
        held = {key: _double(x) for key, x in (*whole.named_parameters(), *whole.named_buffers())}

        method = functools.partial(_called, whole, held)

    def call(*args: Context) -> Tensor | None:
        try:
            with torch.no_grad():
                value = method(*(map_leaves(_double, arg) for arg in args))
        except Exception:  # of tensors that are attributes, of kernels for float32 alone, ...
            return None
        return value if isinstance(value, Tensor) and value.dtype == torch.float64 else None

    return call


def _called(whole: nn.Module, held: dict[str, Tensor], *args: Any) -> Any:
    return functional_call(whole, held, args)


def _double(x: Tensor) -> Tensor:
    return x.detach().double() if x.is_floating_point() else x
