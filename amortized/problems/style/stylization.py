r"""A content encoder-decoder under the conditions of a style: what amortizes style transfer.

Every activation ``h`` of an image, with mean ``mu`` and standard deviation ``sigma`` over the image's positions, becomes

    ``gamma (h - mu) / sigma + beta``,

where scales ``gamma`` and shifts ``beta`` come from the style's statistics (conditional instance normalisation: Dumoulin,
Shlens & Kudlur 2017; Huang & Belongie 2017; of any style: Ghiasi et al. 2017). Before, the colours are moved to the mean and
covariance of the style's, which needs no learning; the network makes the change from there.

An image of any size is made exactly: at full resolution in tiles, whose moments are gathered first; the levels below, with a
quarter and a sixteenth of the positions, whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv_transpose2d, pad, relu

from amortized.problems.style.features import PIXELS, EfficientNetLite0, FeatureNetwork, by_layer
from amortized.problems.style.tiles import Tile, assemble, extended, tiles


class Stylization(nn.Module):
    """``(content image, style statistics) -> image``, for images of any size.

    Contexts have the fields ``content`` ``(B, 3, H, W)``, ``statistics`` ``(B, S)`` (means and covariances of a feature
    network's style layers, the pixels first, of a style image or a mixture of several) and ``strength`` ``(B,)``: 0 gives
    the content back.

    Args:
        channels: of the three levels, at 1, 1/2 and 1/4 of the resolution.
        blocks: residual blocks at 1/4 of the resolution.
        embedding: size of the style embedding.
        features: the feature network of the contexts; ``None``: :class:`~amortized.networks.EfficientNetLite0`.
        tile: without gradients, images of more than ``tile ** 2`` pixels are made in tiles of this side, with the same
            result; a multiple of 4.
        correlations: learned directions in each style layer whose correlations with each other the embedding sees.
    """

    typical: Tensor

    def __init__(
        self,
        channels: tuple[int, int, int] = (16, 32, 64),
        blocks: int = 4,
        embedding: int = 128,
        features: FeatureNetwork | None = None,
        tile: int = 512,
        correlations: int = 12,
    ) -> None:
        super().__init__()
        if tile % 4:
            raise ValueError(f"Stylization: tile must be a multiple of 4; got {tile}")
        self.tile = tile
        seen = features if features is not None else EfficientNetLite0()
        self.layers = layers = seen.channels
        self.register_buffer("typical", seen.typical.clone(), persistent=False)
        fine, middle, coarse = channels
        self.encoder = nn.ModuleList(
            [nn.Conv2d(6, fine, 3, 1, 1), nn.Conv2d(fine, middle, 4, 2, 1), nn.Conv2d(middle, coarse, 4, 2, 1)]
        )
        self.blocks = nn.ModuleList([nn.Conv2d(coarse, coarse, 3, 1, 1) for _ in range(2 * blocks)])
        self.up = nn.ModuleList([nn.Conv2d(coarse, middle, 3, 1, 1), nn.Conv2d(middle, fine, 3, 1, 1)])
        self.out = nn.Conv2d(fine, 3, 3, 1, 1)
        nn.init.normal_(self.out.weight, std=1e-4)  # at first it only moves the colours
        nn.init.zeros_(self.out.bias)  # type: ignore[arg-type]
        self.project = nn.ParameterList([nn.Parameter(torch.randn(c, correlations) / c**0.5) for c in layers])
        summary = 2 * sum(layers) + len(layers) * correlations**2
        self.embed = nn.Sequential(nn.Linear(summary, 2 * embedding), nn.SiLU(), nn.Linear(2 * embedding, embedding))
        self.look = nn.Linear(2 * sum(channels), embedding)
        self.sizes = [coarse, middle, fine] + [coarse] * (2 * blocks) + [middle, fine]
        self.condition = nn.Sequential(nn.SiLU(), nn.Linear(embedding, 2 * sum(self.sizes)))

    def forward(self, a: Any) -> Tensor:
        content, statistics, strength = a.content, a.statistics, a.strength
        height, width = content.shape[-2:]
        image = extended(content, 4)
        mean, covariance = statistics[:, :3] / PIXELS, statistics[:, 3:12].unflatten(1, (3, 3)) / PIXELS**2
        coloured = transport(image, mean, covariance)
        image = torch.cat([coloured, image], 1).contiguous(memory_format=torch.channels_last)
        made = (coloured + self._change(image, self.embed(self._summary(statistics))))[..., :height, :width]
        return torch.lerp(content, made, strength[:, None, None, None])

    def _change(self, image: Tensor, style: Tensor) -> Tensor:
        lines = tiles(image, self.tile, HALO)
        every = [tile for line in lines for tile in line]
        first: list[tuple[Tensor, Tensor, int]] = []

        def fine(tile: Tile) -> Tensor:
            return relu(self.encoder[0](2 * tile.of(image) - 1), inplace=True)

        # Of many tiles it is made anew where it is needed: all of them at once would not fit.
        x0 = fine(every[0]) if len(every) == 1 else None

        def half(tile: Tile) -> Tensor:
            x = fine(tile) if x0 is None else x0
            first.append(_sums(tile.inside(x)))
            return tile.inside(self.encoder[1](x))

        x1 = relu(assemble(lines, half))
        x2 = relu(self.encoder[2](x1), inplace=True)
        moments = [_moments([_sums(x2)]), _moments([_sums(x1)]), _moments(first)]
        seen = torch.cat([torch.cat(moment, 1) for moment in moments], 1)
        condition = self.condition(style + self.look(seen)).split([n for size in self.sizes for n in (size, size)], 1)
        affine = list(zip(condition[::2], condition[1::2], strict=True))

        x = _normalised(x2, moments[0], affine[0])
        for k in range(0, len(self.blocks), 2):
            h = relu(_normalised(self.blocks[k](x), None, affine[3 + k]), inplace=True)
            x = x + _normalised(self.blocks[k + 1](h), None, affine[4 + k])
        x = _of_doubled(self.up[0], x) + _normalised(x1, moments[1], affine[1])
        x = relu(_normalised(x, None, affine[-2]), inplace=True)

        def last(tile: Tile) -> Tensor:
            beside = fine(tile) if x0 is None else x0
            return _of_doubled(self.up[1], tile.of(x)) + _normalised(beside, moments[2], affine[2])

        def shown(x: Tensor, whole: tuple[Tensor, Tensor] | None) -> Tensor:
            made: Tensor = self.out(relu(_normalised(x, whole, affine[-1]), inplace=True))
            return made

        if len(every) == 1:
            return shown(last(every[0]), None)
        whole = _moments([_sums(tile.inside(last(tile))) for tile in every])
        return assemble(lines, lambda tile: tile.inside(shown(last(tile), whole)))

    def _summary(self, statistics: Tensor) -> Tensor:
        """What the embedding sees of the style layers.

        Means and logarithms of the standard deviations, relative to typical ones ``(B, 2 sum_l C_l)``, and correlations
        ``P^T R P`` along the learned directions P.
        """
        means, covariances = zip(*by_layer(statistics, self.layers), strict=True)
        variances = [C.diagonal(dim1=1, dim2=2).clamp(min=0) + 1e-4 for C in covariances]
        mean, deviation = self.typical + 1e-2
        found = [(torch.cat(means, 1) - mean) / deviation, (torch.cat(variances, 1).sqrt() / deviation).log()]
        for C, variance, P in zip(covariances, variances, self.project, strict=True):
            scaled = P * variance.rsqrt()[:, :, None]
            found.append((scaled.mT @ C @ scaled).flatten(1))
        return 3 * torch.cat(found, 1)


HALO = 8
"""Pixels around a tile that its inside depends on, at full resolution, and more than enough; a multiple of 4."""


def transport(image: Tensor, mean: Tensor, covariance: Tensor) -> Tensor:
    """Colours ``(B, 3, H, W)`` moved to a mean ``(B, 3)`` and a covariance ``(B, 3, 3)`` by the linear map that moves them least.

    With C the image's own covariance and S the other, ``x -> m + C^(-1/2) (C^(1/2) S C^(1/2))^(1/2) C^(-1/2) (x - mean(x))``:
    the optimal transport between Gaussians (Olkin & Pukelsheim 1982). Variances of less than 0.002 count as that.
    """
    with torch.no_grad():
        colours = image.flatten(2)
        own = colours.mean(2)
        centred = colours - own[:, :, None]
        C = centred @ centred.mT / colours.shape[2] + 0.002 * torch.eye(3, dtype=image.dtype, device=image.device)
        root = _power(C, 0.5)
        inverse = _power(C, -0.5)
        T = inverse @ _power(root @ covariance @ root, 0.5) @ inverse
    return ((T @ centred) + mean[:, :, None]).view(image.shape)


def _power(C: Tensor, exponent: float) -> Tensor:
    values, vectors = torch.linalg.eigh(C)
    return (vectors * values.clamp(min=1e-8)[:, None, :] ** exponent) @ vectors.mT


def _of_doubled(conv: Any, x: Tensor) -> Tensor:
    """A 3 x 3 convolution of ``x`` with every pixel doubled in both directions, in 4/9 of the products.

    Each output pixel sees only 2 x 2 pixels of x, with sums of the weights.
    """
    taps = pad(conv.weight, (1, 1, 1, 1))
    taps = taps[..., 1:, :] + taps[..., :-1, :]
    taps = taps[..., 1:] + taps[..., :-1]
    return conv_transpose2d(x, taps.flip(2, 3).transpose(0, 1), conv.bias, stride=2, padding=1)


def _sums(x: Tensor) -> tuple[Tensor, Tensor, int]:
    return x.sum((2, 3)), x.square().sum((2, 3)), x.shape[2] * x.shape[3]


def _moments(parts: Sequence[tuple[Tensor, Tensor, int]]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation ``(B, C)`` over the positions of all parts."""
    total, squares, n = (sum(part[1:], start=part[0]) for part in zip(*parts, strict=True))
    mean = total / n
    return mean, (squares / n - mean.square()).clamp(min=0).add(1e-4).sqrt()


def _normalised(x: Tensor, moments: tuple[Tensor, Tensor] | None, affine: tuple[Tensor, Tensor]) -> Tensor:
    """``gamma (x - mu) / sigma + beta``; the moments are those of x itself, unless given."""
    mean, deviation = _moments([_sums(x)]) if moments is None else moments
    gamma = (1 + affine[0]) / deviation
    beta = affine[1] - gamma * mean
    return torch.addcmul(beta[..., None, None], x, gamma[..., None, None])
