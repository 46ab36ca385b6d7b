"""The inner loop that every solver shares: B problems at once, each row with its own progress, its own end.

A solver is told what it sees and answers with where to look next (ask and tell), for all rows in one batch of tensor
operations. The loop owns everything else: evaluating, remembering the best iterate of each row, deciding when a row is
finished, dropping finished rows so that they cost nothing, and bringing in waiting ones. An :class:`Engine` runs the
rounds: the one here calls the solver, :class:`~amortized.solvers.engine.compiled.Compiled` what the compiler made of it.

One row at a time (B = 1) is not what this is for: a round costs mostly the dispatch of its operations, which only many
rows pay back. For a single problem use SciPy.
"""

from __future__ import annotations

import abc
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from amortized.contract import CommonDraws, Context, Problem, map_leaves, take
from amortized.solvers.base import Solution, Solver, Status, Trace, size, tolerance


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
    tol: Tensor
    """Residual at which the row is finished."""
    state: Any


class Layout(NamedTuple):
    """Where a solver's state has its rows: ``(L, n)`` with ``axis`` 0, or ``(n, L)`` with -1, which is faster for small n."""

    axis: int = 0

    @property
    def across(self) -> int:
        """The dimension of a row's n numbers."""
        return 0 if self.axis else 1

    def dot(self, u: Tensor, v: Tensor) -> Tensor:
        """The inner products ``(L,)`` of rows."""
        return (u * v).sum(self.across)

    def wide(self, x: Tensor) -> Tensor:
        """A number for each row ``(L,)``, to multiply rows with."""
        return x.unsqueeze(self.across)

    def flat(self, b: Tensor) -> Tensor:
        """Solutions ``(L, *)`` as rows of the state."""
        flat = b.reshape(len(b), math.prod(b.shape[1:]))
        return flat.t().contiguous() if self.axis else flat

    def shaped(self, rows: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
        """Rows of the state as solutions of ``shape`` ``(L, *)``."""
        return (rows.t() if self.axis else rows).reshape(shape)


class RowSolver(Solver):
    """The loop of rounds over rows: a subclass writes :meth:`begin` and :meth:`advance`.

    Args:
        steps: rounds at most.
        tol: residual at which a row is finished; None chooses by dtype.
        chunk: rows at work at a time, the others wait; None lets the solver choose.
    """

    layout: Layout = Layout()
    """How the solver keeps rows in its state."""
    relative: bool = True
    """Whether ``tol`` is relative to the objective's size where that is below 1: where the residual is a gradient."""
    sync: int = 4
    """Rounds between two times that finished rows are looked for on a GPU, where each makes the host wait."""

    def __init__(self, steps: int = 1000, tol: float | None = None, chunk: int | None = None) -> None:
        super().__init__(steps, tol)
        self.chunk = chunk

    @abc.abstractmethod
    def begin(self, problem: Any, a: Context, b: Tensor) -> Rows:
        """Rows that start at ``b`` ``(L, *)``, evaluated there."""

    @abc.abstractmethod
    def advance(self, problem: Any, a: Context, rows: Rows, shape: torch.Size) -> Rows:
        """One round: evaluates every row, with ``b`` in ``shape`` ``(L, *)``, and moves it.

        Rows that are finished keep what they have.
        """

    def between(self, rows: Rows) -> int:
        """Rounds between two times that finished rows are looked for: every round on a CPU."""
        return self.sync if rows.b.is_cuda else 1

    def enter(
        self, at: Tensor, value: Tensor, residual: Tensor, state: Any, merit: Tensor | None = None, evaluations: int = 1
    ) -> Rows:
        """Rows at their start ``at``; ``merit`` ``(L,)`` is what they will lower, the value unless given."""
        merit = value if merit is None else merit
        otherwise = int(Status.RUNNING if self.steps else Status.LIMIT)
        tol = torch.full_like(residual, tolerance(self.tol, value.dtype))
        tol = tol * size(value, residual) if self.relative else tol
        end = torch.where(residual <= tol, int(Status.CONVERGED), otherwise)
        finite = merit.isfinite() & residual.isfinite()
        status = torch.where(finite, end, int(Status.DIVERGED)).to(torch.int32)
        none = torch.zeros_like(status)
        return Rows(at, value, residual, merit, none, none + evaluations, none, status, tol, state)

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
            residual: what is compared with the row's tolerance ``(L,)``.
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
        done = residual <= rows.tol
        rounding = torch.where(done, eps ** (2 / 3), 32 * eps) * rows.lowest.abs()
        as_low = (merit <= rows.lowest + rounding) & (residual < rows.residual)
        better = running & finite & ((merit < rows.lowest - rounding) | as_low)
        rounds = rows.rounds + running
        status = torch.where(rounds >= self.steps, int(Status.LIMIT), int(Status.RUNNING))
        if stalled is not None:
            reached = torch.where(better, residual, rows.residual) <= tolerance(self.tol, value.dtype)
            status = torch.where(stalled, torch.where(reached, int(Status.CONVERGED), int(Status.LIMIT)), status)
        if not recovers:
            status = torch.where(finite, status, int(Status.DIVERGED))
        status = torch.where(better & done, int(Status.CONVERGED), status)
        return Rows(
            b=torch.where(self.layout.wide(better), at, rows.b),
            value=torch.where(better, value, rows.value),
            residual=torch.where(better, residual, rows.residual),
            lowest=torch.where(better, torch.minimum(merit, rows.lowest), rows.lowest),
            iterations=torch.where(running, iterations, rows.iterations),
            evaluations=(rows.evaluations + running * evaluations).to(torch.int32),
            rounds=rounds,
            status=torch.where(running, status, rows.status).to(torch.int32),
            tol=rows.tol,
            state=state,
        )

    def chunk_size(self, b: Tensor) -> int:
        """Rows to have at work at a time, of starts ``b`` ``(B, *)``."""
        return self.chunk or len(b)

    def engine(self) -> Engine:
        """What runs the rounds."""
        return Engine(self)

    def _solve(self, problem: Problem, a: Context, b: Tensor, dual: Tensor | None, trace: Trace | None) -> Solution:
        _keep_pages()
        if trace is not None or isinstance(problem, CommonDraws):
            return self._solve_in_place(problem, a, b, trace)
        return self._solve_in_chunks(problem, a, b)

    def _solve_in_place(self, problem: Problem, a: Context, b: Tensor, trace: Trace | None) -> Solution:
        rows, rounds = self.begin(problem, a, b), 0
        if trace is not None and not bool((rows.status == Status.RUNNING).any()):  # ended before the first round
            trace(int(rows.evaluations.max()), self.layout.shaped(rows.b, b.shape), rows.value)
        while rounds % self.between(rows) or bool((rows.status == Status.RUNNING).any()):
            rows, rounds = self.advance(problem, a, rows, b.shape), rounds + 1
            if trace is not None:
                trace(int(rows.evaluations.max()), self.layout.shaped(rows.b, b.shape), rows.value)
        return self._solution(rows[:-1], b.shape)

    def _solve_in_chunks(self, problem: Problem, a: Context, b: Tensor) -> Solution:
        engine, axis = self.engine(), self.layout.axis
        total, begun = len(b), min(self.chunk_size(b), len(b))
        places: list[Tensor] = []
        found: list[list[Tensor]] = []
        place = torch.arange(begun, device=b.device)
        here = take(a, slice(0, begun)) if begun < total else a
        rows = engine.begin(problem, here, b[:begun])
        while len(place):
            # Moving rows copies their state, so it waits until enough of them have ended.
            enough = int((0.75 if begun < total else 0.6) * len(place)) if len(place) > 8 else 0
            rows = engine.run(problem, here, rows, torch.Size((len(place), *b.shape[1:])), enough)
            running = engine.status(rows) == Status.RUNNING
            ended = (~running).nonzero()[:, 0]
            places.append(place[ended])
            found.append([x.index_select(axis, ended) for x in engine.answers(rows)])
            # Waiting rows take the places of those that ended; places that nobody takes go.
            new = slice(begun, min(begun + len(ended), total))
            begun = new.stop
            if new.start < new.stop:
                more, numbers = take(a, new), torch.arange(new.start, new.stop, device=b.device)
                fresh = engine.begin(problem, more, b[new])
                if len(ended) == len(place):
                    rows, here, place = fresh, more, numbers
                    continue
                ended = ended[: len(numbers)]
                rows = engine.put(rows, ended, fresh)
                here, place = put(here, ended, more), put(place, ended, numbers)
                running[ended] = True
            index = running.nonzero()[:, 0]
            if len(index) < len(place):
                rows, here, place = engine.keep(rows, index), take(here, index), place[index]
        order = torch.cat(places).argsort()
        every = [torch.cat(part, axis).index_select(axis, order) for part in zip(*found, strict=True)]
        return self._solution(engine.fields(every), b.shape)

    def _solution(self, rows: Sequence[Tensor], shape: torch.Size) -> Solution:
        b, value, residual, _, iterations, evaluations, _, status, _ = rows
        counts = (x.to(torch.int64) for x in (iterations, evaluations, status))
        b = self.layout.shaped(b, shape).clone(memory_format=torch.contiguous_format)
        return Solution(b, value, residual, *counts)


class Engine:
    """Runs the rounds of a solver on rows as it gives them; another engine may keep rows in another form, and be faster.

    Args:
        solver: whose rounds.
    """

    def __init__(self, solver: RowSolver) -> None:
        self.solver = solver

    def begin(self, problem: Problem, a: Context, b: Tensor) -> Any:
        """Rows that start at ``b`` ``(L, *)``."""
        return self.solver.begin(problem, a, b)

    def run(self, problem: Problem, a: Context, rows: Any, shape: torch.Size, enough: int) -> Any:
        """Rounds until at most ``enough`` rows are still running, with ``b`` in ``shape`` ``(L, *)``."""
        while int((rows.status == Status.RUNNING).sum()) > enough:
            for _ in range(self.solver.between(rows)):
                rows = self.solver.advance(problem, a, rows, shape)
        return rows

    def status(self, rows: Any) -> Tensor:
        """The :class:`Status` of each row ``(L,)``."""
        status: Tensor = rows.status
        return status

    def answers(self, rows: Any) -> list[Tensor]:
        """All but the solver's own state, in as few tensors as hold it."""
        return list(rows[:-1])

    def fields(self, answers: list[Tensor]) -> list[Tensor]:
        """What :meth:`answers` gives, field by field."""
        return answers

    def keep(self, rows: Any, index: Tensor) -> Any:
        """The named rows."""
        return map_leaves(lambda x: x.index_select(self.solver.layout.axis, index), rows)

    def put(self, rows: Any, index: Tensor, fresh: Any) -> Any:
        """The rows with ``fresh`` ones in the named places."""
        return put(rows, index, fresh, self.solver.layout.axis)


def put(x: Any, index: Tensor, y: Any, axis: int = 0, in_place: bool = False) -> Any:
    """A context or state with the rows of another one of its structure in the places that are named."""
    if isinstance(x, Tensor):
        return x.index_copy_(axis, index, y) if in_place else x.index_copy(axis, index, y)
    return type(x)(*(put(p, index, q, axis, in_place) for p, q in zip(x, y, strict=True)))


def over(t: Tensor, b: Tensor) -> Tensor:
    """A number for each row ``(B,)`` in a shape that multiplies ``b`` ``(B, *)``."""
    return t.view(-1, *[1] * (b.ndim - 1))


def times(matrix: Tensor, x: Tensor) -> Tensor:
    """Rows ``M x`` of ``x`` ``(L, n)``, for one matrix or one for each row.

    Written as ``xᵀ Mᵀ``: as a product with one column, MKL takes up to five times as long.
    """
    return x @ matrix.mT if matrix.ndim == 2 else torch.bmm(x.unsqueeze(1), matrix.mT).squeeze(1)


@functools.cache
def _keep_pages() -> None:
    """Free one block of 32 MB, so that the C library keeps what a round frees for the next one.

    glibc gives freed memory back to the system at sizes that follow from the largest block freed so far; each round then
    faults its temporaries in again, up to a fifth of the time. Without glibc, or with MALLOC_ variables set, this does
    nothing.
    """
    torch.empty(2**25 - 2**16, dtype=torch.uint8, device="cpu")
