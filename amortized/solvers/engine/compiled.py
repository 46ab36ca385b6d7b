"""Rounds of a solver, its objective included, as one graph of ``torch.compile``: few kernels, and little around each call."""

from __future__ import annotations

import functools
import itertools
import math
import re
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from amortized.contract import Context, Problem, evaluate, leaves, map_leaves, take, value_and_grad
from amortized.solvers.base import Status
from amortized.solvers.engine.rows import Engine, Rows, put

if TYPE_CHECKING:
    from amortized.solvers.engine.gradient import GradientSolver


class Packed(NamedTuple):
    """Rows in one ``(k, L)`` for each kind of number.

    Compiled code then has three tensors to check, to allocate and to return where it would have thirty.
    """

    numbers: Tensor
    counts: Tensor
    flags: Tensor


class Form(NamedTuple):
    """Where a tensor of rows lies among packed ones: of which kind, its first line there, and its shape without rows."""

    kind: int
    line: int
    shape: tuple[int, ...]


def pack(rows: Rows) -> tuple[Packed, Any]:
    """The tensors of ``rows``, rows last, as :class:`Packed`, and the forms that :func:`unpack` needs."""
    lines: tuple[list[Tensor], ...] = ([], [], [])
    used = [0, 0, 0]

    def form(x: Tensor) -> Any:
        kind = 0 if x.is_floating_point() else 2 if x.dtype == torch.bool else 1
        flat, line = x.reshape(-1, x.shape[-1]), used[kind]
        lines[kind].append(flat)
        used[kind] += len(flat)
        return Form(kind, line, tuple(x.shape[:-1]))

    forms = map_leaves(form, rows)
    none = rows.status.new_empty(0, len(rows.status))
    return Packed(*(torch.cat(found) if found else none for found in lines)), forms


def unpack(packed: Any, forms: Any) -> Any:
    """The rows that :func:`pack` packed, as views; what has no form as it is."""
    if forms is None:
        return packed
    if isinstance(forms, Form):
        lines = packed[forms.kind][forms.line : forms.line + math.prod(forms.shape)]
        return lines.reshape(*forms.shape, -1)
    return type(forms)(*(unpack(packed, form) for form in forms))


Start: TypeAlias = Callable[["GradientSolver", Any, Context, Tensor], tuple[Any, Any]]
Some: TypeAlias = Callable[["GradientSolver", Any, Context, Any, tuple[int, ...]], tuple[Any, Tensor]]
Tell: TypeAlias = Callable[["GradientSolver", Rows, Tensor, Tensor], Rows]


_compile: Any = functools.partial(torch.compile, fullgraph=True, recompile_limit=64)


class _Numbers(TorchFunctionMode):
    """Counts the numbers that an objective works out, views of numbers among them."""

    count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.count += out.numel() if isinstance(out, Tensor) else 0
        return out


def _vectors(solver: GradientSolver, problem: Problem, a: Context, b: Tensor) -> bool:
    """Whether explicit vectors pay: not where most of a round is the comparisons of line searches on a few numbers.

    There the masks are converted back and forth, which takes longer than the numbers: twice as long on Rosenbrock's
    function of 2 unknowns, whose objective works out 16 numbers. On a logistic regression of 2 unknowns, of 20 points
    and 90 numbers, vectors take 0.7 of the time.
    """
    if not solver.tiny(b[0].numel()):
        return True
    kind = type(problem), b.shape[1:]
    if kind not in _WORK:
        with _Numbers() as numbers:
            evaluate(problem, b, a)
        _WORK[kind] = numbers.count / len(b)
    return _WORK[kind] > 50


def _value_and_grad(problem: Any, b: Tensor, a: Context) -> tuple[Tensor, Tensor]:
    """As :func:`amortized.contract.value_and_grad`, in a form that can be traced."""

    def total(b: Tensor) -> tuple[Tensor, Tensor]:
        value = problem.objective(b, a)
        return value.sum(), value

    grad, value = torch.func.grad(total, has_aux=True)(b)
    return value, grad


@functools.cache
def _starter(n: int) -> Start:
    """Rows at their start, packed if they are tiny, as one graph: compiled on first use, of each n its own."""

    def start(solver: GradientSolver, problem: Any, a: Context, b: Tensor) -> tuple[Any, Any]:
        return _packed(solver, solver.first(b, *_value_and_grad(problem, b, a)))

    _rename(start)
    compiled: Start = _compile(start, options={"size_asserts": False})
    return compiled


@functools.cache
def _compiler(n: int, vectors: bool, forms: Any) -> tuple[Some, Tell]:
    """Rounds as one graph, with how many rows then run, and what follows from an evaluation: compiled on first use.

    Of each n its own: sizes that are known make the faster code.
    """

    def some(
        solver: GradientSolver, problem: Any, a: Context, packed: Any, shape: tuple[int, ...]
    ) -> tuple[Any, Tensor]:
        rows = unpack(packed, forms)
        for _ in range(solver.between(rows)):
            value, grad = _value_and_grad(problem, solver.layout.shaped(rows.state.b, shape), a)
            rows = solver.tell(rows, value, solver.layout.flat(grad))
        left = (rows.status == int(Status.RUNNING)).sum()
        return (rows if forms is None else pack(rows)[0]), left

    def tell(solver: GradientSolver, rows: Rows, value: Tensor, grad: Tensor) -> Rows:
        return solver.tell(rows, value, grad)

    for function in (some, tell):
        _rename(function)
    options: Any = {} if vectors else {"cpp.simdlen": 1}
    # What is read twice is stored: else the flags of a row are worked out again for every number of its H.
    options |= {"realize_reads_threshold": 2, "size_asserts": False, "guard_filter_fn": _but_forms}
    return _compile(some, options=options), _compile(tell)


def _rename(function: Any) -> None:
    """A name of its own: under one name, a second n makes the compiler take all sizes for ones that vary."""
    function.__code__ = function.__code__.replace(co_name=f"{function.__name__}_{next(_NUMBER)}")


def _but_forms(guards: Any) -> list[bool]:
    """Which guards to keep: not those on the local ``forms``, hundreds of them, as each has compiled code of its own."""
    return [guard.is_global or not re.match(r"(type\()?forms\b", guard.name) for guard in guards]


_NUMBER = itertools.count()
_UNTRACEABLE: set[type] = set()
_WORK: dict[tuple[type, torch.Size], float] = {}


def _packed(solver: GradientSolver, rows: Rows) -> tuple[Any, Any]:
    """Tiny rows as :class:`Packed`, and their forms; larger ones as they are: packing would copy an H in every round."""
    layout = solver.layout
    return pack(rows) if layout.axis and solver.tiny(rows.b.shape[layout.across]) else (rows, None)


class Compiled(Engine):
    """Rounds compiled once for any number of rows; tiny rows as :class:`Packed`."""

    solver: GradientSolver
    forms: Any = None
    """Where a field lies among packed rows; None where rows are as the solver gives them."""

    def begin(self, problem: Problem, a: Context, b: Tensor) -> Any:
        rows, self.forms = self._begin(problem, a, b)
        if self.forms is None:
            # Fresh rows share memory in places, which would compile anew; copies look like all others.
            rows = map_leaves(_copy, rows)
        for x in leaves(rows):
            _varies(x, x.ndim - 1 if self.solver.layout.axis else 0)
        return rows

    def _begin(self, problem: Problem, a: Context, b: Tensor) -> tuple[Any, Any]:
        if len(b) > 1 and type(problem) not in _UNTRACEABLE:
            _any_number(a, b)
            try:
                return _starter(b[0].numel())(self.solver, problem, a, b)
            except torch._dynamo.exc.TorchDynamoException as error:
                _leave(problem, error)
        return _packed(self.solver, self.solver.begin(problem, a, b))

    def run(self, problem: Problem, a: Context, rows: Any, shape: torch.Size, enough: int) -> Any:
        """As :meth:`Engine.run`; a single row runs as two: the compiler would make it a case of its own."""
        if shape[0] == 1:
            twice = torch.zeros(2, dtype=torch.int64, device=leaves(rows)[0].device)
            both = self.run(problem, take(a, twice), self.keep(rows, twice), torch.Size((2, *shape[1:])), enough)
            return self.keep(both, twice[:1])
        solver, forms = self.solver, self.forms
        best = solver.layout.shaped(unpack(rows, forms).b, shape)
        some, tell = _compiler(math.prod(shape[1:]), _vectors(solver, problem, a, best), forms)
        _any_number(a)
        left = int((self.status(rows) == Status.RUNNING).sum())
        if type(problem) not in _UNTRACEABLE:
            try:
                while left > enough:
                    rows, running = some(solver, problem, a, rows, (-1, *shape[1:]))
                    left = int(running)
                return rows
            except torch._dynamo.exc.TorchDynamoException as error:
                _leave(problem, error)
        rows = unpack(rows, forms)
        while int((rows.status == Status.RUNNING).sum()) > enough:
            for _ in range(solver.between(rows)):
                value, grad = value_and_grad(problem, solver.layout.shaped(rows.state.b, shape), a)
                rows = tell(solver, rows, value, solver.layout.flat(grad))
        return rows if forms is None else pack(rows)[0]

    def status(self, rows: Any) -> Tensor:
        if self.forms is None:
            return super().status(rows)
        status: Tensor = rows.counts[self.forms.status.line]
        return status

    def answers(self, rows: Any) -> list[Tensor]:
        """As :meth:`Engine.answers`: the first lines of packed rows."""
        if self.forms is None:
            return super().answers(rows)
        lines = [0, 0]
        for form in self.forms[:-1]:
            lines[form.kind] = max(lines[form.kind], form.line + math.prod(form.shape))
        return [x[:end] for x, end in zip(rows, lines, strict=False)]

    def fields(self, answers: list[Tensor]) -> list[Tensor]:
        return answers if self.forms is None else [unpack(answers, form) for form in self.forms[:-1]]

    def put(self, rows: Any, index: Tensor, fresh: Any) -> Any:
        # In place where that is safe: in what compiled rounds returned, if no two of it share memory.
        own = len({x.untyped_storage().data_ptr() for x in leaves(rows)}) == len(leaves(rows))
        return put(rows, index, fresh, self.solver.layout.axis, in_place=own)


def _copy(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


def _any_number(*contexts: Context) -> None:
    """Mark that the number of rows will vary."""
    for x in (leaf for a in contexts for leaf in leaves(a)):
        _varies(x, 0)


def _varies(x: Tensor, axis: int) -> None:
    torch._dynamo.maybe_mark_dynamic(x, axis)


def _leave(problem: Problem, error: Exception) -> None:
    """Say that this kind of problem cannot be traced, and remember it."""
    _UNTRACEABLE.add(type(problem))
    why = str(error).splitlines()[0]
    warnings.warn(f"{type(problem).__name__}.objective stays uncompiled: {why}", stacklevel=3)
