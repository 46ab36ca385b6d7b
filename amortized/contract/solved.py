"""Contexts with solutions that are known already: what regression learns from."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from amortized.contract.constraints import feasibility_tol, violation
from amortized.contract.draws import is_random
from amortized.contract.error import ProblemError
from amortized.contract.problem import evaluate
from amortized.contract.rows import Context, take


class Solved(NamedTuple):
    """B contexts and what a solver found for each; training unpacks it, so that problems see the context alone."""

    context: Context
    b: Tensor
    """Finite solutions ``(B, *)``."""
    objective: Tensor
    """``L(b; a)``, ``(B,)``."""
    solved: Tensor
    """Where the solver met its tolerance, and found something feasible ``(B,)``; elsewhere ``b`` is the best that it found."""


def context_of(a: Context) -> Context:
    """The context itself, without its solutions."""
    return a.context if isinstance(a, Solved) else a


def check_solved(problem: Any, a: Solved) -> None:
    """Check that solutions are those of this problem: its objective must have the value that was stored with them.

    A random objective is not checked.

    Raises:
        ProblemError: with the first value that is another one, or the constraint's violation.
    """
    if is_random(problem, a.b, a.context):
        return
    with torch.autocast(a.b.device.type, enabled=False):
        then, now = a.objective, evaluate(problem, a.b, a.context)
    other = ~torch.isclose(then.to(now), now, rtol=max(1e-3, 10 * torch.finfo(now.dtype).eps), atol=1e-5)
    if bool(other.any()):
        row = int(other.int().argmax())
        raise ProblemError(
            f"the solutions are of another objective: one has the value {float(then[row]):.6g} there and {float(now[row]):.6g} "
            "here; solve this problem's contexts into another folder"
        )
    known = take(a, a.solved)
    with torch.no_grad():
        off = violation(problem, known.b, known.context)
    if bool((off > 2 * feasibility_tol(problem)).any()):
        raise ProblemError(
            f"the solutions are of other constraints: one that was feasible there violates them by {float(off.max()):.3g} here; "
            "solve this problem's contexts into another folder"
        )
