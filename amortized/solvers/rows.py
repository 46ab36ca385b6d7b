"""The inner loop that every solver shares: B problems at once, each row with its own progress, its own end.

A solver is told what it sees and answers with where to look next (ask and tell), for all rows in one batch of tensor
operations. The loop owns everything else: evaluating, remembering the best iterate of each row, deciding when a row is
finished, dropping finished rows so that they cost nothing, and bringing in waiting ones.

One row at a time (B = 1) is not what this is for: a round costs mostly the dispatch of its operations, which only many
rows pay back. For a single problem use SciPy.
"""

from __future__ import annotations

import abc
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from amortized.problem import CommonDraws, Context, Problem, is_random, leaves, map_leaves, take
from amortized.solvers.base import Solution, Solver, Status, Trace, ordinary, tolerance
from amortized.solvers.compiled import answers, statuses, unpack_answers


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

    def start(self, problem: Problem, a: Context, b: Tensor) -> tuple[Any, Any]:
        """As :meth:`begin`, where no trace is asked for: the rows as :meth:`rounds` takes them, and their forms.

        The forms say where a field lies among packed rows; None where rows are as :meth:`begin` gives them.
        """
        return self.begin(problem, a, b), None

    def rounds(self, problem: Problem, a: Context, rows: Any, forms: Any, shape: torch.Size, enough: int) -> Any:
        """Rounds until at most ``enough`` rows are still running; rows as :meth:`start` gives them."""
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

    def _flat(self, b: Tensor) -> Tensor:
        """``(L, *)`` in the layout of the state: ``(L, n)``, or ``(n, L)`` where rows are last."""
        flat = b.reshape(len(b), -1)
        return flat if self.axis == 0 else flat.t().contiguous()

    def _shaped(self, b: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
        return (b if self.axis == 0 else b.t()).reshape(shape)

    def num_lanes(self, b: Tensor) -> int:
        """Rows to have at work at a time, of starts ``b`` ``(B, *)``."""
        return self.lanes or len(b)

    def solve(self, problem: Problem, a: Context, b: Tensor, *, trace: Trace | None = None) -> Solution:
        """As :meth:`Solver.solve`."""
        _keep_pages()
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
                problem = CommonDraws(problem)
            if random or trace is not None:
                return self._solve_in_place(problem, a, b, trace)
            return self._solve(problem, a, b)

    def _solve_in_place(self, problem: Problem, a: Context, b: Tensor, trace: Trace | None) -> Solution:
        rows, rounds = self.begin(problem, a, b), 0
        while rounds % self.between(rows) or bool((rows.status == Status.RUNNING).any()):
            rows, rounds = self.advance(problem, a, rows, b.shape), rounds + 1
            if trace is not None:
                trace(int(rows.evaluations.max()), rows.value)
        return self._solution(rows[:-1], b.shape)

    def _solve(self, problem: Problem, a: Context, b: Tensor) -> Solution:
        size, begun = len(b), min(self.num_lanes(b), len(b))
        places: list[Tensor] = []
        found: list[list[Tensor]] = []
        place = torch.arange(begun, device=b.device)
        here = take(a, slice(0, begun)) if begun < size else a
        rows, forms = self.start(problem, here, b[:begun])
        while len(place):
            # Moving rows copies their state, so it waits until enough of them have ended.
            enough = int((0.75 if begun < size else 0.6) * len(place)) if len(place) > 8 else 0
            rows = self.rounds(problem, here, rows, forms, torch.Size((len(place), *b.shape[1:])), enough)
            running = statuses(rows, forms) == Status.RUNNING
            ended = (~running).nonzero()[:, 0]
            places.append(place[ended])
            found.append([x.index_select(self.axis, ended) for x in answers(rows, forms)])
            # Waiting rows take the places of those that ended; places that nobody takes go.
            new = slice(begun, min(begun + len(ended), size))
            begun = new.stop
            if new.start < new.stop:
                more, numbers = take(a, new), torch.arange(new.start, new.stop, device=b.device)
                fresh, _ = self.start(problem, more, b[new])
                if len(ended) == len(place):
                    rows, here, place = fresh, more, numbers
                    continue
                ended = ended[: len(numbers)]
                rows = self._put(rows, ended, fresh)
                here, place = put(here, ended, more), put(place, ended, numbers)
                running[ended] = True
            index = running.nonzero()[:, 0]
            if len(index) < len(place):
                rows, here, place = self._keep(rows, index), take(here, index), place[index]
        order = torch.cat(places).argsort()
        every = [torch.cat(part, self.axis).index_select(self.axis, order) for part in zip(*found, strict=True)]
        return self._solution(unpack_answers(every, forms), b.shape)

    def _keep(self, rows: Any, index: Tensor) -> Any:
        return map_leaves(lambda x: x.index_select(self.axis, index), rows)

    def _put(self, rows: Any, index: Tensor, fresh: Any) -> Any:
        return put(rows, index, fresh, self.axis)

    def _solution(self, rows: Sequence[Tensor], shape: torch.Size) -> Solution:
        b, value, residual, _, iterations, evaluations, _, status = rows
        b = (b if self.axis == 0 else b.movedim(-1, 0)).reshape(shape)
        counts = (x.to(torch.int64) for x in (iterations, evaluations, status))
        return Solution(b.clone(memory_format=torch.contiguous_format), value, residual, *counts)


def put(x: Any, index: Tensor, y: Any, axis: int = 0, in_place: bool = False) -> Any:
    """A context or state with the rows of another one of its structure in the places that are named."""
    if isinstance(x, Tensor):
        return x.index_copy_(axis, index, y) if in_place else x.index_copy(axis, index, y)
    return type(x)(*(put(p, index, q, axis, in_place) for p, q in zip(x, y, strict=True)))


@functools.cache
def _keep_pages() -> None:
    """Free one block of 32 MB, so that the C library keeps what a round frees for the next one.

    glibc gives freed memory back to the system at sizes that follow from the largest block freed so far; each round then
    faults its temporaries in again, up to a fifth of the time. Without glibc, or with MALLOC_ variables set, this does
    nothing.
    """
    torch.empty(2**25 - 2**16, dtype=torch.uint8, device="cpu")


def _empty(b: Tensor) -> Solution:
    value, count = b.new_empty(0), torch.empty(0, dtype=torch.int64, device=b.device)
    return Solution(b, value, value.clone(), count, count.clone(), count.clone())
