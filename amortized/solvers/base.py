"""The inner loop that every solver shares: B problems at once, each row with its own progress, its own end.

A solver is told what it sees and answers with where to look next (ask and tell), for all rows in one batch of tensor
operations. The loop owns everything else: evaluating, remembering the best iterate of each row, deciding when a row is
finished, dropping finished rows so that they cost nothing, and bringing in waiting ones.

One row at a time (B = 1) is not what this is for: a round costs mostly the dispatch of its operations, which only many
rows pay back. For a single problem use SciPy.
"""

from __future__ import annotations

import abc
import enum
import functools
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from amortized.problem import CommonDraws, Context, Problem, is_random, leaves, map_leaves, take, value_and_grad

Trace: TypeAlias = Callable[[int, Tensor], None]
"""Called after every round with the number of evaluations so far and the best value of each row ``(B,)``."""


class Status(enum.IntEnum):
    """How a row ended."""

    CONVERGED = 0
    """The residual is at most ``tol``."""
    LIMIT = 1
    """Out of steps, or no further progress is possible at this precision; the best iterate is returned."""
    DIVERGED = 2
    """A value or a gradient was not finite, and the solver could not step back; the best finite iterate is returned."""
    RUNNING = 3
    """Not ended: only inside the loop."""


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

    @property
    def converged(self) -> Tensor:
        """Which rows reached the tolerance ``(B,)``."""
        return self.status == Status.CONVERGED

    @property
    def diverged(self) -> Tensor:
        """Which rows met a value that is not finite and stopped there ``(B,)``."""
        return self.status == Status.DIVERGED


class State(Protocol):
    """What a solver remembers of its rows: a ``NamedTuple`` of tensors with rows along the solver's ``axis``."""

    @property
    def b(self) -> Tensor:
        """The point to evaluate next ``(L, n)``."""

    @property
    def iterations(self) -> Tensor:
        """Steps taken so far ``(L,)``, integer."""


class Rows(NamedTuple):
    """The rows at work: the best of each, and the solver's own state."""

    b: Tensor
    value: Tensor
    residual: Tensor
    lowest: Tensor
    iterations: Tensor
    evaluations: Tensor
    rounds: Tensor
    status: Tensor
    state: Any


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
    return Packed(*map(torch.cat, lines)), forms


def unpack(packed: Any, forms: Any) -> Any:
    """The rows that :func:`pack` packed, as views; what has no form as it is."""
    if forms is None:
        return packed
    if isinstance(forms, Form):
        lines = packed[forms.kind][forms.line : forms.line + math.prod(forms.shape)]
        return lines.reshape(*forms.shape, -1)
    return type(forms)(*(unpack(packed, form) for form in forms))


def tolerance(tol: float | None, dtype: torch.dtype) -> float:
    """``tol``, or what the dtype can be asked for: 1e-6 in float64, 1e-4 in float32, 1e-2 below."""
    if tol is not None:
        return tol
    return {torch.float64: 1e-6, torch.float32: 1e-4}.get(dtype, 1e-2)


def require(solver: nn.Module, problem: Any, *methods: str) -> None:
    """Raises ``TypeError``, which names them, unless the problem has all these methods."""
    missing = [method for method in methods if not hasattr(problem, method)]
    if missing:
        raise TypeError(
            f"{type(solver).__name__} needs more of a problem than {type(problem).__name__} has: "
            f"{', '.join(missing)} (see amortized.problem); write it, or use LBFGS, which needs only objective."
        )


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


class Solver(nn.Module, abc.ABC):
    """Improves ``b`` for each context ``a``: ``min_b L(b; a)``, B independent problems at once.

    A module, so that learned step sizes are parameters of the model that refines with it.

    Args:
        steps: rounds at most; a round is one evaluation of every row (of its population, for solvers that have one).
        tol: residual at which a row is finished; None chooses by dtype (1e-6 in float64, 1e-4 in float32).
    """

    def __init__(self, steps: int = 1000, tol: float | None = None) -> None:
        super().__init__()
        if steps < 0:
            raise ValueError(f"steps must not be negative, got {steps}")
        self.steps, self.tol = steps, tol

    @abc.abstractmethod
    def solve(self, problem: Problem, a: Context, b: Tensor, *, trace: Trace | None = None) -> Solution:
        """The best ``b`` found for each row, from the start ``b`` ``(B, *)``.

        Never raises because of a row, never returns a row worse than it started (beyond rounding), and no row
        touches another. B may be 0. Works under ``no_grad`` and ``inference_mode``.

        A random objective is searched with its draws fixed, by a seed drawn once from torch's generator; its rows then
        keep their places, so finished ones cost as much as others.

        Args:
            problem: anything with ``objective(b, a) -> (B,)``.
            a: contexts, B rows.
            b: where to start ``(B, *)``, floating point.
            trace: called after each round with the evaluations so far and the best values ``(B,)``; rows then keep
                their places.

        Raises:
            ValueError: if the objective does not return one value per row, or contexts and starts differ in number.
        """

    def iterates(self, problem: Problem, a: Context, b: Tensor) -> Iterator[Tensor]:
        """Successive iterates ``(B, *)``, on the graph of ``b`` and of the solver's parameters where gradients are on.

        Raises:
            TypeError: if the solver cannot be differentiated through.
        """
        raise TypeError(
            f"{type(self).__name__} cannot be differentiated through, so it cannot refine a prediction inside forward; "
            "use GradientDescent, Adam or LBFGS there."
        )

    def _flat(self, b: Tensor) -> Tensor:
        """``(L, *)`` in the layout of the state: ``(L, n)``, or ``(n, L)`` where rows are last."""
        flat = b.reshape(len(b), -1)
        return flat if self.axis == 0 else flat.t().contiguous()

    def _shaped(self, b: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
        return (b if self.axis == 0 else b.t()).reshape(shape)


class RowSolver(Solver):
    """The loop of rounds over rows: a subclass writes :meth:`begin` and :meth:`advance`.

    Args:
        steps: rounds at most.
        tol: residual at which a row is finished; None chooses by dtype.
        lanes: rows at work at a time, the others wait; None lets the solver choose.
    """

    axis: int = 0
    """Where the solver keeps rows in its state: 0, or -1 where that is faster (small n)."""
    sync: int = 4
    """Rounds between looks at which rows are finished, on a GPU, where each look makes the host wait."""

    def __init__(self, steps: int = 1000, tol: float | None = None, lanes: int | None = None) -> None:
        super().__init__(steps, tol)
        self.lanes = lanes

    @abc.abstractmethod
    def begin(self, problem: Problem, a: Context, b: Tensor) -> Rows:
        """Rows that start at ``b`` ``(L, *)``, evaluated there."""

    @abc.abstractmethod
    def advance(self, problem: Problem, a: Context, rows: Rows, shape: torch.Size) -> Rows:
        """One round: evaluates every row, with ``b`` in ``shape`` ``(L, *)``, and moves it.

        Rows that are finished keep what they have.
        """

    def pack(self, rows: Rows) -> tuple[Any, Any]:
        """The rows as :meth:`rounds` takes them, and the forms by which :func:`unpack` shows them: as they are, and None."""
        return rows, None

    def rounds(self, problem: Problem, a: Context, rows: Any, forms: Any, shape: torch.Size, enough: int) -> Any:
        """Rounds until at most ``enough`` rows are still running; rows as :meth:`pack` gives them."""
        while int((rows.status == Status.RUNNING).sum()) > enough:
            for _ in range(self.between(rows)):
                rows = self.advance(problem, a, rows, shape)
        return rows

    def between(self, rows: Rows) -> int:
        """Rounds between two looks at which rows are finished: every round on a CPU."""
        return self.sync if rows.b.is_cuda else 1

    @property
    def across(self) -> int:
        """The dimension of a row's n numbers in the state."""
        return 0 if self.axis else 1

    def dot(self, u: Tensor, v: Tensor) -> Tensor:
        """The inner products ``(L,)`` of rows."""
        return (u * v).sum(self.across)

    def wide(self, x: Tensor) -> Tensor:
        """A number for each row ``(L,)``, to multiply rows with."""
        return x.unsqueeze(self.across)

    def enter(
        self, at: Tensor, value: Tensor, residual: Tensor, state: Any, merit: Tensor | None = None, evaluations: int = 1
    ) -> Rows:
        """Rows at their start ``at``; ``merit`` ``(L,)`` is what they will lower, the value unless given."""
        merit = value if merit is None else merit
        otherwise = int(Status.RUNNING if self.steps else Status.LIMIT)
        end = torch.where(residual <= tolerance(self.tol, value.dtype), int(Status.CONVERGED), otherwise)
        finite = merit.isfinite() & residual.isfinite()
        status = torch.where(finite, end, int(Status.DIVERGED)).to(torch.int32)
        none = torch.zeros_like(status)
        return Rows(at, value, residual, merit, none, none + evaluations, none, status, state)

    def settle(
        self,
        rows: Rows,
        at: Tensor,
        value: Tensor,
        residual: Tensor,
        state: Any,
        iterations: Tensor,
        *,
        merit: Tensor | None = None,
        evaluations: int = 1,
        stalled: Tensor | None = None,
        recovers: bool = False,
    ) -> Rows:
        """The rows after a round that looked ``at`` these points: the best so far, and the status, of each.

        Args:
            rows: before the round.
            at: points that were evaluated, in the layout of the state.
            value: objective there ``(L,)``.
            residual: what is compared with ``tol`` ``(L,)``.
            state: the solver's state after the round.
            iterations: steps taken so far ``(L,)``.
            merit: what decides which iterate is best ``(L,)``; the value unless given.
            evaluations: what the round cost each row.
            stalled: rows that can make no more progress ``(L,)``.
            recovers: whether rows with a merit or residual that is not finite go on.
        """
        merit = value if merit is None else merit
        running = rows.status == int(Status.RUNNING)
        finite = merit.isfinite() & residual.isfinite()
        # Merits within rounding of the lowest cannot be told apart: the smaller residual decides, and one below the
        # tolerance may sit a little higher (gradients stay accurate where values have drowned in rounding).
        eps = torch.finfo(value.dtype).eps
        done = residual <= tolerance(self.tol, value.dtype)
        rounding = torch.where(done, eps ** (2 / 3), 32 * eps) * rows.lowest.abs()
        as_low = (merit <= rows.lowest + rounding) & (residual < rows.residual)
        better = running & finite & ((merit < rows.lowest - rounding) | as_low)
        rounds = rows.rounds + running
        status = torch.where(rounds >= self.steps, int(Status.LIMIT), int(Status.RUNNING))
        if stalled is not None:
            status = torch.where(stalled, int(Status.LIMIT), status)
        if not recovers:
            status = torch.where(finite, status, int(Status.DIVERGED))
        status = torch.where(better & done, int(Status.CONVERGED), status)
        return Rows(
            b=torch.where(self.wide(better), at, rows.b),
            value=torch.where(better, value, rows.value),
            residual=torch.where(better, residual, rows.residual),
            lowest=torch.where(better, torch.minimum(merit, rows.lowest), rows.lowest),
            iterations=torch.where(running, iterations, rows.iterations),
            evaluations=(rows.evaluations + running * evaluations).to(torch.int32),
            rounds=rounds,
            status=torch.where(running, status, rows.status).to(torch.int32),
            state=state,
        )

    def num_lanes(self, b: Tensor) -> int:
        """Rows to have at work at a time, of starts ``b`` ``(B, *)``."""
        return self.lanes or len(b)

    def solve(self, problem: Problem, a: Context, b: Tensor, *, trace: Trace | None = None) -> Solution:
        """As :meth:`Solver.solve`."""
        with torch.inference_mode(False), torch.no_grad():
            a, b = map_leaves(ordinary, a), ordinary(b)
            for leaf in leaves(a):
                if len(leaf) != len(b):
                    raise ValueError(
                        f"got {len(b)} starts and contexts with {len(leaf)} rows; give one start to each context"
                    )
            if not len(b):
                return _empty(b)
            random = hasattr(problem, "objective") and is_random(problem, b[:1], take(a, slice(0, 1)))
            if random:
                problem = CommonDraws(problem, int(torch.randint(2**62, ()).item()))
            if random or trace is not None:
                return self._solve_in_place(problem, a, b, trace)
            return self._solve(problem, a, b)

    def _solve_in_place(self, problem: Problem, a: Context, b: Tensor, trace: Trace | None) -> Solution:
        rows, rounds = self.begin(problem, a, b), 0
        while rounds % self.between(rows) or bool((rows.status == Status.RUNNING).any()):
            rows, rounds = self.advance(problem, a, rows, b.shape), rounds + 1
            if trace is not None:
                trace(int(rows.evaluations.max()), rows.value)
        everything = torch.arange(len(b), device=b.device)
        found = _empty(b, len(b))
        self._store(found, everything, rows, everything)
        return found

    def _solve(self, problem: Problem, a: Context, b: Tensor) -> Solution:
        size, begun = len(b), min(self.num_lanes(b), len(b))
        found, width = _empty(b, size), begun
        place = torch.arange(begun, device=b.device)
        here = take(a, slice(0, begun)) if begun < size else a
        rows, forms = self.pack(self.begin(problem, here, b[:begun]))
        while len(place):
            # Moving the running rows together copies their state, so it waits until it frees enough of them.
            enough = int((0.75 if begun < size else 0.6) * len(place)) if len(place) > 8 else 0
            rows = self.rounds(problem, here, rows, forms, torch.Size((len(place), *b.shape[1:])), enough)
            seen = rows if forms is None else unpack(rows, forms._replace(state=None))
            running = seen.status == Status.RUNNING
            ended, index = (~running).nonzero()[:, 0], running.nonzero()[:, 0]
            self._store(found, place[ended], seen, ended)
            if len(index) or begun < size:
                rows, here = self._keep(rows, index), take(here, index)
            place = place[index]
            if begun < size:
                new = slice(begun, min(begun + width - len(place), size))
                more = take(a, new)
                rows = _cat(rows, self.pack(self.begin(problem, more, b[new]))[0], self.axis)
                here, begun = _cat(here, more, 0), new.stop
                place = torch.cat([place, torch.arange(new.start, new.stop, device=b.device)])
        return found

    def _keep(self, rows: Any, index: Tensor) -> Any:
        return map_leaves(lambda x: x.index_select(self.axis, index), rows)

    def _store(self, found: Solution, place: Tensor, rows: Rows, index: Tensor) -> None:
        *values, _ = rows
        b, value, residual, _, iterations, evaluations, _, status = (x.index_select(self.axis, index) for x in values)
        b = b if self.axis == 0 else b.movedim(-1, 0)
        answers = (b.reshape(len(place), *found.b.shape[1:]), value, residual, iterations, evaluations, status)
        for into, answer in zip(found, answers, strict=True):
            into[place] = answer.to(into.dtype)


def _cat(x: Any, y: Any, axis: int) -> Any:
    """Two contexts or states of the same structure, one after the other."""
    if isinstance(x, Tensor):
        return torch.cat([x, y], axis)
    return type(x)(*(_cat(p, q, axis) for p, q in zip(x, y, strict=True)))


def _empty(b: Tensor, size: int = 0) -> Solution:
    value, count = b.new_empty(size), torch.empty(size, dtype=torch.int64, device=b.device)
    return Solution(b.new_empty((size, *b.shape[1:])), value, value.clone(), count, count.clone(), count.clone())


class GradientSolver(RowSolver):
    """A solver that looks at values and gradients: a subclass writes :meth:`init` and :meth:`step`, on rows ``(L, n)``.

    Args:
        steps: evaluations of each row after the first, at most; in :meth:`iterates`, the number of iterates.
        tol: gradient norm at which a row is finished; None chooses by dtype.
        unroll: in :meth:`iterates`, the number of last steps in which the gradient's own dependence on ``b`` is
            followed. None follows all; 0 none: first-order, as in first-order MAML; no second derivatives needed.
        lanes: rows at work at a time; None lets the solver choose.
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
        lanes: int | None = None,
        compile: bool = False,
    ) -> None:
        super().__init__(steps, tol, lanes)
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

    def begin(self, problem: Problem, a: Context, b: Tensor) -> Rows:
        """Rows that start at ``b`` ``(L, *)``, evaluated there."""
        value, grad = value_and_grad(problem, b, a)
        check_value(value, b)
        at, grad = self._flat(b), self._flat(grad)
        rows = self.enter(at, value, self.dot(grad, grad).sqrt(), self.init(at, value, grad))
        if self.compiled:
            # Fresh rows share memory in places, which would compile anew; with a copy they look like all others.
            rows = map_leaves(lambda x: x.clone(memory_format=torch.contiguous_format), rows)
            for x in leaves(rows):
                torch._dynamo.maybe_mark_dynamic(x, x.ndim - 1 if self.axis else 0)
        return rows

    def advance(self, problem: Problem, a: Context, rows: Rows, shape: torch.Size) -> Rows:
        """One round: value and gradient of every row where its state asks for them, and what follows from that."""
        value, grad = value_and_grad(problem, self._shaped(rows.state.b, shape), a)
        return self.tell(rows, value, self._flat(grad))

    def pack(self, rows: Rows) -> tuple[Any, Any]:
        """As :meth:`RowSolver.pack`; where rounds are compiled and rows are last, as :class:`Packed`."""
        if not (self.compiled and self.axis):
            return rows, None
        packed, forms = pack(rows)
        for x in packed:
            torch._dynamo.maybe_mark_dynamic(x, 1)
        return packed, forms

    def rounds(self, problem: Problem, a: Context, rows: Any, forms: Any, shape: torch.Size, enough: int) -> Any:
        """As :meth:`RowSolver.rounds`; compiled where that is asked for and there is more than one row."""
        if self.compiled and shape[0] > 1:
            return compiled_rounds(self, problem, a, rows, forms, shape, enough)
        rows = super().rounds(problem, a, unpack(rows, forms), None, shape, enough)
        return self.pack(rows)[0]

    def between(self, rows: Rows) -> int:
        """As :meth:`RowSolver.between`; more compiled rounds of few numbers, where a call costs as much as a round."""
        tiny = self.tiny(tuple(rows.b.shape) if self.axis == 0 else (0, rows.b.shape[0]))
        return max(super().between(rows), 4 if self.compiled and tiny else 1)

    def tiny(self, shape: tuple[int, ...]) -> bool:
        """Whether rows of ``b`` ``(L, *)`` have so few numbers that a compiler unrolls every sum over them."""
        return math.prod(shape[1:]) <= 8

    def tell(self, rows: Rows, value: Tensor, grad: Tensor) -> Rows:
        """What one evaluation means for each row: its best so far, its status, and its next point."""
        state = self.step(rows.state, value, grad)
        residual = self.dot(grad, grad).sqrt()
        return self.settle(
            rows, rows.state.b, value, residual, state, state.iterations,
            stalled=self.stalled(state), recovers=self.recovers,
        )  # fmt: skip

    def visited(self, state: Any) -> Tensor:
        """The iterate to hand out ``(L, n)``: the next point, or the last accepted one where points are only trials."""
        return state.b

    def iterates(self, problem: Problem, a: Context, b: Tensor) -> Iterator[Tensor]:
        """The ``steps`` points visited after ``b``, each ``(B, *)``; nothing is stopped early, no row is dropped.

        Where gradients are on, they are on the graph of ``b``, of the objective's and of the solver's parameters, and
        can be differentiated through (``unroll`` says how far). Where they are off, no graph is built.
        """
        graph, shape = torch.is_grad_enabled(), b.shape
        state: Any = None
        for k in range(self.steps):
            # Not around the yield: between iterates the caller's own modes hold.
            with torch.inference_mode(False), torch.set_grad_enabled(graph):
                if not graph and state is None:
                    a, b = map_leaves(ordinary, a), ordinary(b)
                follow = graph and (self.unroll is None or k >= self.steps - self.unroll)
                at = self._flat(b) if state is None else state.b
                value, grad = value_and_grad(problem, self._shaped(at, shape), a, create_graph=follow)
                check_value(value, b)
                value, grad = value if follow else value.detach(), self._flat(grad)
                state = self.init(at, value, grad) if state is None else self.step(state, value, grad)
                point = self._shaped(self.visited(state), shape)
            yield point


Some: TypeAlias = Callable[["GradientSolver", Any, Context, Any, tuple[int, ...]], tuple[Any, Tensor]]
Tell: TypeAlias = Callable[["GradientSolver", Rows, Tensor, Tensor], Rows]


@functools.cache
def _compiler(tiny: bool, forms: Any) -> tuple[Some, Tell]:
    """Rounds as one graph, with how many rows then run, and what follows from an evaluation: compiled on first use."""

    def some(
        solver: GradientSolver, problem: Any, a: Context, packed: Any, shape: tuple[int, ...]
    ) -> tuple[Any, Tensor]:
        def total(b: Tensor) -> tuple[Tensor, Tensor]:
            value = problem.objective(b, a)
            return value.sum(), value

        rows = unpack(packed, forms)
        for _ in range(solver.between(rows)):
            grad, value = torch.func.grad(total, has_aux=True)(solver._shaped(rows.state.b, shape))
            rows = solver.tell(rows, value, solver._flat(grad))
        left = (rows.status == int(Status.RUNNING)).sum()
        return (rows if forms is None else pack(rows)[0]), left

    def tell(solver: GradientSolver, rows: Rows, value: Tensor, grad: Tensor) -> Rows:
        return solver.tell(rows, value, grad)

    # Explicit vectors make the many comparisons of a line search slower: their masks are converted back and forth.
    options: Any = {"cpp.simdlen": 1, "realize_reads_threshold": 2} if tiny else {}
    options |= {"size_asserts": False, "guard_filter_fn": _but_forms}
    compile = functools.partial(torch.compile, fullgraph=True, recompile_limit=64, isolate_recompiles=True)
    return compile(some, options=options), compile(tell)


def _but_forms(guards: Any) -> list[bool]:
    """Which guards to keep: not those on the forms, as each of them has compiled code of its own."""
    return [not guard.name.startswith("L['forms']") for guard in guards]


_UNTRACEABLE: set[type] = set()


def compiled_rounds(
    solver: GradientSolver, problem: Problem, a: Context, packed: Any, forms: Any, shape: torch.Size, enough: int
) -> Any:
    """Rounds until at most ``enough`` rows are running, compiled for any number of rows above one."""
    some, tell = _compiler(solver.tiny(shape), forms)
    for x in leaves(a):
        torch._dynamo.maybe_mark_dynamic(x, 0)
    rows = unpack(packed, forms if forms is None else forms._replace(state=None))
    left = int((rows.status == Status.RUNNING).sum())
    if type(problem) not in _UNTRACEABLE:
        try:
            while left > enough:
                packed, running = some(solver, problem, a, packed, (-1, *shape[1:]))
                left = int(running)
            return packed
        except torch._dynamo.exc.TorchDynamoException as error:
            _UNTRACEABLE.add(type(problem))
            why = str(error).splitlines()[0]
            warnings.warn(f"{type(problem).__name__}.objective stays uncompiled: {why}", stacklevel=2)
    rows = unpack(packed, forms)
    while int((rows.status == Status.RUNNING).sum()) > enough:
        value, grad = value_and_grad(problem, solver._shaped(rows.state.b, shape), a)
        rows = tell(solver, rows, value, solver._flat(grad))
    return solver.pack(rows)[0]
