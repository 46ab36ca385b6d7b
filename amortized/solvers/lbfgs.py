"""L-BFGS, every row with its own curvature, line search and end."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from amortized.solvers import line_search
from amortized.solvers.base import GradientSolver
from amortized.solvers.line_search import Search


class Pairs(NamedTuple):
    """The last m steps s and gradient changes y of each row, and what their products give; slots are in no order.

    With R the upper triangle of SᵀY (in order of time), D its diagonal: ``inverse`` is R⁻¹ and ``gram`` is YᵀY.
    """

    history: Tensor
    """S and Y ``(L, 2m, n)``."""
    inverse: Tensor
    gram: Tensor
    diagonal: Tensor
    products: Tensor
    """[SᵀgYᵀg] at the accepted point ``(L, 2m)``."""
    scale: Tensor
    """γ = sᵀy / yᵀy of the latest pair ``(L,)``."""
    slot: Tensor
    """Where the next pair goes ``(L,)``."""


class Quasi(NamedTuple):
    """An accepted point, a direction from it, and the trial point on the way."""

    b: Tensor
    """The trial point ``(L, n)``."""
    iterations: Tensor
    point: Tensor
    value: Tensor
    grad: Tensor
    direction: Tensor
    slope: Tensor
    search: Search
    steepest: Tensor
    """Whether the direction is the steepest descent, with nothing left to fall back to ``(L,)``."""
    stalled: Tensor
    pairs: Pairs


class LBFGS(GradientSolver):
    r"""L-BFGS: ``b ← b − t H ∇L(b; a)``, H from the last ``memory`` steps, t from a line search of each row's own.

    A round evaluates one trial step of every row, so rows never wait for each other's line searches. A row whose line
    search fails starts over from steepest descent; where that fails too it has reached its precision, and ends as
    ``LIMIT``.

    The default inner loop. Where it is weak: kinks (ℓ1 terms: use a proximal method), noise in the objective (use
    :class:`~amortized.solvers.Adam`), and batches so small that the dispatch of its operations is all the time it
    takes. It finds a local minimum. One flat ``torch.optim.LBFGS`` on the summed objective can be faster on rows that
    are alike and well conditioned; it cannot tell which rows converged.

    In :meth:`iterates`, step lengths and curvature are constants to autograd; the gradients they multiply are followed.

    Source: Liu & Nocedal (1989); the compact form, Byrd, Nocedal & Schnabel (1994), theorem 2.2.

    Args:
        steps: evaluations after the first, at most; in :meth:`iterates`, the number of iterates.
        memory: m, the number of pairs kept.
        tol: gradient norm at which a row is finished; None chooses by dtype.
        noise: relative rounding of the objective that the line search allows for; None chooses by dtype (ε^⅔: 4e-11
            in float64, 2e-5 in float32). Much smaller values stall on ill-conditioned rows.
        unroll: last steps whose gradients are differentiated; None all, 0 none (first-order).
        lanes: rows at work at a time; None chooses so that the state stays in cache on a CPU, and takes all on a GPU.
    """

    recovers = True

    def __init__(
        self,
        steps: int = 1000,
        memory: int = 10,
        tol: float | None = None,
        noise: float | None = None,
        unroll: int | None = None,
        lanes: int | None = None,
    ) -> None:
        super().__init__(steps, tol, unroll, lanes)
        if memory < 1:
            raise ValueError(f"memory must be at least 1, got {memory}")
        self.memory, self.noise = memory, noise

    def num_lanes(self, b: Tensor) -> int:
        """Rows whose history fits in a few megabytes."""
        if self.lanes or b.is_cuda:
            return self.lanes or len(b)
        size = b[0].numel() * 2 * self.memory * b.element_size()
        return max(64, 2**23 // size)

    def init(self, b: Tensor, value: Tensor, grad: Tensor) -> Quasi:
        """Steepest descent, with a first trial of length at most 1."""
        (size, n), m = b.shape, self.memory
        new = grad.detach().new_zeros
        pairs = Pairs(
            new(size, 2 * m, n), new(size, m, m), new(size, m, m), new(size, m), new(size, 2 * m), new(size) + 1,
            torch.zeros(size, dtype=torch.int64, device=b.device),
        )  # fmt: skip
        slope = -(grad * grad).sum(1).detach()
        search = line_search.start(_first_trial(grad), value.detach(), slope)
        everywhere = torch.ones_like(value, dtype=torch.bool)
        none = torch.zeros_like(value, dtype=torch.int32)
        trial = b - search.t.unsqueeze(1) * grad
        return Quasi(trial, none, b, value.detach(), grad, -grad, slope, search, everywhere, ~everywhere, pairs)

    def step(self, state: Quasi, value: Tensor, grad: Tensor) -> Quasi:
        """One look of the line search, and where it accepts, a new direction."""
        value, g = value.detach(), grad.detach()
        slope = (g * state.direction.detach()).sum(1)
        noise = torch.finfo(g.dtype).eps ** (2 / 3) if self.noise is None else self.noise
        accepted, search = line_search.look(state.search, value, slope, state.value, state.slope, noise)
        given_up = ~accepted & (search.trials >= line_search.TRIALS)

        pairs, coefficients, paired = self._remember(state, grad, accepted)
        direction = -pairs.scale.unsqueeze(1) * grad - torch.bmm(coefficients.unsqueeze(1), pairs.history).squeeze(1)
        new_slope = (direction.detach() * g).sum(1)
        unfit = accepted & ~(new_slope < 0)
        restart = (given_up & ~state.steepest) | unfit

        to, back = accepted.unsqueeze(1), restart.unsqueeze(1)
        point, point_grad = torch.where(to, state.b, state.point), torch.where(to, grad, state.grad)
        value = torch.where(accepted, value, state.value)
        direction = torch.where(back, -point_grad, torch.where(to, direction, state.direction))
        square = (point_grad.detach() ** 2).sum(1)
        slope = torch.where(restart, -square, torch.where(accepted, new_slope, state.slope))
        first = torch.where(restart, _first_trial(point_grad), 1.0)
        anew = line_search.start(first, value, slope)
        search = Search(*(torch.where(accepted | restart, p, q) for p, q in zip(anew, search, strict=True)))
        return Quasi(
            b=point + search.t.unsqueeze(1) * direction,
            iterations=state.iterations + accepted,
            point=point,
            value=value,
            grad=point_grad,
            direction=direction,
            slope=slope,
            search=search,
            steepest=restart | (state.steepest & ~paired),
            stalled=given_up & state.steepest,
            pairs=_forget(pairs, restart),
        )

    def _remember(self, state: Quasi, grad: Tensor, accepted: Tensor) -> tuple[Pairs, Tensor, Tensor]:
        """The pairs with the accepted step in place of the oldest, and the coefficients of H g in them."""
        m, (history, inverse, gram, diagonal, old, scale, slot) = self.memory, state.pairs
        g = grad.detach()
        s, y = state.b.detach() - state.point.detach(), g - state.grad.detach()
        sy, yy = (s * y).sum(1), (y * y).sum(1)
        paired = accepted & (sy > 1e-12 * yy.sqrt() * torch.linalg.vector_norm(s, dim=1))
        products = torch.bmm(history, grad.unsqueeze(2)).squeeze(2)

        here = (torch.arange(m, device=g.device) == slot.unsqueeze(1)) & paired.unsqueeze(1)
        row, column = here.unsqueeze(2), here.unsqueeze(1)
        zero = g.new_zeros(())
        # R loses the oldest row and column, and gains the new column [Sᵀy; sᵀy]; so does R⁻¹, in closed form.
        inverse = torch.where(row | column, zero, inverse)
        change = products.detach() - old
        s_y = torch.where(here, zero, change[:, :m])
        y_y = torch.where(here, yy.unsqueeze(1), change[:, m:])
        safe = torch.where(paired, sy, 1).unsqueeze(1)
        new = torch.where(here, 1 / safe, -torch.bmm(inverse, s_y.unsqueeze(2)).squeeze(2) / safe)
        inverse = torch.where(column, new.unsqueeze(2), inverse)
        gram = torch.where(row, y_y.unsqueeze(1), torch.where(column, y_y.unsqueeze(2), gram))
        diagonal = torch.where(here, sy.unsqueeze(1), diagonal)
        scale = torch.where(paired, sy / yy, scale)
        both = torch.cat([here, here], 1)
        pair = torch.cat([((v * grad).sum(1, keepdim=True)).expand(-1, m) for v in (s, y)], 1)
        products = torch.where(both, pair, products)
        history = _replace(history, slot, s, y, paired)
        slot = torch.where(paired, (slot + 1) % m, slot)

        p, q = products[:, :m].unsqueeze(2), products[:, m:]
        alpha = torch.bmm(inverse, p).squeeze(2)
        inner = diagonal * alpha + scale.unsqueeze(1) * (torch.bmm(gram, alpha.unsqueeze(2)).squeeze(2) - q)
        delta = torch.bmm(inverse.mT, inner.unsqueeze(2)).squeeze(2)
        coefficients = torch.cat([delta, -scale.unsqueeze(1) * alpha], 1)
        products = torch.where(accepted.unsqueeze(1), products.detach(), old)
        return Pairs(history, inverse, gram, diagonal, products, scale, slot), coefficients, paired

    def stalled(self, state: Quasi) -> Tensor:
        """Rows whose steepest descent finds nothing lower."""
        return state.stalled

    def visited(self, state: Quasi) -> Tensor:
        """The accepted point; the trial beyond it may be worse."""
        return state.point


def _first_trial(grad: Tensor) -> Tensor:
    """A step along −grad that moves at most 1 in all: 1 / ‖g‖₁, or 1 where the gradient is small."""
    return (1 / grad.detach().abs().sum(1)).clamp(max=1)


def _replace(history: Tensor, slot: Tensor, s: Tensor, y: Tensor, paired: Tensor) -> Tensor:
    m, rows, keep = history.shape[1] // 2, torch.arange(len(s), device=s.device), ~paired.unsqueeze(1)
    s, y = torch.where(keep, history[rows, slot], s), torch.where(keep, history[rows, slot + m], y)
    if torch.is_grad_enabled():
        history = history.clone()
    history[rows, slot], history[rows, slot + m] = s, y
    return history


def _forget(pairs: Pairs, rows: Tensor) -> Pairs:
    """The pairs, without weight in the named rows."""
    one, two = rows.unsqueeze(1), rows[:, None, None]
    return pairs._replace(
        inverse=pairs.inverse.masked_fill(two, 0),
        gram=pairs.gram.masked_fill(two, 0),
        diagonal=pairs.diagonal.masked_fill(one, 0),
        scale=pairs.scale.masked_fill(rows, 1),
    )
