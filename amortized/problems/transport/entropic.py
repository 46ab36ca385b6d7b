r"""Entropic optimal transport between two measures, for any points; the problem that grids and clouds of points share.

Measures ``alpha = sum_i alpha_i delta(x_i)`` and ``beta = sum_j beta_j delta(y_j)``, the cost ``c(x, y) = |x - y|^2`` and a
temperature ``epsilon``, in the unit of the cost. The transport plan minimizes

    ``<C, P> + epsilon KL(P | alpha beta^T)``   over   ``P >= 0,  P 1 = alpha,  P^T 1 = beta``.

Its dual has one potential ``f_i`` for each ``x_i``; the other is the c-transform of ``f``, in closed form,

    ``f^c_j = -epsilon log sum_i alpha_i exp((f_i - c(x_i, y_j)) / epsilon)``,

and the best ``f`` minimizes the negative dual

    ``L(f; alpha, beta) = -<alpha, f> - <beta, f^c>``,

convex, differentiable and without constraints; ``-L`` at its minimum is the value of the problem above. The gradient of L is what
the plan ``P_ij = alpha_i beta_j exp((f_i + f^c_j - C_ij) / epsilon)`` misses of its first marginal; its second is always right.
``L`` does not change when a constant is added to ``f``, nor does it depend on ``f`` where ``alpha`` is zero.

**Sinkhorn's algorithm** is the map ``T(f) = (f^c)^c``, whose fixed points are the solutions: :meth:`Transport.update`, and
:class:`~amortized.solvers.Anderson` with ``memory=0``; with a memory it is accelerated. Both stop at a marginal error.

Sources: Cuturi (2013), *Sinkhorn distances*; Peyré & Cuturi (2019), *Computational optimal transport*, chapter 4; Amos,
Cohen, Luise & Redko (2022), *Meta optimal transport*: the potential predicted by a network, trained on the dual alone.
"""

from __future__ import annotations

import abc
import math
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from amortized.contract import Context
from amortized.module import AmortizedModule
from amortized.problems.transport.gaussians import gaussian_potential

Start = Literal["zeros", "gaussians", "annealed"]


class Measure(NamedTuple):
    """B measures on n points each."""

    weights: Tensor
    """``(B, n)``, not negative; each row sums to one."""
    points: Tensor
    """``(B, n, d)``, or ``(n, d)`` where all rows share them."""


class Plan(NamedTuple):
    """A transport plan by its potentials: ``P_ij = alpha_i beta_j exp((f_i + g_j - C_ij) / epsilon)``.

    Its first marginal is exact. :meth:`Transport.matrix` has it as a matrix.
    """

    f: Tensor
    """``(B, n)``, with ``<alpha, f> = <beta, g>``; also where ``alpha`` is zero."""
    g: Tensor
    """``(B, m)``."""
    map: Tensor
    """The barycentric map: where the mass at ``x_i`` goes on average, ``sum_j P_ij y_j / alpha_i``, ``(B, n, d)``."""
    cost: Tensor
    """``<C, P>``, the mean squared distance that mass is moved ``(B,)``; at the solution an upper bound of ``W_2^2``."""


class Transport(AmortizedModule, abc.ABC):
    """The dual potential ``f`` of two measures, ``(B, n)``. A subclass writes :meth:`measures`.

    Args:
        network: ``context -> (B, n)``.
        epsilon: the temperature, in the unit of the cost: a squared length.
        start: where a solver starts cold: at zero; at the potential of two Gaussians with the measures' moments; or annealed,
            after a Sinkhorn step at each of :func:`temperatures`, from where a small ``epsilon`` is reached in far fewer steps.
        **kwargs: see :class:`~amortized.AmortizedModule`.

    Raises:
        ValueError: if ``epsilon`` is not positive, or there is no such ``start``.
    """

    objective_name = "negative dual"
    free_settings = (*AmortizedModule.free_settings, "start")

    def __init__(
        self,
        network: nn.Module,
        epsilon: float = 0.01,
        start: Start = "zeros",
        **kwargs: Any,
    ) -> None:
        super().__init__(network, **kwargs)
        if not epsilon > 0:
            raise ValueError(f"{type(self).__name__}: epsilon must be positive; got {epsilon}")
        if start not in get_args(Start):
            raise ValueError(f"{type(self).__name__}: start must be one of {', '.join(get_args(Start))}; got {start!r}")
        self.epsilon, self.start = epsilon, start

    # ---- what a subclass says

    @abc.abstractmethod
    def measures(self, a: Context) -> tuple[Measure, Measure]:
        """``alpha`` and ``beta`` of each context."""

    def log_convolve(self, u: Tensor, a: Context, epsilon: float, back: bool = False) -> Tensor:
        """``log sum_i exp(u_i - C_ij / epsilon)``, ``(B, n) -> (B, m)``; with ``back`` over j, ``(B, m) -> (B, n)``.

        Here with the costs as a matrix ``(B, n, m)``; a subclass whose points have a structure may know better.
        """
        costs = self.costs(a).mT if back else self.costs(a)
        return (u.unsqueeze(2) - costs / epsilon).logsumexp(1)

    # ---- the problem

    def costs(self, a: Context) -> Tensor:
        """``C``, the squared distances ``(B, n, m)`` (``(n, m)`` where all rows share their points)."""
        alpha, beta = self.measures(a)
        exact = "donot_use_mm_for_euclid_dist"  # |x|^2 - 2 xy + |y|^2 would cancel, which epsilon magnifies
        return torch.cdist(alpha.points, beta.points, compute_mode=exact).square()

    def transform(self, f: Tensor, a: Context, back: bool = False, epsilon: float | None = None) -> Tensor:
        """The c-transform of a potential, ``(B, n) -> (B, m)``; with ``back`` that of a potential of ``beta``."""
        epsilon = self.epsilon if epsilon is None else epsilon
        weights = self.measures(a)[back].weights
        return -epsilon * self.log_convolve(log_density(f / epsilon, weights), a, epsilon, back)

    def objective(self, b: Tensor, a: Context) -> Tensor:
        alpha, beta = self.measures(a)
        return -(alpha.weights * b).sum(1) - (beta.weights * self.transform(b, a)).sum(1)

    def update(self, b: Tensor, a: Context, epsilon: float | None = None) -> Tensor:
        """Sinkhorn's map ``T(f) = (f^c)^c``; points without mass, which have no say, keep what they have.

        At another temperature if ``epsilon`` is given.
        """
        moved = self.transform(self.transform(b, a, epsilon=epsilon), a, back=True, epsilon=epsilon)
        return torch.where(self.measures(a)[0].weights > 0, moved, b)

    def fixed_point_error(self, b: Tensor, moved: Tensor, a: Context) -> Tensor:
        """``sum_i |(P 1)_i - alpha_i|`` of the plan of ``b``, in [0, 2), shape ``(B,)``; ``moved`` is ``update(b, a)``."""
        weights = self.measures(a)[0].weights
        return (weights * ((b - moved) / self.epsilon).expm1().abs()).sum(1)

    def initial(self, a: Context) -> Tensor:
        """As ``start`` says."""
        alpha, beta = self.measures(a)
        if self.start == "gaussians":
            return gaussian_potential(*alpha, *beta, self.epsilon)
        b = torch.zeros_like(alpha.weights)
        if self.start == "annealed":
            for epsilon in temperatures(self.epsilon):
                b = self.update(b, a, epsilon)
        return b

    # ---- the solution

    def decode(self, b: Tensor, a: Context) -> Plan:
        """The plan of ``(T(f), f^c)``, by potentials, barycentric map and cost; no matrix of n x m is made on grids."""
        alpha, beta = self.measures(a)
        g = self.transform(b, a)
        log_rows = self.log_convolve(log_density(g / self.epsilon, beta.weights), a, self.epsilon, back=True)
        f = -self.epsilon * log_rows
        shift = ((beta.weights * g).sum(1, keepdim=True) - (alpha.weights * f).sum(1, keepdim=True)) / 2

        def mean(values: Tensor) -> Tensor:
            """The average over ``P_ij / alpha_i`` of a number at each ``y_j``, ``(B, n)``, in the log domain throughout."""
            low, high = values.amin(-1, keepdim=True), values.amax(-1, keepdim=True)
            span = (high - low).clamp_min(torch.finfo(values.dtype).tiny)
            positive = 1 + (values - low) / span
            u = log_density(g / self.epsilon + positive.log(), beta.weights)
            average = low + span * (self.log_convolve(u, a, self.epsilon, back=True) - log_rows).expm1()
            return average.clamp(low, high)  # rounding, which a potential of many epsilon magnifies, may pass them

        means = torch.stack([mean(x) for x in beta.points.unbind(-1)], -1)
        spread = (mean(beta.points.square().sum(-1)) - means.square().sum(-1)).clamp_min(0)
        squares = (alpha.points - means).square().sum(-1) + spread
        return Plan(f + shift, g - shift, means, (alpha.weights * squares).sum(1))

    def matrix(self, b: Tensor, a: Context) -> Tensor:
        """The decoded plan as a matrix ``(B, n, m)``: for few or small contexts."""
        alpha, beta = self.measures(a)
        g = self.transform(b, a)
        u = log_density(g / self.epsilon, beta.weights).unsqueeze(1) - self.costs(a) / self.epsilon
        return alpha.weights.unsqueeze(2) * u.softmax(2)


def temperatures(last: float, decay: float = 0.9, first: float = 1.0) -> list[float]:
    """``first``, and ever lower ones by the factor ``decay``, as long as they are above ``last``.

    >>> temperatures(0.2, decay=0.5)
    [1.0, 0.5, 0.25]
    """
    count = max(0, math.ceil(math.log(last / first) / math.log(decay)))
    return [first * decay**k for k in range(count)]


def log_density(u: Tensor, weights: Tensor) -> Tensor:
    """``u + log(weights)``; where there is no weight, a finite number that stands for minus infinity.

    Finite, because a line of a grid may have no mass at all: ``inf - inf`` is not a number, in values and gradients.
    """
    mass = weights > 0
    return torch.where(mass, u + torch.where(mass, weights, 1).log(), torch.finfo(u.dtype).min / 4)
