r"""Neural posterior estimation: the posterior of a simulator's parameters, for every observation at once.

A simulator draws ``x ~ p(x | theta)`` and nobody can evaluate that density. Still, for coordinates b of a family ``q(theta; b)``,

    ``L(b; x) = E_{p(theta | x)} [ -log q(theta; b) ]  =  KL(p(theta | x) || q) + H[p(theta | x)]``

is least at the posterior, and its mean over observations needs draws of the simulator alone:
``E_{p(x)} L(f(x); x) = E_{p(theta) p(x | theta)} [ -log q(theta; f(x)) ]``.

**What the gap means.** Where the simulator can draw its true posterior, ``L(b; x)`` is a mean over K such draws, to which the
solver fits b: the gap is what the network lacks against the family's best use of b for that observation, too large by about
``features / 2 K`` nats at most, since the solver fits those very draws. Where it cannot (most simulators), the only draw is the
theta that made x, and the gap is regret in hindsight, against a solver that was told the answer: an upper bound of the
amortization gap that is mostly the width of the posterior, so judge such posteriors by their calibration
(:class:`~amortized.problems.simulation.PosteriorDiagnostics`).

Source: Papamakarios & Murray (2016), *Fast epsilon-free inference of simulation models with Bayesian conditional density
estimation*; Greenberg et al. (2019), *Automatic posterior transformation*; Cranmer, Brehmer & Louppe (2020).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from amortized.contract import ProblemError, evaluate, num_rows, rows_where, take
from amortized.module import AmortizedModule
from amortized.posteriors import DiagonalGaussian, FullGaussian, PointMoments, Posterior, normal_points
from amortized.problems.simulation.contexts import Simulation
from amortized.problems.simulation.priors import Prior
from amortized.problems.simulation.simulators import GaussianLinear, Simulator

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Observation(NamedTuple):
    """What the network sees: x, standardised."""

    x: Tensor


class ParameterPosterior(PointMoments):
    """``q(theta)``: a member of the family in the prior's coordinates, mapped onto the prior's support."""

    arg_constraints: dict[str, Any] = {}
    has_rsample = True

    def __init__(self, family: Posterior, b: Tensor, prior: Prior) -> None:
        self.family, self.b, self.prior = family, b, prior
        super().__init__(b.shape[:1], torch.Size([family.latent]), validate_args=False)

    def rsample(self, sample_shape: torch.Size | list[int] | tuple[int, ...] = ()) -> Tensor:
        noise = torch.randn(
            torch.Size(sample_shape).numel(),
            *self.batch_shape,
            self.family.latent,
            dtype=self.b.dtype,
            device=self.b.device,
        )
        theta: Tensor = self.prior(self.family.draw(self.b, noise)[0])
        return theta.reshape(*sample_shape, *theta.shape[1:])

    def log_prob(self, value: Tensor) -> Tensor:
        """Minus infinity outside the support."""
        u = self.prior.inverse(value)
        density = self.family.distribution(self.b).log_prob(u) - self.prior.log_det(u)
        return torch.where(self.prior.contains(value) | value.isnan().any(-1), density, -torch.inf)

    def points(self) -> Tensor:
        noise = normal_points(self.family.latent, 512).to(self.b)
        theta: Tensor = self.prior(self.family.draw(self.b, noise[:, None].expand(-1, len(self.b), -1))[0])
        return theta


class Predicted(NamedTuple):
    """What ``predict`` writes of each posterior."""

    mean: Tensor
    """``(B, d)``."""
    stddev: Tensor
    """``(B, d)``."""
    draws: Tensor
    """``(B, S, d)``."""
    log_density: Tensor
    """``log q`` of each draw, ``(B, S)``."""


class NeuralPosterior(AmortizedModule):
    """The posterior of a simulator's parameters. Solutions ``(B, posterior.features)``; contexts: :class:`Simulation`.

    Each number of an observation's last dimension is standardised by its mean and variance over the first simulations (and over
    the elements of a set, the times of a series), which the checkpoint keeps. Parameters are learned in the prior's coordinates.

    Args:
        network: ``Observation -> (B, posterior.features)``: an MLP, or one for sets or series (with ``fields: [x]``).
        posterior: the family of q, in the prior's coordinates.
        simulator: whose parameters are sought: its prior, and the shape of its observations.
        draws: of each posterior, for ``predict`` to write.
        **kwargs: see :class:`~amortized.AmortizedModule`.
    """

    centre: Tensor
    scale: Tensor
    standardised: Tensor
    objective_name = "negative log posterior density (nats)"
    free_settings = (*AmortizedModule.free_settings, "draws")
    FIRST = 4096
    """Simulations to standardise observations by."""

    def __init__(
        self, network: nn.Module, posterior: Posterior, simulator: Simulator, draws: int = 1000, **kwargs: Any
    ) -> None:
        super().__init__(network, **kwargs)
        d = simulator.prior.dimension
        if posterior.latent != d:
            raise ValueError(
                f"NeuralPosterior: {type(simulator).__name__} has {d} parameters; the posterior's latent is {posterior.latent}"
            )
        self.posterior, self.simulator, self.draws = posterior, simulator, draws
        width = simulator.shape[-1]
        self.register_buffer("centre", torch.zeros(width))
        self.register_buffer("scale", torch.ones(width))
        self.register_buffer("standardised", torch.tensor(False))

    def setup(self, stage: str) -> None:
        """Refuse simulations of another simulator."""
        super().setup(stage)
        own = self.simulator
        other = getattr(getattr(self.trainer, "datamodule", None), "simulator", own)
        if type(other) is not type(own) or (other.shape, other.prior.dimension) != (own.shape, own.prior.dimension):
            names = [f"{type(s).__name__}, {s.prior.dimension} parameters and x {tuple(s.shape)}" for s in (own, other)]
            raise ProblemError(
                f"model and data have different simulators: the model's is {names[0]}; the data's is {names[1]}"
            )

    def on_train_start(self) -> None:
        """Learn how to standardise, unless a checkpoint said it."""
        super().on_train_start()
        if bool(self.standardised):
            return
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        parts: list[Tensor] = []
        while sum(map(len, parts)) < self.FIRST:
            parts.append(data.batch("train", len(parts), self.device).x)
        x = torch.cat(parts)[: self.FIRST].flatten(0, -2).double()
        self.centre.copy_(x.mean(0))
        scale = x.std(0)
        self.scale.copy_(torch.where(scale > 0, scale, 1))
        self.standardised.fill_(True)

    def observe(self, a: Simulation) -> Observation:
        """Without the parameters."""
        return Observation((a.x - self.centre) / self.scale)

    def initial(self, a: Simulation) -> Tensor:
        """Zeros; for families of Gaussians that is the prior."""
        return torch.zeros(num_rows(a), self.posterior.features, dtype=a.x.dtype, device=a.x.device)

    def objective(self, b: Tensor, a: Simulation) -> Tensor:
        if not len(b):
            return b.sum(1)
        theta = draws_of(a)
        prior = self.simulator.prior
        u = prior.inverse(theta)
        density: Tensor = prior.log_det(u) - self.posterior.distribution(b).log_prob(u)
        return density.mean(0)

    def decode(self, b: Tensor, a: Simulation) -> ParameterPosterior:
        """The posterior of each observation, to draw from and to evaluate."""
        return ParameterPosterior(self.posterior, b, self.simulator.prior)

    def predict_step(self, a: Simulation, batch_idx: int) -> dict[str, Any]:
        """The posterior's coordinates, mean and standard deviation, draws of it and their log density."""
        b = self(a)
        finite = rows_where(
            torch.isfinite, b
        )  # the objective need not be: nobody knows the parameters of an observation
        decoded = None
        if finite.any():
            q = self.decode(take(b, finite), take(a, finite))
            theta = q.sample((self.draws,))
            decoded = Predicted(q.mean, q.stddev, theta.transpose(0, 1), q.log_prob(theta).T)
        return {"b": b, "objective": evaluate(self, b, a), "finite": finite, "decoded": decoded}

    def draw(self, a: Simulation, solutions: dict[str, Tensor]) -> Figure:
        """The first two parameters: draws of each posterior, of the true one where there are some, and the true parameters."""
        from matplotlib.figure import Figure
        from matplotlib.lines import Line2D

        names, second = self.simulator.names, min(1, self.posterior.latent - 1)
        styles: tuple[dict[str, Any], ...] = (
            {"color": "#9ca3af", "s": 5, "linewidths": 0},
            {"color": "#1f4e8c", "s": 2, "linewidths": 0, "alpha": 0.6},
            {"color": "#e07b39", "s": 60, "marker": "*", "zorder": 3},
        )
        figure = Figure(figsize=(1.9 * len(a.x) + 0.4, 2 * len(solutions) + 0.9), layout="constrained")
        grid = figure.subplots(len(solutions), len(a.x), squeeze=False)
        generator = torch.Generator().manual_seed(0)
        for line, (solution, b) in zip(grid, solutions.items(), strict=True):
            noise = torch.randn(400, 1, self.posterior.latent, generator=generator).to(b).expand(-1, len(b), -1)
            theta = self.simulator.prior(self.posterior.draw(b, noise)[0])
            line[0].set_ylabel(f"{solution}\n{names[second]}", fontsize=8)
            for i, axes in enumerate(line):
                for points, style in zip((a.draws[i], theta[:, i], a.theta[i : i + 1]), styles, strict=True):
                    axes.scatter(points[:, 0].cpu(), points[:, second].cpu(), **style)
                axes.set_xlabel(names[0], fontsize=8)
                axes.tick_params(labelsize=6)
        marks = [Line2D([], [], color=s["color"], marker=s.get("marker", "o"), linestyle="") for s in styles]
        labels = ["true posterior", "q", "true parameters"]
        figure.legend(marks, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
        return figure


def draws_of(a: Simulation) -> Tensor:
    """``(K, B, d)`` draws of ``p(theta | x)``: those beside the observation, or the one that made it."""
    return a.draws.transpose(0, 1) if a.draws.shape[1] else a.theta[None]


class GaussianLinearPosterior(NeuralPosterior):
    """The posterior of :class:`GaussianLinear`, whose minimum is known: ``L* = H[N(x / 2, 0.05 I)]``.

    Args:
        network: see :class:`NeuralPosterior`.
        posterior: a family of Gaussians, so that it holds the true one.
        dimension: of theta and of x.
        **kwargs: see :class:`NeuralPosterior`.
    """

    def __init__(self, network: nn.Module, posterior: Posterior, dimension: int = 10, **kwargs: Any) -> None:
        if not isinstance(posterior, DiagonalGaussian | FullGaussian):
            raise ProblemError(f"GaussianLinearPosterior needs a family of Gaussians; got {type(posterior).__name__}")
        super().__init__(network, posterior, GaussianLinear(dimension), **kwargs)

    def optimum(self, a: Simulation) -> Tensor:
        """The entropy of the true posterior, ``(B,)``, in nats."""
        assert isinstance(self.simulator, GaussianLinear)
        return -self.simulator.exact(a.x).log_prob(draws_of(a)).mean(0)

    family_optimum = optimum
