"""What quasi-Newton methods share: a line search for every row, along directions from curvature that the rows learn."""

from __future__ import annotations

import abc
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from amortized.contract import Context, Problem
from amortized.solvers.base import fixed
from amortized.solvers.engine.gradient import GradientSolver
from amortized.solvers.smooth import line_search
from amortized.solvers.smooth.line_search import Search


class QuasiNewtonState(NamedTuple):
    """An accepted point, a direction from it, and a trial point on the way."""

    b: Tensor
    """The trial point."""
    iterations: Tensor
    point: Tensor
    value: Tensor
    grad: Tensor
    direction: Tensor
    slope: Tensor
    search: Search
    steepest: Tensor
    """Whether the direction is steepest descent, with nothing left to fall back to ``(L,)``."""
    stalled: Tensor
    hessian: Any


class Pair(NamedTuple):
    """A step s, the change of the gradient y on it, and their products ``(L,)``.

    Those with s come from the slopes of the line search, s being t times the direction: no pass over the rows.
    """

    s: Tensor
    y: Tensor
    sy: Tensor
    yy: Tensor
    sg: Tensor
    """s times the gradient at its end, whose graph it is on."""


class QuasiNewton(GradientSolver):
    r"""``b ← b − t H ∇L(b; a)``: H from the steps s and gradient changes y, t from a line search of each row's own.

    A round evaluates one trial step of every row, so rows never wait for each other's line searches. A row whose line
    search fails starts over from steepest descent; where that fails too it has reached its precision, and ends as
    ``LIMIT``.

    A subclass writes :meth:`init_hessian`, :meth:`update_hessian` and :meth:`reset`.

    Args:
        steps: evaluations after the first, at most; in :meth:`iterates`, the number of iterates.
        tol: gradient norm at which a row is finished; None chooses by dtype.
        noise: relative rounding of the objective that the line search allows for; None chooses by dtype (ε^⅔: 4e-11
            in float64, 2e-5 in float32). Much smaller values stall on ill-conditioned rows.
        first_step: length of the first trial, in units of b (but 10 times the gradient at most). One too long costs an
            evaluation, which the next trial interpolates; one too short is accepted and wasted. Worth tuning where
            ``steps`` are few.
        unroll: last steps whose gradients are differentiated; None all, 0 none (first-order).
        chunk: rows at work at a time; None chooses so that the state stays in cache on a CPU, and takes all on a GPU.
        compile: fuse each round with ``torch.compile``; see :class:`~amortized.solvers.GradientSolver`.
    """

    recovers = True

    def __init__(
        self,
        steps: int = 1000,
        tol: float | None = None,
        noise: float | None = None,
        first_step: float = 2.0,
        unroll: int | None = None,
        chunk: int | None = None,
        compile: bool = False,
    ) -> None:
        super().__init__(steps, tol, unroll, chunk, compile)
        if first_step <= 0:
            raise ValueError(f"first_step must be positive, got {first_step}")
        self.noise, self.first_step = noise, first_step

    @abc.abstractmethod
    def init_hessian(self, b: Tensor) -> Any:
        """The inverse Hessian H = 1 of rows at ``b`` before their first step: a ``NamedTuple`` of row tensors."""

    @abc.abstractmethod
    def update_hessian(
        self, state: QuasiNewtonState, pair: Pair, grad: Tensor, accepted: Tensor, paired: Tensor
    ) -> tuple[Any, Tensor]:
        """The inverse Hessian H with the pair in the ``paired`` rows, and the direction ``-H grad``.

        What it returns of H may be written in place, unless gradients are on.
        """

    @abc.abstractmethod
    def reset(self, hessian: Any, rows: Tensor) -> Any:
        """The inverse Hessian, with H = 1 in the named rows ``(L,)``."""

    def first_trial(self, grad: Tensor) -> Tensor:
        """A step along −grad of length ``first_step``, but of 10 times the gradient at most."""
        return (self.first_step / self.layout.dot(grad, grad).sqrt()).clamp(max=10)

    def init(self, b: Tensor, value: Tensor, grad: Tensor) -> QuasiNewtonState:
        """Steepest descent, with the first trial step."""
        value, g = value.detach(), grad.detach()
        slope = -self.layout.dot(g, g)
        search = line_search.start(self.first_trial(g), value, slope)
        everywhere = torch.ones_like(value, dtype=torch.bool)
        none = torch.zeros_like(value, dtype=torch.int32)
        trial = b - self.layout.wide(search.t) * grad
        return QuasiNewtonState(
            trial, none, b, value, grad, -grad, slope, search, everywhere, ~everywhere, self.init_hessian(b.detach())
        )

    def step(self, state: QuasiNewtonState, value: Tensor, grad: Tensor) -> QuasiNewtonState:
        """One trial of the line search, and where it accepts, a new direction."""
        value, g = value.detach(), grad.detach()
        followed = self.layout.dot(grad, state.direction.detach())
        slope = followed.detach()
        noise = torch.finfo(g.dtype).eps ** (2 / 3) if self.noise is None else self.noise
        accepted, search = line_search.step(state.search, value, slope, state.value, state.slope, noise)
        given_up = ~accepted & (search.trials >= line_search.TRIALS)

        t, s, y = state.search.t, state.b.detach() - state.point.detach(), g - state.grad.detach()
        pair = Pair(s, y, t * (slope - state.slope), self.layout.dot(y, y), t * followed)
        paired = accepted & (pair.sy > 0) & (pair.yy > 0)
        hessian, downhill = self.update_hessian(state, pair, grad, accepted, paired)
        new_slope = self.layout.dot(downhill.detach(), g)
        unfit = accepted & ~(new_slope < 0)
        restart = (given_up & ~state.steepest) | unfit

        to = self.layout.wide(accepted)
        point, point_grad = torch.where(to, state.b, state.point), torch.where(to, grad, state.grad)
        value = torch.where(accepted, value, state.value)
        direction = torch.where(to, downhill, state.direction)
        slope = torch.where(accepted, new_slope, state.slope)
        first = torch.ones_like(slope)
        if not _surely_none(restart):
            known = point_grad.detach()
            direction = torch.where(self.layout.wide(restart), -point_grad, direction)
            slope = torch.where(restart, -self.layout.dot(known, known), slope)
            first = torch.where(restart, self.first_trial(known), first)
            hessian = self.reset(hessian, restart)
        anew = line_search.start(first, value, slope)
        search = Search(*(torch.where(accepted | restart, p, q) for p, q in zip(anew, search, strict=True)))
        return QuasiNewtonState(
            b=torch.addcmul(point, self.layout.wide(search.t), direction),
            iterations=state.iterations + accepted,
            point=point,
            value=value,
            grad=point_grad,
            direction=direction,
            slope=slope,
            search=search,
            steepest=restart | (state.steepest & ~paired),
            stalled=given_up & state.steepest,
            hessian=hessian,
        )

    def _iterates(self, problem: Problem, a: Context, b: Tensor) -> Iterator[Tensor]:
        """As :meth:`GradientSolver.iterates`; step lengths and curvature are constants to autograd.

        A random objective keeps its draws from one step to the next, or no line search would make sense.
        """
        return super()._iterates(fixed(problem, b, a), a, b)

    def stalled(self, state: QuasiNewtonState) -> Tensor:
        """Rows whose steepest descent finds nothing lower."""
        return state.stalled

    def visited(self, state: QuasiNewtonState) -> Tensor:
        """The accepted point; the trial beyond it may be worse."""
        return state.point


def _surely_none(rows: Tensor) -> bool:
    """Whether no row is named, where a look costs nothing: on a CPU, outside compiled code."""
    return not (rows.is_cuda or torch.compiler.is_compiling()) and not bool(rows.any())
