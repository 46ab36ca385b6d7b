"""Photographs and paintings in pairs, for training without end and for evaluation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from amortized.contexts.data_module import ContextDataModule
from amortized.contract import Context, ProblemError, take
from amortized.problems.style.features import EfficientNetLite0, FeatureNetwork, Seen
from amortized.problems.style.images import (
    ImageList,
    centre,
    crop,
    draw_index,
    image_folder,
    photographs,
    pixels,
    textures,
)
from amortized.problems.style.transfer import StyleDraw, StylePair


class StylePairs(ContextDataModule):
    """All pairs of a folder of photographs and one of paintings; some of both are held out of training.

    Training pairs are random crops, the styles mirrored, recoloured and mixed, some of them photographs: a network that
    is to know any painting must see more than these. Evaluation pairs are the centres of held-out photographs with
    held-out paintings, all pairs of them, shuffled once.

    Without folders: pieces of the photographs of scikit-learn and matplotlib, and procedural textures.

    Args:
        content: folder of photographs, as given or under AMORTIZED_DATA; ``None``: embedded.
        style: folder of paintings, likewise.
        size: side of an evaluation image, in pixels.
        style_size: side of a style image in evaluation.
        train_sizes: sides of training crops, of which every batch has one; ``None``: ``size``.
        held_out: photographs and paintings for test; half as many (rounded down, at least one) are for validation.
        strength: of the style in predictions, 0 gives the content back.
        predict_style: with ``predict``, a folder or file of photographs: a folder or file of paintings, each for each.
        mix: in prediction, weights by which all those paintings are mixed into one style, in the order of their names.
        features: the frozen network; that of the module.
        **kwargs: see :class:`~amortized.ContextDataModule`.
    """

    free_to_resume = (*ContextDataModule.free_to_resume, "predict_style", "mix", "strength")

    def __init__(
        self,
        content: str | None = None,
        style: str | None = None,
        size: int = 64,
        style_size: int = 128,
        train_sizes: list[int] | None = None,
        held_out: tuple[int, int] = (4, 4),
        strength: float = 1.0,
        predict_style: str | None = None,
        mix: list[float] | None = None,
        features: FeatureNetwork | None = None,
        batch_size: int = 8,
        num_val: int = 1024,
        num_test: int = 1024,
        eval_batch_size: int = 8,
        **kwargs: Any,
    ) -> None:
        super().__init__(batch_size, num_val, num_test, eval_batch_size, **kwargs)
        self.folders, self.held_out = (content, style), held_out
        self.size, self.style_size, self.train_sizes = size, style_size, train_sizes or [size]
        self.strength, self.predict_style, self.mix = strength, predict_style, mix
        self.features = features if features is not None else EfficientNetLite0()
        self._images: dict[str, tuple[ImageList, ImageList]] = {}
        self._statistics: list[Tensor] = []
        if mix is not None and predict_style is None:
            raise ValueError("data.mix mixes the paintings of data.predict_style: name their folder")
        if predict_style is not None and self.predict is None:
            raise ValueError("data.predict_style needs data.predict, the photographs to stylise: a folder or a file")
        if predict_style is None and self.predict is not None and not self.predict.endswith((".pt", ".npz")):
            raise ValueError(
                f"to stylise {self.predict} name the paintings too: data.predict_style, a folder or a file"
            )

    # ---- images

    def images(self, split: str) -> tuple[ImageList, ImageList]:
        """The photographs and paintings of a split; who is in which does not depend on the seed."""
        if split not in self._images:
            content, style = self.folders
            photos = image_folder(content, short=3 * self.size) if content else photographs()
            paintings = image_folder(style, short=3 * self.style_size) if style else textures(24)
            parts = (_split(images, n) for images, n in zip((photos, paintings), self.held_out, strict=True))
            self._images |= dict(zip(("test", "val", "train"), zip(*parts, strict=True), strict=True))
        return self._images[split]

    def see(self, images: Tensor, moments: bool = True) -> Seen:
        """What the frozen network sees in images ``(B, 3, H, W)`` in [0, 1]."""
        with torch.no_grad():
            seen: Seen = self.features.to(images.device)(images, moments)
        return seen

    def pair(self, content: Tensor, style: Tensor, strength: float = 1.0) -> StylePair:
        """The context of images ``(B, 3, H, W)`` and ``(B, 3, h, w)`` in [0, 1]."""
        target, statistics = self.see(content, moments=False).content, self.see(style).style
        return StylePair(content, style, target, statistics, content.new_full((len(content),), strength))

    # ---- prediction: every photograph, whole, with every painting

    def _given(self) -> tuple[ImageList, ImageList]:
        if "predict" not in self._images:
            assert self.predict is not None
            assert self.predict_style is not None
            photos, paintings = image_folder(self.predict), image_folder(self.predict_style, short=self.style_size)
            if self.mix is not None and (len(self.mix) != len(paintings) or min(self.mix) < 0 or not sum(self.mix)):
                raise ProblemError(f"data.mix must be {len(paintings)} weights, one for each painting; got {self.mix}")
            self._images["predict"] = photos, paintings
        return self._images["predict"]

    def num_batches(self, split: str) -> int:
        if split != "predict" or self.predict_style is None:
            return super().num_batches(split)
        photos, paintings = self._given()
        return len(photos) * (len(paintings) if self.mix is None else 1)

    def names(self, split: str, number: int) -> list[str]:
        if split != "predict" or self.predict_style is None:
            return super().names(split, number)
        if number >= self.num_batches(split):
            return []
        photos, paintings = self._given()
        if self.mix is not None:
            return [f"{photos.names[number]}--mix"]
        photo, painting = divmod(number, len(paintings))
        return [f"{photos.names[photo]}--{paintings.names[painting]}"]

    def batch(self, split: str, number: int, device: torch.device | str = "cpu") -> Context:
        """As in the base class; in prediction a batch is one pair, of its own size."""
        if split != "predict" or self.predict_style is None:
            return super().batch(split, number, device)
        rows = int(number < self.num_batches(split))  # of a process with nothing to do: none
        photos, paintings = self._given()
        if not self._statistics:
            self._statistics = [self.see(pixels(painting).to(device)).style for painting in paintings]
        photo, painting = divmod(number * rows, len(paintings) if self.mix is None else 1)
        content, style = pixels(photos[photo]).to(device), pixels(paintings[painting]).to(device)
        statistics = self._statistics[painting]
        if self.mix is not None:
            weights = torch.tensor(self.mix, device=device) / sum(self.mix)
            statistics = torch.einsum("k,kbs->bs", weights, torch.stack(self._statistics))
        strength = torch.full((1,), self.strength, device=device)
        a = StylePair(content, style, self.see(content, moments=False).content, statistics, strength)
        return take(a, slice(0, rows))

    # ---- contexts

    def contexts(self, split: str) -> Context | None:
        if split == "train":
            return None
        photos, paintings = self.images(split)
        pairs = torch.cartesian_prod(torch.arange(len(photos)), torch.arange(len(paintings)))
        order = torch.randperm(len(pairs), generator=self._generator(split, 0))[: self.num_rows[split]]
        content = torch.stack([centre(photo, self.size) for photo in photos])
        style = torch.stack([centre(painting, self.style_size) for painting in paintings])
        target = torch.cat([self.see(x, moments=False).content for x in content.split(4)])
        statistics = torch.cat([self.see(x).style for x in style.split(4)])
        i, j = pairs[order].T
        return StylePair(content[i], style[j], target[i], statistics[j], torch.ones(len(order)))

    def sample(self, n: int, generator: torch.Generator) -> StyleDraw:
        photos, paintings = self.images("train")
        device = generator.device
        chance = torch.Generator().manual_seed(int(torch.randint(2**31, (), generator=generator, device=device)))
        size = self.train_sizes[draw_index(chance, len(self.train_sizes))]
        content = torch.stack(
            [crop(photos[draw_index(chance, len(photos))], size, self.size, chance) for _ in range(n)]
        )
        style = torch.stack([self._style(photos, paintings, chance) for _ in range(-(-n // 2))])
        share = torch.rand(len(style), 1, generator=chance) * (torch.rand(len(style), 1, generator=chance) < 0.3)
        return StyleDraw(content.to(device), style.to(device), share.to(device))

    def complete(self, drawn: StyleDraw) -> StylePair:
        content, style, share = drawn
        target, statistics = self.see(content, moments=False).content, self.see(style).style
        statistics = torch.lerp(statistics, statistics.roll(1, 0), share)
        twice = torch.arange(len(content), device=content.device) // 2
        return StylePair(content, style[twice], target, statistics[twice], content.new_ones(len(content)))

    def _style(self, photos: ImageList, paintings: ImageList, chance: torch.Generator) -> Tensor:
        source = photos if torch.rand((), generator=chance) < 0.25 else paintings
        image = crop(
            source[draw_index(chance, len(source))], self.style_size // 2, self.style_size, chance, scales=(0.5, 1.2)
        )
        if torch.rand((), generator=chance) < 0.3:
            image = image.mT
        if torch.rand((), generator=chance) < 0.5:
            image = image[torch.randperm(3, generator=chance)]
            gain, gamma = 0.6 + 0.8 * torch.rand(2, 3, 1, 1, generator=chance)
            image = (gain * (image + 1e-3) ** gamma).clamp(0, 1)
        return image


def _split(images: ImageList, test: int) -> tuple[ImageList, ImageList, ImageList]:
    """Test images, half as many for validation, and the others, to train on; the same for every seed."""
    val = max(1, test // 2)
    if len(images) <= test + val:
        raise ProblemError(f"of {len(images)} images {test} + {val} are held out: there are none to train on")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0)).tolist()
    return images.part(order[:test]), images.part(order[test : test + val]), images.part(order[test + val :])
