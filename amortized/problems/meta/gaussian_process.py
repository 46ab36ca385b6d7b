r"""Functions drawn from a Gaussian process: the predictive distribution at new points, whose optimum is known exactly.

``g ~ GP(0, k)`` is seen at a few points, ``y_i = g(x_i) + noise``. The solution is a Gaussian at each query point
``x_q``, its mean and log standard deviation, ``b_q = (mu_q, log s_q)``, and the objective is the negative log density
that it gives to an unseen ``y_q``, in expectation over what ``y_q`` can be, given the points seen: ``N(m_q, v_q)``,
the exact posterior predictive,

    ``L(b; a) = mean_q E[-log N(y_q; mu_q, s_q^2)] = mean_q [ log(2 pi s_q^2) / 2 + (v_q + (m_q - mu_q)^2) / (2 s_q^2) ]``,

in nats per point. Its minimum ``mean_q log(2 pi e v_q) / 2`` is at the exact posterior, so the gap is the mean of
``KL(N(m_q, v_q) || N(mu_q, s_q^2))``. The model observes the points and where the queries are; ``m`` and ``v``
are hidden from it.

Source: Rasmussen & Williams (2006), *Gaussian processes for machine learning*, section 2.2; as a task for meta-learning: Garnelo
et al. (2018), *Conditional neural processes*.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.distributions import Normal

from amortized.contexts.data_module import ContextDataModule
from amortized.contract import num_rows
from amortized.module import AmortizedModule

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Kernel = Literal["rbf", "matern"]


class GaussianProcessTask(NamedTuple):
    """B functions, each seen at up to K points, with the exact posterior at Q others."""

    support_x: Tensor
    """``(B, K)``."""
    support_y: Tensor
    """``(B, K)``, with noise; 0 where there is no point."""
    support_mask: Tensor
    """``(B, K)``: whether there is a point."""
    query_x: Tensor
    """``(B, Q)``."""
    mean: Tensor
    """m: of ``y_q`` given the points, ``(B, Q)``; hidden from the model."""
    variance: Tensor
    """v, with the noise, ``(B, Q)``; hidden from the model."""


class Points(NamedTuple):
    """What the model sees of such tasks; shapes as there."""

    support_x: Tensor
    support_y: Tensor
    support_mask: Tensor
    query_x: Tensor


class GaussianProcessRegression(AmortizedModule):
    """The predictive distributions of a Gaussian process. Solutions ``(B, Q, 2)``: mean and log standard deviation.

    The network maps :class:`Points` to solutions, as :class:`~amortized.problems.meta.NeuralProcess` does.
    """

    objective_name = "negative log density (nats per point)"

    def objective(self, b: Tensor, a: GaussianProcessTask) -> Tensor:
        mu, log_s = b.unbind(2)
        spread = (a.variance + (a.mean - mu).square()) * (-2 * log_s).exp()
        return (0.5 * (math.log(2 * math.pi) + spread) + log_s).mean(1)

    def optimum(self, a: GaussianProcessTask) -> Tensor:
        """``mean_q log(2 pi e v_q) / 2``, the entropy of the exact posterior predictive, ``(B,)``."""
        return 0.5 * (1 + math.log(2 * math.pi) + a.variance.log()).mean(1)

    def observe(self, a: GaussianProcessTask) -> Points:
        """The points, and where the queries are."""
        return Points(a.support_x, a.support_y, a.support_mask, a.query_x)

    def initial(self, a: GaussianProcessTask) -> Tensor:
        """The prior, ``N(0, 1)``."""
        return a.query_x.new_zeros(*a.query_x.shape, 2)

    def decode(self, b: Tensor, a: GaussianProcessTask) -> Normal:
        """``N(mu_q, s_q^2)`` of batch shape ``(B, Q)``."""
        return Normal(b[..., 0], b[..., 1].exp())

    def draw(self, a: GaussianProcessTask, solutions: dict[str, Tensor]) -> Figure:
        """The points of each function, the exact posterior (grey: two standard deviations), and the network's in lines."""
        from matplotlib.figure import Figure

        n = num_rows(a)
        figure = Figure(figsize=(10, 1.8 * math.ceil(n / 4) + 0.4), layout="constrained")
        panels = figure.subplots(math.ceil(n / 4), 4, squeeze=False, sharey=True).flat
        q = self.decode(solutions["network"], a)
        for i, axes in enumerate(panels):
            if i >= n:
                axes.set_axis_off()
                continue
            order = a.query_x[i].argsort()
            x, m, v, mu, s = (t[i][order].cpu() for t in (a.query_x, a.mean, a.variance, q.mean, q.stddev))
            axes.fill_between(
                x, m - 2 * v.sqrt(), m + 2 * v.sqrt(), color="0.85", label="exact posterior, two deviations"
            )
            axes.plot(x, mu, "-", color="C3", label="network")
            for sign in (-2, 2):
                axes.plot(x, mu + sign * s, ":", color="C3", label="two deviations of it" if sign > 0 else None)
            there = a.support_mask[i]
            axes.plot(a.support_x[i, there].cpu(), a.support_y[i, there].cpu(), "ok", markersize=4, label="points seen")
            axes.set(xticks=[])
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
        return figure


class GaussianProcesses(ContextDataModule):
    """Functions of one variable on [-2, 2], without end, each seen at ``shots[0]`` to ``shots[1]`` points, any number as likely.

    The prior variance is 1. Covariances are factorised in float64.

    Args:
        shots: the least and the greatest number of points.
        queries: Q.
        kernel: ``rbf``: ``exp(-d^2 / 2)``; ``matern`` (5/2): ``(1 + sqrt(5) d + 5 d^2 / 3) exp(-sqrt(5) d)``; d in lengthscales.
        lengthscale: in units of x.
        noise: standard deviation of the noise in y.
        **kwargs: see :class:`~amortized.ContextDataModule`.

    Raises:
        ValueError: if a number is out of its range.
    """

    def __init__(
        self,
        shots: tuple[int, int] = (3, 20),
        queries: int = 24,
        kernel: Kernel = "rbf",
        lengthscale: float = 0.5,
        noise: float = 0.1,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not 0 <= shots[0] <= shots[1] or shots[1] < 1 or queries < 1:
            raise ValueError(f"data.shots must be two rising numbers, data.queries positive; got {shots} and {queries}")
        if kernel not in ("rbf", "matern"):
            raise ValueError(f"data.kernel must be rbf or matern; got {kernel!r}")
        if lengthscale <= 0 or noise <= 0:
            raise ValueError(f"data.lengthscale and data.noise must be positive; got {lengthscale} and {noise}")
        self.shots, self.queries, self.kernel, self.lengthscale, self.noise = shots, queries, kernel, lengthscale, noise

    def covariance(self, x: Tensor, z: Tensor) -> Tensor:
        """``k(x, z)``: ``(B, K), (B, Q) -> (B, K, Q)``."""
        d = (x.unsqueeze(2) - z.unsqueeze(1)).abs() / self.lengthscale
        if self.kernel == "rbf":
            return (-0.5 * d.square()).exp()
        return (1 + math.sqrt(5) * d + 5 * d.square() / 3) * (-math.sqrt(5) * d).exp()

    def sample(self, n: int, generator: torch.Generator) -> GaussianProcessTask:
        least, most = self.shots
        options: Any = {"generator": generator, "device": generator.device}
        count = torch.randint(least, most + 1, (n, 1), **options)
        x, z = (4 * torch.rand(n, k, **options, dtype=torch.float64) - 2 for k in (most, self.queries))
        normal = torch.randn(n, most, 1, **options, dtype=torch.float64)
        seen = torch.arange(most, device=generator.device) < count
        # Points that are not seen stand apart from all others, with the variance 1, at 0.
        K = self.covariance(x, x) * (seen.unsqueeze(1) & seen.unsqueeze(2))
        K.diagonal(dim1=1, dim2=2).copy_(1 + seen * self.noise**2)
        L = torch.linalg.cholesky(K)
        across = self.covariance(x, z) * seen.unsqueeze(2)
        half = torch.linalg.solve_triangular(
            L, across, upper=False
        )  # y = L normal, so that K^-1 y needs no second solve
        mean = (half.mT @ normal).squeeze(2)
        variance = 1 + self.noise**2 - half.square().sum(1)
        y = (L @ normal).squeeze(2) * seen
        x, y, z, mean, variance = (t.float() for t in (x, y, z, mean, variance))
        return GaussianProcessTask(x, y, seen, z, mean, variance)
