"""Large images in parts: what a convolutional network makes of a tile with a halo is, inside, what it makes of the whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad


class Tile(NamedTuple):
    """A part of an image ``(B, C, H, W)``."""

    read: tuple[slice, slice]
    """Rows and columns to read, with the halo."""
    core: tuple[slice, slice]
    """Those among them that belong to the tile."""
    size: tuple[int, int]
    """Of the whole image."""

    def of(self, x: Tensor) -> Tensor:
        """The tile with its halo, of the image or of what was computed from it at any resolution."""
        y, z = (
            slice(read.start * n // size, read.stop * n // size)
            for read, size, n in zip(self.read, self.size, x.shape[-2:], strict=True)
        )
        return x[..., y, z]

    def inside(self, x: Tensor) -> Tensor:
        """The tile without its halo, of what was computed from it at any resolution."""
        y, z = (
            slice(core.start * n // (read.stop - read.start), core.stop * n // (read.stop - read.start))
            for read, core, n in zip(self.read, self.core, x.shape[-2:], strict=True)
        )
        return x[..., y, z]


def extended(image: Tensor, multiple: int) -> Tensor:
    """The image with its last row and column repeated, up to a multiple of so many pixels."""
    below, right = (-n % multiple for n in image.shape[-2:])
    return pad(image, (0, right, 0, below), mode="replicate") if below or right else image


def tiles(image: Tensor, side: int, halo: int) -> list[list[Tile]]:
    """Lines of tiles that cover an image; one tile, where gradients are recorded or it has at most ``side ** 2`` pixels."""
    if torch.is_grad_enabled() or image.shape[-2] * image.shape[-1] <= side**2:
        side = max(image.shape[-2:])

    def spans(size: int) -> list[tuple[slice, slice]]:
        found = []
        for start in range(0, size, side):
            stop = min(start + side, size)
            low, high = max(start - halo, 0), min(stop + halo, size)
            found.append((slice(low, high), slice(start - low, stop - low)))
        return found

    size = image.shape[-2], image.shape[-1]
    columns = spans(size[1])
    return [[Tile((read_y, read_x), (y, x), size) for read_x, x in columns] for read_y, y in spans(size[0])]


def assemble(lines: list[list[Tile]], make: Callable[[Tile], Tensor]) -> Tensor:
    """The whole of what ``make`` gives for each tile without its halo."""
    return torch.cat([torch.cat([make(tile) for tile in line], -1) for line in lines], -2)
