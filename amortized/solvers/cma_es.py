"""CMA-ES, every row with its own search distribution: for objectives without gradients."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from amortized.contract import Context, Problem, map_leaves
from amortized.solvers.base import check_value
from amortized.solvers.engine.rows import Rows, RowSolver


class CMAESState(NamedTuple):
    """A normal distribution for each row, and the two paths that its mean has taken."""

    mean: Tensor
    sigma: Tensor
    covariance: Tensor
    path: Tensor
    sigma_path: Tensor
    iterations: Tensor


class CMAES(RowSolver):
    r"""The covariance matrix adaptation evolution strategy: ``b ~ N(m, σ² C)``, m, σ and C from the better half.

    Uses values only, so objectives may be kinked or flat in places. A round evaluates ``population`` points of every
    row. It needs hundreds of rounds where LBFGS needs tens: for objectives that have no useful gradient, of up to some
    50 unknowns (C costs n², its eigenvectors n³ a round). It is invariant to the scale of the objective, not of b.

    ``residual`` is the largest standard deviation of the distribution, in units of b: it says that the search has
    contracted, not that the point is a minimum. Draws come from torch's generator.

    Source: Hansen (2016), The CMA evolution strategy: a tutorial, figure 6 with default parameters, without active
    covariance updates.

    Args:
        steps: generations at most.
        sigma: σ at the start, in units of b: a third of how far the minimum may be.
        population: λ, points a generation; None for ``4 + 3 ln n``, doubled (rows are cheap in a batch).
        tol: largest standard deviation at which a row is finished; None chooses by dtype.
        chunk: rows at work at a time; None for all.

    Raises:
        ValueError: if ``sigma`` is not positive or ``population`` less than 4.
    """

    relative = False
    uses_gradient = False

    def __init__(
        self,
        steps: int = 1000,
        sigma: float = 0.5,
        population: int | None = None,
        tol: float | None = None,
        chunk: int | None = None,
    ) -> None:
        super().__init__(steps, tol, chunk)
        if sigma <= 0 or (population is not None and population < 4):
            raise ValueError(f"sigma must be positive and population at least 4, got {sigma} and {population}")
        self.sigma, self.population = sigma, population

    def begin(self, problem: Problem, a: Context, b: Tensor) -> Rows:
        """Rows with a round distribution about their start."""
        value = problem.objective(b, a)
        check_value(value, b)
        flat = self.layout.flat(b)
        size, n = flat.shape
        eye = torch.eye(n, dtype=b.dtype, device=b.device).expand(size, n, n)
        sigma, none = torch.full_like(flat[:, 0], self.sigma), torch.zeros(size, dtype=torch.int32, device=b.device)
        still = torch.zeros_like(flat)
        return self.enter(flat, value, sigma, CMAESState(flat, sigma, eye, still, still, none))

    def advance(self, problem: Problem, a: Context, rows: Rows, shape: torch.Size) -> Rows:
        """One generation of every row."""
        mean, sigma, covariance, path, sigma_path, iterations = rows.state
        size, n = mean.shape
        count = self.population or 2 * (4 + int(3 * math.log(n)))
        half = count // 2
        weights = math.log(half + 0.5) - torch.arange(1, half + 1, dtype=mean.dtype, device=mean.device).log()
        weights = weights / weights.sum()
        mass = 1 / float((weights**2).sum())
        c_sigma = (mass + 2) / (n + mass + 5)
        damping = 1 + 2 * max(0.0, math.sqrt((mass - 1) / (n + 1)) - 1) + c_sigma
        c_path = (4 + mass / n) / (n + 4 + 2 * mass / n)
        c_one = 2 / ((n + 1.3) ** 2 + mass)
        c_rank = min(1 - c_one, 2 * (mass - 2 + 1 / mass) / ((n + 2) ** 2 + mass))
        usual = math.sqrt(n) * (1 - 1 / (4 * n) + 1 / (21 * n * n))

        spread, vectors = torch.linalg.eigh(covariance)
        spread = spread.clamp(min=torch.finfo(mean.dtype).tiny).sqrt()
        root = vectors * spread.unsqueeze(1)
        z = torch.randn(size, count, n, dtype=mean.dtype, device=mean.device)
        y = z @ root.mT
        points = mean.unsqueeze(1) + sigma[:, None, None] * y
        repeated = map_leaves(lambda leaf: leaf.repeat_interleave(count, 0), a)
        values = problem.objective(points.reshape(-1, *shape[1:]), repeated).view(size, count)
        ranked = torch.where(values.isfinite(), values, torch.inf)
        order = ranked.argsort(1)[:, :half]
        best = order[:, 0]
        chosen = y.gather(1, order.unsqueeze(2).expand(-1, -1, n))
        step = (weights.unsqueeze(1) * chosen).sum(1)

        whitened = (vectors @ ((vectors.mT @ step.unsqueeze(2)) / spread.unsqueeze(2))).squeeze(2)
        sigma_path = (1 - c_sigma) * sigma_path + math.sqrt(c_sigma * (2 - c_sigma) * mass) * whitened
        length = sigma_path.norm(dim=1)
        k = (iterations + 1).to(mean.dtype)
        going = length / (1 - (1 - c_sigma) ** (2 * k)).sqrt() < (1.4 + 2 / (n + 1)) * usual
        going = going.to(mean.dtype).unsqueeze(1)
        path = (1 - c_path) * path + going * math.sqrt(c_path * (2 - c_path) * mass) * step
        rank_one = path.unsqueeze(2) * path.unsqueeze(1)
        rank_half = torch.einsum("k,lki,lkj->lij", weights, chosen, chosen)
        held = 1 - c_one - c_rank + c_one * (1 - going.unsqueeze(2)) * c_path * (2 - c_path)
        grown = held * covariance + c_one * rank_one + c_rank * rank_half
        widened = sigma * (c_sigma / damping * (length / usual - 1)).clamp(max=1).exp()

        # A row in which nothing was finite looks closer by.
        found = ranked.gather(1, best.unsqueeze(1)).squeeze(1).isfinite()
        some = found.unsqueeze(1)
        state = CMAESState(
            mean=torch.where(some, mean + sigma.unsqueeze(1) * step, mean),
            sigma=torch.where(found, widened, sigma / 2),
            covariance=torch.where(some.unsqueeze(2), grown, covariance),
            path=torch.where(some, path, 0),
            sigma_path=torch.where(some, sigma_path, 0),
            iterations=iterations + 1,
        )
        rows_here = torch.arange(size, device=mean.device)
        residual = sigma * spread.amax(1)
        return self.settle(
            rows, points[rows_here, best], values[rows_here, best], residual, state, state.iterations,
            evaluations=count, recovers=True, stalled=residual <= torch.finfo(mean.dtype).eps * mean.norm(dim=1),
        )  # fmt: skip
