r"""Amortized inference: one evidence lower bound for each image, the first use of the term (Kingma & Welling 2014).

For an image ``a`` the variational parameters ``b = (mu, log sigma)`` of ``q(z) = N(mu, sigma^2)`` minimize

    ``L(b; a) = E_{z ~ q} [ -log p(a | z) ] + KL(q || N(0, I))``,

the negative ELBO in nats. The encoder amortizes it; the decoder ``p(a | z)`` is a parameter of the objective, so it
trains jointly, and solvers move only ``b``. What the encoder loses against a solver is the amortization gap of
Cremer, Li & Duvenaud (2018).
"""

from __future__ import annotations

from typing import Any

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.distributions import Independent, Normal
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.quasirandom import SobolEngine

from amortized.contexts import ContextDataModule
from amortized.module import AmortizedModule
from amortized.problem import Context


class VAE(AmortizedModule):
    """A variational autoencoder with Bernoulli pixels. Solutions ``(B, 2, latent)``: means and log standard deviations.

    The expectation is estimated by randomised quasi-Monte Carlo: Sobol points, shifted at random for each image and each
    evaluation (Buchholz, Wenzel & Mandt 2018), ``samples`` of them while training and ``eval_samples`` in evaluation. It is
    unbiased, and a solver that searches with fixed draws cannot fit them as it would fit independent ones.

    Args:
        encoder: ``(B, pixels) -> (B, 2 * latent)``.
        decoder: ``(n, latent) -> (n, pixels)``, logits.
        latent: dimension of z.
        samples: draws for each image in a training step.
        eval_samples: draws for each image in evaluation.
        **kwargs: see :class:`~amortized.AmortizedModule`.
    """

    sobol: Tensor
    objective_name = "negative ELBO (nats)"

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        latent: int = 8,
        samples: int = 1,
        eval_samples: int = 32,
        **kwargs: Any,
    ) -> None:
        super().__init__(nn.Sequential(encoder, nn.Unflatten(1, (2, latent))), **kwargs)
        self.decoder = decoder
        self.samples, self.eval_samples = samples, eval_samples
        self.register_buffer("sobol", SobolEngine(latent).draw(max(samples, eval_samples)), persistent=False)

    def objective(self, b: Tensor, a: Context) -> Tensor:
        mu, log_sigma = b.unbind(1)
        points = self.sobol[: self.samples if self.training else self.eval_samples, None]
        uniform = (points + torch.rand_like(mu)).frac().clamp(1e-6, 1 - 1e-6)
        z = mu + log_sigma.exp() * torch.special.ndtri(uniform)
        logits = self.decoder(z.flatten(0, 1)).unflatten(0, z.shape[:2])
        distortion = binary_cross_entropy_with_logits(logits, a.expand_as(logits), reduction="none").sum(-1).mean(0)
        rate = 0.5 * (mu.square() + (2 * log_sigma).exp() - 1).sum(-1) - log_sigma.sum(-1)
        return distortion + rate

    def decode(self, b: Tensor, a: Context) -> Independent:
        """The posterior ``q(z)`` of each image."""
        mu, log_sigma = b.unbind(1)
        return Independent(Normal(mu, log_sigma.exp()), 1)

    def draw(self, a: Context, solutions: dict[str, Tensor]) -> Figure:
        """Images, and their reconstructions from each solution's mean."""
        rows = {"image": a, **{name: self.decoder(b[:, 0]).sigmoid() for name, b in solutions.items()}}
        side = round(a.shape[1] ** 0.5)
        figure = Figure(figsize=(0.9 * len(a) + 0.8, 0.95 * len(rows)), layout="constrained")
        for line, (name, images) in zip(figure.subplots(len(rows), len(a), squeeze=False), rows.items(), strict=True):
            line[0].set_ylabel(name)
            for axes, image in zip(line, images.cpu(), strict=True):
                axes.imshow(image.reshape(side, side).numpy(), cmap="gray_r", vmin=0, vmax=1)
                axes.set(xticks=[], yticks=[])
        return figure


class BinaryDigits(ContextDataModule):
    """scikit-learn's 1,797 handwritten digits, 8 x 8 pixels, binarised: anew each time in training, once for evaluation.

    1,257 train, 180 validate, 360 test; contexts ``(B, 64)`` of zeros and ones.
    """

    def contexts(self, split: str) -> Tensor:
        grey = torch.from_numpy(load_digits().data).float() / 16
        order = torch.randperm(len(grey), generator=torch.Generator().manual_seed(0))
        first, last = {"train": (0, 1257), "val": (1257, 1437), "test": (1437, 1797)}[split]
        chosen = grey[order[first:last]]
        return chosen if split == "train" else torch.bernoulli(chosen, generator=torch.Generator().manual_seed(first))

    def augment(self, a: Context, generator: torch.Generator) -> Tensor:
        return torch.bernoulli(a, generator=generator)
