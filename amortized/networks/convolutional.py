"""Convolutional networks on square grey images, flat on the outside as contexts and solutions are."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import affine_grid, grid_sample

from amortized.networks.mlp import ACTIVATIONS


class ConvEncoder(nn.Sequential):
    """Strided convolutions, then a linear layer: ``(B, side * side) -> (B, out_features)``.

    Args:
        side: of the images, in pixels.
        out_features: numbers in one solution.
        channels: of the layers, each of which halves the side.
        activation: as for :class:`~amortized.networks.MLP`.
    """

    def __init__(
        self, side: int, out_features: int, channels: Sequence[int] = (32, 64), activation: str = "silu"
    ) -> None:
        layers: list[nn.Module] = [nn.Unflatten(1, (1, side, side))]
        for inward, outward in zip([1, *channels], channels, strict=False):
            layers += [nn.Conv2d(inward, outward, 4, 2, 1), ACTIVATIONS[activation]()]
            side //= 2
        super().__init__(*layers, nn.Flatten(), nn.Linear(channels[-1] * side * side, out_features))


class ConvBlocks(nn.Sequential):
    """Blocks of 3 x 3 convolution, normalisation and max-pooling, then a linear layer: ``(B, side, side) -> (B, out_features)``.

    The usual network of few-shot classification, with a normalisation that keeps rows apart.

    Source: Vinyals et al. (2016), *Matching networks for one shot learning*; Wu & He (2018), *Group normalization*.

    Args:
        side: of the images, in pixels; flat ones ``(B, side * side)`` will do.
        out_features: numbers that come out.
        channels: of the blocks, multiples of ``groups``; each block halves the side.
        groups: of the normalisation.
        activation: as for :class:`~amortized.networks.MLP`.
        views: in evaluation, what goes into the linear layer is the mean over nine :class:`Views` of the image, at nine times the
            cost: it then depends less on how the image is turned and scaled. In training it is that of the image alone.
    """

    def __init__(
        self,
        side: int,
        out_features: int,
        channels: Sequence[int] = (16, 32, 64, 64),
        groups: int = 8,
        activation: str = "silu",
        views: bool = False,
    ) -> None:
        layers: list[nn.Module] = [nn.Flatten(), nn.Unflatten(1, (1, side, side))]
        if views:
            layers.append(Views())
        for inward, outward in zip([1, *channels], channels, strict=False):
            layers += [
                nn.Conv2d(inward, outward, 3, padding=1),
                nn.GroupNorm(groups, outward),
                ACTIVATIONS[activation](),
                nn.MaxPool2d(2),
            ]
            side //= 2
        layers.append(nn.Flatten())
        if views:
            layers.append(MeanOfViews())
        super().__init__(*layers, nn.Linear(channels[-1] * side * side, out_features))


class Views(nn.Module):
    """Images ``(B, 1, side, side)`` as they are, turned, scaled, stretched and sheared, each of 9 ways: ``(9 B, 1, side, side)``.

    In training it leaves them as they are, where :class:`MeanOfViews` does too.
    """

    COUNT = 9
    maps: Tensor

    def __init__(self) -> None:
        super().__init__()
        c, s = math.cos(0.2), math.sin(0.2)
        maps = [(1, 0, 0, 1), (c, -s, s, c), (c, s, -s, c), (0.85, 0, 0, 0.85), (1.2, 0, 0, 1.2)]
        maps += [(0.8, 0, 0, 1), (1, 0, 0, 0.8), (1, 0.25, 0, 1), (1, -0.25, 0, 1)]
        self.register_buffer("maps", torch.tensor([(p, q, 0, r, t, 0) for p, q, r, t in maps]).view(-1, 2, 3), False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training or not len(x):
            return x
        many = x.repeat_interleave(self.COUNT, 0)
        maps = self.maps.to(x.dtype).repeat(len(x), 1, 1)
        return grid_sample(many, affine_grid(maps, list(many.shape), align_corners=False), align_corners=False)


class MeanOfViews(nn.Module):
    """``(9 B, D) -> (B, D)``, the mean of what was made of an image's :class:`Views`; in training ``(B, D)`` as they are."""

    def forward(self, x: Tensor) -> Tensor:
        return x if self.training else x.view(len(x) // Views.COUNT, Views.COUNT, x.shape[1]).mean(1)


class ConvDecoder(nn.Sequential):
    """The mirror image: a linear layer, then transposed convolutions, ``(n, latent) -> (n, side * side)``.

    Args:
        latent: dimension of z.
        side: of the images, a multiple of ``2 ** len(channels)``.
        channels: of the layers, each of which doubles the side.
        activation: as for :class:`~amortized.networks.MLP`.
    """

    def __init__(self, latent: int, side: int, channels: Sequence[int] = (64, 32), activation: str = "silu") -> None:
        start, rest = divmod(side, 2 ** len(channels))
        if rest:
            raise ValueError(
                f"ConvDecoder: side must be a multiple of {2 ** len(channels)} for {len(channels)} layers; got {side}"
            )
        layers: list[nn.Module] = [
            nn.Linear(latent, channels[0] * start * start),
            ACTIVATIONS[activation](),
            nn.Unflatten(1, (channels[0], start, start)),
        ]
        for inward, outward in zip(channels, [*channels[1:], 1], strict=True):
            layers += [nn.ConvTranspose2d(inward, outward, 4, 2, 1), ACTIVATIONS[activation]()]
        super().__init__(*layers[:-1], nn.Flatten())
