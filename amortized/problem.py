"""What a solver, a loss or a metric may ask of a problem: ``objective``, and nothing from Lightning.

A problem is any object with ``objective(b, a) -> (B,)``: B independent problems ``min_b L(b; a)`` at once, one to a
row. Contexts ``a`` are a tensor or a ``NamedTuple`` of tensors; solutions ``b`` are one real tensor ``(B, *)``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor

from amortized.streams import stream_seed

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

    def initial(self, a: Context) -> Tensor:
        """Where a solver starts cold, ``(B, *)``."""
        ...


def map_leaves(f: Callable[[Tensor], Tensor], a: Context) -> Context:
    """The context with ``f`` applied to each of its tensors."""
    return f(a) if isinstance(a, Tensor) else type(a)(*(map_leaves(f, part) for part in _parts(a)))


def leaves(a: Context) -> list[Tensor]:
    """The tensors of a context, in order."""
    return [a] if isinstance(a, Tensor) else [leaf for part in _parts(a) for leaf in leaves(part)]


def num_rows(a: Context) -> int:
    """B, the number of problems in a batch of contexts."""
    return len(leaves(a)[0])


def _parts(a: Any) -> tuple[Any, ...]:
    """The fields of a ``NamedTuple``; anything else is refused, with what to write in its place."""
    if isinstance(a, tuple) and hasattr(a, "_fields"):
        return a
    given, fields = type(a).__name__, "x: Tensor; y: Tensor"
    if isinstance(a, dict):
        given = f"dict with the keys {', '.join(map(str, a))}"
        fields = "; ".join(f"{key}: Tensor" for key in a)
    elif isinstance(a, list | tuple):
        given = f"{given} of {len(a)}"
    wrap = f"write `class Fields(NamedTuple): {fields}` and give Fields({'**' if isinstance(a, dict) else ''}...)"
    if hasattr(a, "__array__"):
        wrap = "write torch.as_tensor(...)"
    raise ProblemError(
        f"a context is a tensor, or a NamedTuple of tensors, with one row for each problem; got a {given}: {wrap}"
    )


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


def take(a: Context, index: Tensor | slice) -> Context:
    """The rows of a context that ``index`` names: a slice, a tensor of row numbers, or one that says of each row whether."""
    if isinstance(index, slice):
        return map_leaves(lambda leaf: leaf[index], a)
    if index.dtype == torch.bool:
        if index.all():
            return a
        index = index.nonzero()[:, 0]
    return map_leaves(lambda leaf: leaf.index_select(0, index), a)


def rows_where(test: Callable[[Tensor], Tensor], a: Context) -> Tensor:
    """Whether ``test`` holds of all numbers of a row, ``(B,)``; it maps a tensor to one of truth values of that shape."""
    return torch.stack([test(leaf).unsqueeze(-1).flatten(1).all(1) for leaf in leaves(a)]).all(0)


def concatenate(parts: Sequence[Context]) -> Context:
    """One context of the rows of all of them, in order."""
    if isinstance(parts[0], Tensor):
        return torch.cat(list(parts))
    return type(parts[0])(*map(concatenate, zip(*map(_parts, parts), strict=True)))


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


def start_draws(seed: int, device: torch.device) -> None:
    """Start torch's generators of the CPU and of ``device`` from ``seed``.

    ``torch.manual_seed`` also starts those of every other device: it would disturb what draws there, and where CUDA is
    not in use it formats a stack trace for later, which costs a third of a small network's training step.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        torch.cuda.default_generators[index].manual_seed(seed)
    elif device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)


@contextmanager
def draws(seed: int, device: torch.device) -> Iterator[None]:
    """Inside, torch's generators start from ``seed``; afterwards they are as if nothing had been drawn."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices, enabled=True):
        start_draws(seed, device)
        yield


def is_random(problem: Problem, b: Tensor, a: Context) -> bool:
    """Whether the objective draws random numbers: evaluating it moves torch's generator."""
    state = torch.cuda.get_rng_state if b.is_cuda else torch.get_rng_state
    with torch.no_grad(), draws(stream_seed(0, "check", 0), b.device):
        before = state()
        problem.objective(b, a)
        return not torch.equal(before, state())


class CommonDraws:
    """A random objective with its draws fixed (common random numbers): the same seed before every evaluation.

    The draws belong to places in the batch, so the rows of ``b`` and ``a`` must keep their places. In memory ``b`` is put in
    its usual order first: what is drawn like a tensor (``randn_like``) is drawn in the order of that tensor's memory.

    Args:
        problem: with the random objective.
        seed: of the draws; ``None`` draws one from torch's generator.
    """

    def __init__(self, problem: Problem, seed: int | None = None) -> None:
        self.problem = problem
        self.seed = stream_seed(0, "search", int(torch.randint(2**25, ()))) if seed is None else seed

    def objective(self, b: Tensor, a: Context) -> Tensor:
        with draws(self.seed, b.device):
            return self.problem.objective(b.contiguous(), a)

    def __getattr__(self, name: str) -> Any:
        """What else the problem has, under the same draws."""
        if name == "problem":  # not there yet: a copy being made
            raise AttributeError(name)
        attribute = getattr(self.problem, name)
        if not callable(attribute):
            return attribute

        def drawn(b: Tensor, *rest: Any) -> Any:
            with draws(self.seed, b.device):
                return attribute(b.contiguous(), *rest)

        return drawn


class ProblemError(ValueError):
    """A problem, or a network for it, breaks the contract; the message says what was given and what to write."""


def evaluate(problem: Problem, b: Tensor, a: Context) -> Tensor:
    """``L(b; a)`` without a graph, shape ``(B,)``."""
    with torch.no_grad():
        return problem.objective(b, a)


def check_objective(problem: Problem, b: Tensor, a: Context) -> None:
    """Check the contract of ``objective`` on one batch: it returns ``(B,)``, finite, and no row sees another.

    Row independence is tested by the gradient (``dL_i / db_j = 0`` for ``i != j``) and, where the objective draws no
    random numbers, by evaluating the rows in two halves.

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
        if not value.requires_grad:
            raise ProblemError(f"{name} does not depend on b (no gradient reaches it): is b detached, or in no_grad?")
        for row in {0, B - 1}:
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


def _mixes(name: str, row: int, other: int | None) -> str:
    what = f"row {row} depends on row {other}" if other is not None else f"row {row} changes with the other rows"
    return (
        f"{name} mixes rows: {what} of the batch. Each row is its own problem: look for batch normalisation, "
        "a mean or softmax over dimension 0, or a broadcast of (B,) against (B, 1)."
    )


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
