r"""Style transfer: a photograph in the hand of a painting, for any photograph and any painting.

With ``F`` the content features of a frozen network, ``mu_l`` and ``C_l`` the means and covariances of its style layers, a
photograph c and a painting s, the image ``b`` minimizes

    ``L(b; c, s) = w_c ||F(b) - F(c)||^2 / ||F(c) - mean||^2``
    ``  + w_s sum_l [ ||mu_l(b) - mu_l(s)||^2 / tr C_l(s) + ||C_l(b) - C_l(s)||^2 / ||C_l(s)||^2 ]``
    ``  + w_t TV(b) + w_r mean(dist(b, [0, 1])^2)``:

perceptual losses (Gatys, Ecker & Bethge 2016), each relative to its target, so that all paintings weigh alike. ``b`` holds
unbounded pixels, which the last term draws into [0, 1]. A network amortizes it (Johnson, Alahi & Fei-Fei 2016), for
paintings it has never seen (Ghiasi et al. 2017; Huang & Belongie 2017); as amortized optimization: Shu (2017).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from amortized.contract import Context, ProblemError
from amortized.module import AmortizedModule
from amortized.problems.style.features import EfficientNetLite0, FeatureNetwork
from amortized.problems.style.images import (
    write_image,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class StylePair(NamedTuple):
    """A photograph and a painting, with what the objective asks of both, computed once."""

    content: Tensor
    """``(B, 3, H, W)`` in [0, 1]."""
    style: Tensor
    """``(B, 3, h, w)`` in [0, 1]."""
    target: Tensor
    """Content features of ``content``."""
    statistics: Tensor
    """Style statistics of ``style``, or a mixture of those of several paintings."""
    strength: Tensor
    """``(B,)``: how far the prediction goes from the content, 0, to the stylised image, 1."""


class StyleDraw(NamedTuple):
    """Images to train on, before the frozen network has seen them."""

    content: Tensor
    """``(B, 3, H, W)`` in [0, 1]."""
    style: Tensor
    """``(B / 2, 3, h, w)``, one for two photographs: its statistics take longest."""
    share: Tensor
    """``(B / 2, 1)``: how much of the style before is mixed into this one."""


class StyleTransfer(AmortizedModule):
    """Solutions ``(B, 3, H, W)``: pixels, in [0, 1] but for a penalty.

    Args:
        network: ``(content, statistics, strength) -> (B, 3, H, W)``, such as :class:`~amortized.networks.Stylization`.
        features: the frozen network; that of the contexts. ``None``: :class:`~amortized.networks.EfficientNetLite0`.
        content: weight w_c.
        style: weight w_s.
        smoothness: weight w_t of the total variation, smoothed over steps of 0.02.
        range: weight w_r.
        **kwargs: see :class:`~amortized.AmortizedModule`.
    """

    objective_name = "perceptual loss"

    def __init__(
        self,
        network: nn.Module,
        features: FeatureNetwork | None = None,
        content: float = 1.0,
        style: float = 1.0,
        smoothness: float = 3.0,
        range: float = 30.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(network, **kwargs)
        self.features = features if features is not None else EfficientNetLite0()
        self.content, self.style, self.smoothness, self.range = content, style, smoothness, range

    def objective(self, b: Tensor, a: Context) -> Tensor:
        if a.statistics.shape[1] != sum(c + c * c for c in self.features.channels):
            raise ProblemError(
                f"the contexts are of another feature network than {type(self.features).__name__}, whose style layers have "
                f"{self.features.channels} channels: give the data the same `features` as the model"
            )
        return torch.stack(list(self.terms(b, a).values())).sum(0)

    def terms(self, b: Tensor, a: Context) -> dict[str, Tensor]:
        """The four weighted terms of the objective, each ``(B,)``."""
        seen = self.features(b)
        spread = _mean((a.target - a.target.mean((1, 2, 3), keepdim=True)).square())
        content = _mean((seen.content - a.target).square()) / (spread + FLOOR)
        style = torch.zeros_like(content)
        layers = zip(self.features.layers(seen.style), self.features.layers(a.statistics), strict=True)
        for (mean, covariance), (mean_s, covariance_s) in layers:
            floor = FLOOR * mean.shape[1]
            spread = covariance_s.diagonal(dim1=1, dim2=2).sum(1)
            style = style + (mean - mean_s).square().sum(1) / (spread + floor)
            off = (covariance - covariance_s).square().sum((1, 2))
            style = style + off / (covariance_s.square().sum((1, 2)) + floor**2)
        # An image one pixel high or wide is as smooth as two equal lines.
        lines = pad(b, (0, b.shape[3] == 1, 0, b.shape[2] == 1), mode="replicate") if 1 in b.shape[2:] else b
        corner = lines[..., :-1, :-1]
        slope = (lines[..., 1:, :-1] - corner).square() + (lines[..., :-1, 1:] - corner).square()
        outside = (b - b.clamp(0, 1)).square()
        return {
            "content": self.content * content,
            "style": self.style * style,
            "smoothness": self.smoothness * (_mean((slope + SMOOTH**2).sqrt()) - SMOOTH),
            "range": self.range * _mean(outside),
        }

    def initial(self, a: Context) -> Tensor:
        """The content image."""
        return a.content.clone()

    def decode(self, b: Tensor, a: Context) -> Tensor:
        """The image ``(B, 3, H, W)``, in [0, 1]."""
        return b.clamp(0, 1)

    def save(self, decoded: Tensor, paths: list[Path]) -> list[Path]:
        files = [path.with_name(f"{path.name}.png") for path in paths]
        for image, file in zip(decoded, files, strict=True):
            write_image(image, file)
        return files

    def draw(self, a: Context, solutions: dict[str, Tensor]) -> Figure:
        """A contact sheet: content, style and each solution, a pair in each column."""
        from matplotlib.figure import Figure

        rows = {"content": a.content, "style": a.style, **{k: self.decode(b, a) for k, b in solutions.items()}}
        figure = Figure(figsize=(1.5 * len(a.content) + 0.3, 1.55 * len(rows)), layout="constrained")
        for line, (name, images) in zip(
            figure.subplots(len(rows), len(a.content), squeeze=False), rows.items(), strict=True
        ):
            line[0].set_ylabel(name)
            for axes, image in zip(line, images.detach().cpu(), strict=True):
                axes.imshow(image.permute(1, 2, 0).numpy(), vmin=0, vmax=1)
                axes.set(xticks=[], yticks=[])
        return figure


SMOOTH = 0.02
"""Differences of neighbouring pixels that count as small, for the total variation."""

FLOOR = 0.05
"""Variance of an activation that counts as none: what a flat image or painting is measured by. Paintings have about 1."""


def _mean(x: Tensor) -> Tensor:
    return x.flatten(1).mean(1)
