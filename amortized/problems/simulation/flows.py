"""Posteriors with the shape of a normalizing flow whose weights all contexts share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor, nn
from torch.distributions import Distribution

from amortized.posteriors import Posterior, standard_normal


class ConditionalFlow(Posterior):
    r"""``q(z; b) = N(T_c(z); 0, I) |det dT_c/dz|``, T an autoregressive flow whose networks see ``c = tanh b``.

    The flow's weights are parameters of the objective, as a VAE's decoder: they train jointly, and a solver moves only b.
    Since c is bounded, no b makes q sharper than those weights allow: ``min_b`` is a best use of this flow, no point mass.

    Source: Durkan et al. (2019), *Neural spline flows*; Papamakarios et al. (2017), *Masked autoregressive flow*, with the
    flows of zuko.

    Args:
        latent: dimension d of z.
        features: numbers in b.
        transforms: their number.
        hidden: widths of the hidden layers of each one's network.
        kind: ``"spline"``: each coordinate is moved by a monotonic spline; ``"affine"``: shifted and scaled.
        bins: of a spline, on (-5, 5); outside it leaves z as it is.
    """

    def __init__(
        self,
        latent: int,
        features: int = 16,
        transforms: int = 3,
        hidden: Sequence[int] = (64, 64),
        kind: Literal["spline", "affine"] = "spline",
        bins: int = 8,
    ) -> None:
        super().__init__(latent, features)
        if kind not in ("spline", "affine"):
            raise ValueError(f"ConditionalFlow: kind must be 'spline' or 'affine'; got {kind!r}")
        try:
            from zuko import flows
        except ImportError as error:
            raise ImportError("ConditionalFlow needs zuko: pip install '.[flows]' in the clone") from error
        options: dict[str, Any] = {"transforms": transforms, "hidden_features": list(hidden), "activation": nn.SiLU}
        self.flow = (
            flows.NSF(latent, features, bins=bins, **options)
            if kind == "spline"
            else flows.MAF(latent, features, **options)
        )

    def draw(self, b: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        if not len(b):
            return noise, standard_normal(noise)
        z, log_volume = self.flow(b.tanh()).transform.inv.call_and_ladj(noise)
        return z, standard_normal(noise) - log_volume

    def distribution(self, b: Tensor) -> Distribution:
        q: Distribution = self.flow(b.tanh())
        return q
