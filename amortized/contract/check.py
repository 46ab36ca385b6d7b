"""The contract of an objective, checked on one batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributions.constraints import Constraint

from amortized.contract.draws import draws, is_random
from amortized.contract.error import ProblemError
from amortized.contract.problem import Problem, differentiable, evaluate
from amortized.contract.rows import Context, leaves, num_rows, take
from amortized.contract.streams import stream_seed


def check_context(a: Any, where: str, rows: int | None = None) -> Context:
    """Check that ``a`` is a context whose tensors agree in their leading dimension, and return it.

    Args:
        a: what was given.
        where: who gave it; opens the message.
        rows: how many contexts were asked for; ``None``: any number.

    Raises:
        ProblemError: with what was given and what to write.
    """
    try:
        found = leaves(a)
    except ProblemError as error:
        raise ProblemError(f"{where}: {error}") from None
    sizes = {leaf.shape[0] if leaf.ndim else None for leaf in found}
    if len(sizes) != 1 or None in sizes:
        names = _names(a)
        given = ", ".join(
            f"{name} {leaf.shape[0] if leaf.ndim else 'none'}" for name, leaf in zip(names, found, strict=True)
        )
        raise ProblemError(
            f"{where}: the tensors of a context must share their leading dimension; got {given or 'no tensor'}. "
            "What all rows share (a matrix, a frozen network) belongs on the module."
        )
    if rows is not None and sizes != {rows}:
        raise ProblemError(f"{where} must give {rows} contexts; got {sizes.pop()}")
    return a


def _names(a: Context) -> list[str]:
    """Of the tensors of a context, in order: its fields, with dots between nested ones."""
    if isinstance(a, Tensor):
        return ["value"]
    return [
        field if isinstance(part, Tensor) else f"{field}.{name}"
        for field, part in zip(a._fields, a, strict=True)
        for name in _names(part)
    ]


def check_objective(problem: Problem, b: Tensor, a: Context) -> None:
    """Check the contract of ``objective`` on one batch: it returns ``(B,)``, finite, and no row sees another.

    Row independence is tested by the gradient (``dL_i / db_j = 0`` for ``i != j``), where there is one, and, where the objective
    draws no random numbers, by evaluating the rows in two halves.

    Raises:
        ProblemError: with what was given, what was expected and what to write instead.
    """
    name = f"{type(problem).__name__}.objective"
    sizes = {len(leaf) for leaf in leaves(a)} | {len(b)}
    if len(sizes) > 1:
        raise ProblemError(
            f"contexts and solutions must share their leading dimension; got sizes {sorted(sizes)}. "
            "What all rows share (a matrix, a frozen network) belongs on the module, not in the context."
        )
    B = len(b)
    random = is_random(problem, b, a)
    with torch.enable_grad(), draws(stream_seed(0, "check", 0), b.device):
        point = b.detach().clone().requires_grad_()
        value = problem.objective(point, a)
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        if shape != (B,):
            mend = "reduce over every dimension but the first, as in `.flatten(1).sum(1)`"
            if isinstance(shape, tuple) and shape == (B, 1):
                mend = "drop the last dimension with `.squeeze(-1)`"
            raise ProblemError(f"{name}(b, a) must return one value for each row, shape ({B},); got {shape}: {mend}.")
        if not torch.isfinite(value).all():
            row = int((~torch.isfinite(value)).nonzero()[0])
            raise ProblemError(
                f"{name} is {value.detach()[row]:g} in row {row} of the first batch (its b: {b[row].flatten()[:4].tolist()}...); "
                "every real b must be legal: map it into the domain (softmax, softplus, ...) inside the objective."
            )
        if not value.requires_grad and differentiable(problem):
            raise ProblemError(
                f"{name} does not depend on b (no gradient reaches it): is b detached, or in no_grad? If the objective has no "
                "gradient, say `differentiable = False` in the class and train by ZerothOrderLoss"
            )
        for row in {0, B - 1} if differentiable(problem) else ():
            (grad,) = torch.autograd.grad(value[row], point, retain_graph=True)
            grad = grad.flatten(1).abs().sum(1)
            if not torch.isfinite(grad).all():
                bad = int((~torch.isfinite(grad)).nonzero()[0])
                raise ProblemError(
                    f"the gradient of {name} is {grad[bad]:g} in row {bad} of the first batch, though its value is finite: look "
                    "for sqrt, norm, log or a division at 0, also in the branch of a torch.where that is not taken."
                )
            grad[row] = 0
            if (grad != 0).any():
                other = int((grad != 0).nonzero()[0])
                raise ProblemError(_mixes(name, row, other))
    if not random and B > 1:
        half = B // 2
        parts = [evaluate(problem, b[i], take(a, i)) for i in (slice(0, half), slice(half, B))]
        off = (torch.cat(parts) - value.detach()).abs() > 1e-3 * (1 + value.detach().abs())
        if off.any():
            raise ProblemError(_mixes(name, int(off.nonzero()[0]), None))


def check_constraints(problem: Problem, b: Tensor, a: Context) -> None:
    """Check that ``equality`` and ``inequality``, where the problem has them, return ``(B, p)``, and that no row sees another.

    Raises:
        ProblemError: with what was given, and what to write instead.
    """
    for name in ("equality", "inequality"):
        if not hasattr(problem, name) or not len(b):
            continue
        with torch.no_grad():
            value = getattr(problem, name)(b, a)
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        if not isinstance(shape, tuple) or len(shape) != 2 or shape[0] != len(b):
            mend = (
                "add a dimension with `.unsqueeze(1)`" if shape == (len(b),) else "flatten all dimensions but the first"
            )
            raise ProblemError(
                f"{type(problem).__name__}.{name}(b, a) must return the constraints of each row, shape ({len(b)}, number); got "
                f"{shape}: {mend}"
            )
        if len(b) > 1:
            few = len(b) // 2
            with torch.no_grad():
                alone = getattr(problem, name)(b[:few], take(a, slice(0, few)))
            whole = value[:few]
            if alone.shape != whole.shape or ((alone - whole).abs() > 1e-3 * (1 + whole.abs())).any():
                raise ProblemError(_mixes(f"{type(problem).__name__}.{name}", 0, None))


def check_support(problem: Any, a: Context) -> None:
    """Check that contexts lie where ``problem.support()`` says that they must; NaN is no matter of the support.

    Raises:
        ProblemError: with the range of the values that were found.
    """
    support = problem.support()
    if support is None or not num_rows(a):
        return
    for field, constraint in support.items() if isinstance(support, dict) else [(None, support)]:
        x = a if field is None else getattr(a, field)
        eps = 1e-6  # what arithmetic on the data may have added
        outside = ~(constraint.check(x) | constraint.check(x + eps) | constraint.check(x - eps))
        outside = outside & ~(x if outside.ndim == x.ndim else x.flatten(outside.ndim).sum(-1)).isnan()
        if outside.any():
            row = int(outside.nonzero()[0][0])
            known = x[~x.isnan()]
            what = "contexts" if field is None else f"contexts' {field}"
            raise ProblemError(
                f"{type(problem).__name__} allows {what} in {_domain(constraint)}; got values from {float(known.min()):g} to "
                f"{float(known.max()):g} (row {row} of a batch): scale the data, or choose a likelihood that has them"
            )


def _domain(constraint: Constraint) -> str:
    """A constraint in words: ``[0, 1]``, or its name."""
    low, high = (getattr(constraint, name, None) for name in ("lower_bound", "upper_bound"))
    return f"[{low:g}, {high:g}]" if low is not None and high is not None else str(constraint).removesuffix("()")


def _mixes(name: str, row: int, other: int | None) -> str:
    what = f"row {row} depends on row {other}" if other is not None else f"row {row} changes with the other rows"
    return (
        f"{name} mixes rows: {what} of the batch. Each row is its own problem: look for batch normalisation, "
        "a mean or softmax over dimension 0, or a broadcast of (B,) against (B, 1)."
    )
