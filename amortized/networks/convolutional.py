"""Convolutional networks on square grey images, flat on the outside as contexts and solutions are."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

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
    """

    def __init__(
        self,
        side: int,
        out_features: int,
        channels: Sequence[int] = (16, 32, 64, 64),
        groups: int = 8,
        activation: str = "silu",
    ) -> None:
        layers: list[nn.Module] = [nn.Flatten(), nn.Unflatten(1, (1, side, side))]
        for inward, outward in zip([1, *channels], channels, strict=False):
            layers += [
                nn.Conv2d(inward, outward, 3, padding=1),
                nn.GroupNorm(groups, outward),
                ACTIVATIONS[activation](),
                nn.MaxPool2d(2),
            ]
            side //= 2
        super().__init__(*layers, nn.Flatten(), nn.Linear(channels[-1] * side * side, out_features))


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
