r"""Whether posteriors can be trusted: calibration, coverage, predictive checks, and a classifier where the truth is known.

* **Simulation-based calibration.** Over ``p(theta) p(x | theta)`` the rank of each parameter among draws of its posterior
  ``q(theta | x)`` is uniform. Source: Talts et al. (2018), *Validating Bayesian inference algorithms with simulation-based
  calibration*.
* **TARP**, tests of accuracy with random points: the share of draws that are nearer to a random point than theta is, is
  uniform too; that sees all parameters at once. Source: Lemos et al. (2023), *Sampling-based accuracy testing of posterior
  estimators for general inference*.
* **Posterior predictive checks**: whether observations are among what the simulator makes of draws of their posterior.
* **C2ST**: the accuracy, 1/2 at best, of a classifier that tells draws of q from those of the true posterior. Source:
  Lopez-Paz & Oquab (2017), *Revisiting classifier two-sample tests*; Lueckmann et al. (2021).

A uniform variable's empirical distribution leaves its diagonal by more than ``sqrt(log(2 / alpha) / 2 N)`` with a
probability of at most alpha (Massart 1990): the *band*, here for all parameters and TARP together.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from amortized.contract import of_every_process
from amortized.problems.simulation.contexts import Simulation
from amortized.problems.simulation.posterior import NeuralPosterior
from amortized.problems.simulation.simulators import Recorded

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def ranks(theta: Tensor, draws: Tensor, generator: torch.Generator) -> Tensor:
    """The share of draws below each parameter, ``(B, d)``, uniform on (0, 1) where draws and theta are of one distribution.

    Args:
        theta: ``(B, d)``.
        draws: ``(L, B, d)``.
        generator: breaks the ties that L draws leave, on their device.
    """
    return _uniform((draws < theta).sum(0), len(draws), generator)


def coverage(u: Tensor, draws: Tensor, generator: torch.Generator) -> Tensor:
    """TARP: the share of draws nearer to a random point than u is, ``(B,)``, uniform likewise.

    Args:
        u: parameters in the prior's coordinates, ``(B, d)``; the random points are draws of the prior.
        draws: ``(L, B, d)``, in those coordinates.
        generator: of the points, on their device.
    """
    points = torch.randn(u.shape, generator=generator, device=generator.device)
    nearer = ((draws - points).square().sum(-1) < (u - points).square().sum(-1)).sum(0)
    return _uniform(nearer, len(draws), generator)


def _uniform(count: Tensor, of: int, generator: torch.Generator) -> Tensor:
    return (count + torch.rand(count.shape, generator=generator, device=generator.device)) / (of + 1)


def deviation(uniform: Tensor) -> Tensor:
    """The largest distance of the empirical distribution of ``(N, *)`` numbers from that of the uniform one, ``(*,)``."""
    n = len(uniform)
    order = uniform.sort(0).values
    steps = torch.arange(n, device=order.device).view(-1, *[1] * (order.ndim - 1))
    return torch.maximum((steps + 1) / n - order, order - steps / n).amax(0)


def band(n: int, alpha: float) -> float:
    """What :func:`deviation` of n numbers exceeds with probability alpha at most, if they are uniform."""
    return math.sqrt(math.log(2 / alpha) / (2 * n))


def c2st(truth: Tensor, draws: Tensor, seed: int = 1, epochs: int = 10_000) -> float:
    """The accuracy with which a classifier tells draws ``(N, d)`` from as many of the true posterior, 5-fold cross-validated.

    The classifier of Lueckmann et al. (2021): two hidden layers of 10 d units, inputs scaled by the true draws. Where the draws
    are alike it trains long, on nothing: ``epochs`` is the most it may take. More than one thread would make it slower.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.model_selection import KFold, cross_val_score
    from sklearn.neural_network import MLPClassifier
    from threadpoolctl import threadpool_limits

    inputs = (torch.cat([truth, draws]) - truth.mean(0)) / truth.std(0)
    labels = torch.arange(len(inputs)) >= len(truth)
    width = 10 * truth.shape[1]
    classifier = MLPClassifier((width, width), max_iter=epochs, random_state=seed)
    folds = KFold(5, shuffle=True, random_state=seed)
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return float(cross_val_score(classifier, inputs.cpu().numpy(), labels.numpy(), cv=folds).mean())


EPOCHS = 100
"""Of the classifier at a test: enough to see what is plainly wrong; ``benchmarks/simulation.py`` trains it to its end."""


class PosteriorDiagnostics(Callback):
    """Measures the posteriors of a test, into ``diagnostics`` of ``results.json``, the table, and two pictures.

    * ``sbc`` and ``tarp``: the largest deviation from a uniform distribution over the test contexts, and ``band``;
      ``calibrated``: whether both are within it. ``ranks`` has the deviation of each parameter.
    * ``predictive``: the share of observed numbers within the central 90 % of what the simulator makes of posterior draws,
      over the first 64 contexts (more than 90 % as a rule: q saw them); ``null`` without a simulator.
    * ``c2st``: its mean over the first ``c2st`` contexts, 1,000 draws each, 100 epochs at most;
      ``null`` where the simulator has no posterior.
    * ``simulated`` and ``failed``: simulations so far, of this process, and how many of those were not finite.

    Args:
        draws: L, of each posterior.
        alpha: probability that a calibrated posterior leaves the band.
        c2st: contexts for the classifier.
    """

    name = "diagnostics"
    captions: ClassVar = {
        "calibration": (
            "Calibration",
            "Left: ranks of the parameters among draws of their posterior, how far from uniform; right: how often regions of a "
            "stated credibility hold the parameters (TARP). Calibrated posteriors stay in the band.",
        ),
        "predictive": (
            "Posterior predictive check",
            "The first observations of the test, and what the simulator makes of draws of their posteriors.",
        ),
    }

    def __init__(self, draws: int = 256, alpha: float = 0.01, c2st: int = 4) -> None:
        if draws < 1 or not 0 < alpha < 1 or c2st < 0:
            raise ValueError(
                f"PosteriorDiagnostics: draws must be positive, alpha in (0, 1), c2st not negative; got {draws}, {alpha}, {c2st}"
            )
        self.draws, self.alpha, self.c2st = draws, alpha, c2st
        self.results: dict[str, Any] = {}
        self._shares: list[Tensor] = []
        self._pictures: dict[str, Callable[[], Figure]] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not isinstance(pl_module, NeuralPosterior):
            raise TypeError(f"PosteriorDiagnostics measures a NeuralPosterior; got {type(pl_module).__name__}")

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._shares, self._pictures, self.results = [], {}, {}

    @torch.no_grad()
    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        assert isinstance(pl_module, NeuralPosterior)
        if dataloader_idx or not len(outputs):
            return
        number = batch_idx * trainer.world_size + trainer.global_rank
        generator = torch.Generator(pl_module.device).manual_seed(number)
        u = self._draw(pl_module, outputs, self.draws, generator)
        own = pl_module.simulator.prior.inverse(batch.theta)
        self._shares.append(torch.cat([ranks(own, u, generator), coverage(own, u, generator)[:, None]], 1))
        if number == 0:
            self.results = self._checked(pl_module, batch, outputs, u, generator)

    def _draw(self, module: NeuralPosterior, b: Tensor, n: int, generator: torch.Generator) -> Tensor:
        """Draws of the posteriors in the prior's coordinates ``(n, B, d)``."""
        noise = torch.randn(n, len(b), module.posterior.latent, generator=generator, device=generator.device)
        return module.posterior.draw(b.float(), noise)[0]

    def _checked(
        self, module: NeuralPosterior, a: Simulation, b: Tensor, u: Tensor, generator: torch.Generator
    ) -> dict[str, Any]:
        """Predictive checks and C2ST on the first contexts."""
        simulator, few = module.simulator, self.c2st
        found: dict[str, Any] = {"predictive": None, "c2st": None}
        if not isinstance(simulator, Recorded):
            x = a.x[:64].flatten(1)
            theta = simulator.prior(u[:, :64])
            made = simulator.simulate(theta.flatten(0, 1), generator).unflatten(0, theta.shape[:2]).flatten(2)
            made = torch.where(made.isfinite().all(-1, keepdim=True), made, torch.nan)
            low, middle, high = made.nanquantile(torch.tensor([0.05, 0.5, 0.95]).to(made), 0)
            found["predictive"] = float(((low <= x) & (x <= high)).float().mean())
            shown = [part[:4].cpu() for part in (x, low, middle, high)]
            self._pictures["predictive"] = lambda: _draw_predictive(*shown)
        truth = simulator.posterior(a.x[:few], 1000, generator) if few else None
        if truth is not None:
            theta = simulator.prior(self._draw(module, b[:few], 1000, generator)).transpose(0, 1)
            scores = [c2st(*pair, epochs=EPOCHS) for pair in zip(truth, theta, strict=True)]
            found["c2st"] = sum(scores) / len(scores)
        return found

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        every = of_every_process([part.cpu() for part in self._shares], trainer.world_size)
        parts = [part for process in every for part in process]
        if not trainer.is_global_zero:
            return
        assert isinstance(pl_module, NeuralPosterior)
        shares = torch.cat(parts).cpu()
        far = deviation(shares).tolist()
        limit = band(len(shares), self.alpha / len(far))
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        self.results = {
            "contexts": len(shares),
            "draws": self.draws,
            "sbc": max(far[:-1]),
            "tarp": far[-1],
            "band": limit,
            "calibrated": max(far) <= limit,
            "ranks": dict(zip(pl_module.simulator.names, far, strict=False)),
            **self.results,
            "simulated": data.simulated,
            "failed": data.failed,
        }
        names = [*pl_module.simulator.names, "TARP"]
        self._pictures["calibration"] = lambda: _draw_calibration(shares, names, limit)

    def lines(self) -> list[tuple[str, str]]:
        """For the table."""
        r = self.results
        shown = [
            ("ranks of parameters, TARP: deviation; band", f"{r['sbc']:.3f}, {r['tarp']:.3f}; {r['band']:.3f}"),
            ("posteriors calibrated, within the band", "yes" if r["calibrated"] else "NO"),
        ]
        if r["predictive"] is not None:
            shown.append(("observations in the 90 % predictive interval", f"{r['predictive']:.1%}"))
        if r["c2st"] is not None:
            shown.append(("C2ST against the true posterior (0.5: equal)", f"{r['c2st']:.3f}"))
        if r["failed"]:
            shown.append(("simulations that failed, drawn anew", f"{r['failed']} of {r['simulated']}"))
        return shown

    def pictures(self) -> dict[str, Callable[[], Figure]]:
        """For the report."""
        return self._pictures


def _draw_calibration(shares: Tensor, names: list[str], limit: float) -> Figure:
    """How far the distribution of ranks, and the coverage of TARP, are from the diagonal."""
    from matplotlib.figure import Figure

    n = len(shares)
    at = torch.linspace(0, 1, 201)
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for i, name in enumerate(names[:-1]):
        left.plot(at, torch.searchsorted(shares[:, i].sort().values, at) / n - at, linewidth=1.2, label=name)
    left.fill_between(at, -limit, limit, color="#e5e7eb", zorder=0, label="band")
    left.set(
        xlabel="rank of the parameter, as a share", ylabel="distribution minus uniform", ylim=(-2 * limit, 2 * limit)
    )
    left.set_title("Simulation-based calibration")
    covered = torch.searchsorted(shares[:, -1].sort().values, at) / n
    right.fill_between(at, at - limit, at + limit, color="#e5e7eb", zorder=0, label="band")
    right.plot(at, covered, color="#1f4e8c", linewidth=1.5, label="TARP")
    right.set(
        xlabel="credibility", ylabel="expected coverage", xlim=(0, 1), ylim=(0, 1), title=f"Coverage, {n} simulations"
    )
    for axes in (left, right):
        axes.grid(color="#e5e7eb", linewidth=0.6)
        axes.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=6)
    far = deviation(shares).max()
    if far > 2 * limit:
        left.set_ylim(-1.1 * far, 1.1 * far)
    return figure


def _draw_predictive(x: Tensor, low: Tensor, middle: Tensor, high: Tensor) -> Figure:
    """Observations, and the central 90 % of what the simulator makes of draws of their posteriors."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 2.6), layout="constrained")
    for i, axes in enumerate(figure.subplots(1, len(x), squeeze=False)[0]):
        at = range(1, x.shape[1] + 1)
        axes.fill_between(at, low[i], high[i], color="#c7d7ea", label="90 % of predictions")
        axes.plot(at, middle[i], color="#1f4e8c", linewidth=1, label="their median")
        axes.plot(at, x[i], "o", color="#e07b39", markersize=4, label="observed")
        axes.set(xlabel="number in the observation", title=f"context {i}")
        axes.tick_params(labelsize=7)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    return figure
