"""Labelled images: scikit-learn's digits, inside a package, or MNIST and Fashion-MNIST from files."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample, one_hot

from amortized.contexts.data_module import ContextDataModule
from amortized.contexts.images import LABELS, Images, handwritten_digits, unit
from amortized.problems.classification.problem import Labelled

GARMENTS = ("T-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
"""The classes of Fashion-MNIST."""


class LabelledDigits(ContextDataModule):
    """scikit-learn's 1,797 handwritten digits: 1,257 train, 180 validate, 360 test, the same whatever the seed.

    Training images are turned, scaled and shifted a little, anew each time.

    Args:
        smoothing: the share of probability spread evenly over the classes; positive, so that ``log p`` is finite.
        **kwargs: see :class:`~amortized.ContextDataModule`.
    """

    classes = tuple(map(str, range(10)))

    def __init__(self, smoothing: float = 0.05, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.smoothing = _share(smoothing)

    def contexts(self, split: str) -> Labelled:
        image, label = handwritten_digits(split)
        return Labelled(image, smoothed(label, self.smoothing))

    def augment(self, a: Labelled, generator: torch.Generator) -> Labelled:
        return a._replace(image=moved(a.image, generator))


class LabelledImages(Images):
    """MNIST or Fashion-MNIST with their labels: 50,000 images train, the last 10,000 of the training files validate, 10,000 test.

    Training images are turned, scaled and moved a little, anew each time, and with ``flip`` every second one is mirrored.
    Where files are looked for: :class:`~amortized.contexts.images.Images`.

    Args:
        dataset: which of the two.
        root: directory of the files, or of their folder; ``None``: the usual places.
        smoothing: the share of probability spread evenly over the classes; positive, so that ``log p`` is finite.
        distortion: of training images: 1 turns by up to 0.2, scales by up to 10 % and moves by up to 2 pixels; 0: none.
        flip: whether a mirrored image is of the same class: of garments yes, of digits no.
        num_val: validation images at most.
        num_test: test images at most.
        **kwargs: see :class:`~amortized.ContextDataModule`.
    """

    def __init__(
        self,
        dataset: Literal["mnist", "fashion-mnist"] = "mnist",
        root: str | None = None,
        smoothing: float = 0.01,
        distortion: float = 1.0,
        flip: bool = False,
        num_val: int = 10_000,
        num_test: int = 10_000,
        **kwargs: Any,
    ) -> None:
        if dataset not in LABELS:
            raise ValueError(f"LabelledImages: dataset must be one of {', '.join(LABELS)}; got {dataset!r}")
        super().__init__(dataset, root, binarise=False, num_val=num_val, num_test=num_test, **kwargs)
        if distortion < 0:
            raise ValueError(f"LabelledImages: distortion must not be negative; got {distortion}")
        self.smoothing, self.distortion, self.flip = _share(smoothing), distortion, flip

    @property
    def classes(self) -> tuple[str, ...]:
        """What the classes are called."""
        return GARMENTS if self.dataset == "fashion-mnist" else LabelledDigits.classes

    @property
    def files(self) -> tuple[str, ...]:
        return (*super().files, *LABELS[self.dataset])

    def contexts(self, split: str) -> Labelled:  # type: ignore[override]
        image = super().contexts(split)
        label = self.part(split, LABELS[self.dataset])
        return Labelled(image, smoothed(label[: len(image)], self.smoothing))

    def augment(self, a: Labelled, generator: torch.Generator) -> Labelled:  # type: ignore[override]
        return a._replace(image=moved(unit(a.image), generator, self.distortion, 2 * self.distortion, self.flip))


def smoothed(label: Tensor, share: float) -> Tensor:
    """The distributions ``(N, 10)`` of labels ``(N,)``, with that share of probability spread evenly."""
    return (1 - share) * one_hot(label.long(), 10) + share / 10


def moved(
    image: Tensor, generator: torch.Generator, distortion: float = 1.0, shift: float = 1.0, flip: bool = False
) -> Tensor:
    """Flat square images ``(B, pixels)``, each turned, scaled, moved by at most ``shift`` pixels and perhaps mirrored."""
    side = math.isqrt(image.shape[1])
    turn, scale, *offset = 2 * torch.rand(4, len(image), generator=generator, device=generator.device) - 1
    turn, scale = 0.2 * distortion * turn, 1 + 0.1 * distortion * scale
    cos, sin = scale * torch.cos(turn), scale * torch.sin(turn)
    right, down = (2 * shift / side * s for s in offset)  # in units of the image's half width
    theta = torch.stack([cos, -sin, right, sin, cos, down], 1).unflatten(1, (2, 3))
    if flip:
        mirror = torch.rand(len(image), generator=generator, device=generator.device) < 0.5
        theta[:, 0] = torch.where(mirror.unsqueeze(1), -theta[:, 0], theta[:, 0])
    square = image.view(-1, 1, side, side)
    grid = affine_grid(theta, list(square.shape), align_corners=False)
    return grid_sample(square, grid, align_corners=False).flatten(1)


def _share(smoothing: float) -> float:
    if not 0 < smoothing < 1:
        raise ValueError(f"smoothing must be in (0, 1), or the optimum would be infinite; got {smoothing}")
    return smoothing
