r"""Amortized inference: one bound on the evidence for each image, the first use of the term (Kingma & Welling 2014).

For an image ``a`` and a model ``p(a, z) = p(a | z) N(z; 0, I)``, the coordinates ``b`` of a posterior ``q(z; b)``
minimize the negative evidence lower bound

    ``L(b; a) = E_{z ~ q} [ -log p(a | z) ] + KL(q || N(0, I))  >=  -log p(a)``,

in nats. The encoder amortizes it; the decoder ``p(a | z)`` is a parameter of the objective, so it
trains jointly, and solvers move only ``b``. What the encoder loses against a solver is the amortization gap of
Cremer, Li & Duvenaud (2018); what the solver still lacks against the evidence is the family's approximation gap.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, constraints
from torch.nn.functional import binary_cross_entropy_with_logits, mse_loss
from torch.quasirandom import SobolEngine

from amortized.contexts.data_module import ContextDataModule
from amortized.contexts.images import show_lines
from amortized.contract import Context, num_rows
from amortized.module import AmortizedModule
from amortized.posteriors import Posterior, standard_normal
from amortized.problems.inference.evidence import Evidence

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class VAE(AmortizedModule):
    r"""A variational autoencoder. Solutions ``(B, posterior.features)``; contexts ``(B, pixels)``.

    With ``importance`` K > 1 the bound is that of importance-weighted autoencoders (Burda, Grosse & Salakhutdinov 2016),

        ``L(b; a) = -E [ log 1/K sum_k p(a | z_k) N(z_k; 0, I)^beta / q(z_k; b)^beta ]``;

    with K = 1 it is the ELBO, where ``beta`` weighs the divergence (Higgins et al. 2017), in closed form where the
    family has one.

    Expectations are estimated by randomised quasi-Monte Carlo: Sobol points, shifted at random for each image and each
    evaluation (Buchholz, Wenzel & Mandt 2018). It is unbiased, and a solver that searches with fixed draws cannot fit
    them as it would fit independent ones.

    Args:
        encoder: ``(B, pixels) -> (B, posterior.features)``.
        decoder: ``(n, latent) -> (n, pixels)``: logits of Bernoulli pixels, or means of Gaussian ones.
        posterior: the family of ``q``.
        likelihood: of a pixel: ``"bernoulli"``, or ``"gaussian"`` with standard deviation ``sigma``.
        sigma: of Gaussian pixels, in the unit of the pixels.
        beta: weight of the divergence.
        importance: K, draws in one bound.
        samples: estimates of the bound for each image in a training step.
        eval_samples: estimates of the bound for each image in evaluation.
        evidence: how a test estimates ``log p(a)``, for the approximation gap; ``None`` leaves it unknown.
        freeze_decoder: train the encoder alone, for a given decoder.
        height: of images that are not square, in pixels, for pictures of them; ``None`` draws those in one line.
        **kwargs: see :class:`~amortized.AmortizedModule`.
    """

    sobol: Tensor
    objective_name = "negative ELBO (nats)"
    free_settings = (*AmortizedModule.free_settings, "evidence", "samples", "eval_samples", "freeze_decoder", "height")
    free_to_resume = (*AmortizedModule.free_to_resume, "evidence", "height")

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        posterior: Posterior,
        likelihood: Literal["bernoulli", "gaussian"] = "bernoulli",
        sigma: float = 1.0,
        beta: float = 1.0,
        importance: int = 1,
        samples: int = 1,
        eval_samples: int = 32,
        evidence: Evidence | None = None,
        freeze_decoder: bool = False,
        height: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(encoder, **kwargs)
        if likelihood not in ("bernoulli", "gaussian"):
            raise ValueError(f"VAE: likelihood must be 'bernoulli' or 'gaussian'; got {likelihood!r}")
        if sigma <= 0 or beta < 0 or min(importance, samples, eval_samples) < 1:
            raise ValueError(
                f"VAE: sigma must be positive, beta not negative, and importance, samples and eval_samples at least 1; got "
                f"{sigma}, {beta}, {importance}, {samples}, {eval_samples}"
            )
        self.decoder = decoder.requires_grad_(not freeze_decoder)
        self.posterior, self.likelihood, self.sigma, self.beta = posterior, likelihood, sigma, beta
        self.importance, self.samples, self.eval_samples = importance, samples, eval_samples
        self.height = height
        points = SobolEngine(posterior.latent).draw(importance * max(samples, eval_samples))
        self.register_buffer("sobol", points, persistent=False)
        self.evidence = evidence
        if importance > 1:
            self.objective_name = f"negative bound of {importance} draws (nats)"

    def support(self) -> constraints.Constraint:
        """Of the pixels' likelihood: ``[0, 1]`` or all real numbers."""
        return constraints.unit_interval if self.likelihood == "bernoulli" else constraints.real

    def initial(self, a: Context) -> Tensor:
        """The prior."""
        return torch.zeros(num_rows(a), self.posterior.features, dtype=a.dtype, device=a.device)

    def objective(self, b: Tensor, a: Context) -> Tensor:
        draws = self.importance * (self.samples if self.training else self.eval_samples)
        # In bfloat16 points near 1 would be 1, and their noise infinite.
        exact = torch.promote_types(b.dtype, torch.float32)
        shift = torch.rand(num_rows(b), self.posterior.latent, dtype=exact, device=b.device)
        points = (self.sobol[:draws, None].to(exact) + shift).frac().clamp(1e-6, 1 - 1e-6)
        z, log_q = self.posterior.draw(b, torch.special.ndtri(points).to(b.dtype))
        distortion = self.distortion(z, a)
        divergence = self.posterior.divergence(b) if self.importance == 1 else None
        if divergence is not None:
            return distortion.mean(0) + self.beta * divergence
        log_weights = self.beta * (standard_normal(z) - log_q) - distortion
        return math.log(self.importance) - log_weights.unflatten(
            0, (draws // self.importance, self.importance)
        ).logsumexp(1).mean(0)

    def optimum(self, a: Context) -> Tensor | None:
        """``-log p(a)``, estimated, ``(B,)``; ``None`` without an ``evidence`` to estimate it by."""
        return None if self.evidence is None else -self.evidence(self, a)

    def distortion(self, z: Tensor, a: Context) -> Tensor:
        """``-log p(a | z)`` in nats, ``(S, B)`` for ``z`` ``(S, B, latent)``."""
        pixels = self.decoder(z.flatten(0, 1)).unflatten(0, z.shape[:2])
        target = a.expand_as(pixels)
        if self.likelihood == "bernoulli":
            return binary_cross_entropy_with_logits(pixels, target, reduction="none").sum(-1)
        square = mse_loss(pixels, target, reduction="none").sum(-1)
        return 0.5 * square / self.sigma**2 + 0.5 * a.shape[-1] * math.log(2 * math.pi * self.sigma**2)

    def images(self, z: Tensor) -> Tensor:
        """The mean image of each ``z``, ``(n, pixels)``."""
        pixels: Tensor = self.decoder(z)
        return pixels.sigmoid() if self.likelihood == "bernoulli" else pixels

    def decode(self, b: Tensor, a: Context) -> Distribution:
        """The posterior ``q(z)`` of each image."""
        return self.posterior.distribution(b)

    def draw(self, a: Context, solutions: dict[str, Tensor]) -> Figure:
        """Images, reconstructions from each solution's mean and from a draw, a walk between images, and samples."""
        from matplotlib.figure import Figure

        means = {name: self.decode(b, a).mean for name, b in solutions.items()}
        noise = torch.randn(1, len(a), self.posterior.latent, generator=torch.Generator().manual_seed(0)).to(a)
        rows = {"image": a}
        for name, b in solutions.items():
            rows[f"{name}:\nmean"] = self.images(means[name])
            rows[f"{name}:\na draw"] = self.images(self.posterior.draw(b, noise)[0][0])
        if solutions:
            z = next(iter(means.values()))
            share = torch.linspace(0, 1, len(a), device=z.device, dtype=z.dtype)[:, None]
            rows["first to\nlast"] = self.images(torch.lerp(z[:1], z[-1:], share))
        rows["prior"] = self.images(noise[0])
        figure = Figure(figsize=(0.9 * len(a) + 0.8, 0.95 * len(rows)), layout="constrained")
        show_lines(figure.subplots(), rows, self.height)
        return figure


class GeneratedImages(ContextDataModule):
    """Draws of ``p(a)``, without end: ``z ~ N(0, I)``, decoded, and Bernoulli or Gaussian pixels ``(B, pixels)`` drawn.

    With ``VAE(decoder=..., freeze_decoder=True)`` of the same decoder this is inference alone, for a given model (Shu 2017).

    Args:
        decoder: of the model, usually :class:`~amortized.Pretrained`.
        latent: dimension of z.
        likelihood: of a pixel, ``"bernoulli"`` or ``"gaussian"``.
        sigma: of Gaussian pixels.
        **kwargs: see :class:`~amortized.ContextDataModule`.
    """

    def __init__(
        self,
        decoder: nn.Module,
        latent: int,
        likelihood: Literal["bernoulli", "gaussian"] = "bernoulli",
        sigma: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.decoder, self.latent, self.likelihood, self.sigma = decoder.eval(), latent, likelihood, sigma

    @torch.no_grad()
    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        device = generator.device
        pixels: Tensor = self.decoder.to(device)(torch.randn(n, self.latent, generator=generator, device=device))
        if self.likelihood == "bernoulli":
            return torch.bernoulli(pixels.sigmoid(), generator=generator)
        return pixels + self.sigma * torch.randn(pixels.shape, generator=generator, device=device)
