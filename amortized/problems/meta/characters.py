"""Tasks of telling characters apart: glyphs drawn from matplotlib's fonts, and handwriting (Omniglot) from a file.

Both are images of characters, each in several hands: the styles of a font family, or people. A task has N characters of an
alphabet group that training never saw.
"""

from __future__ import annotations

import abc
import functools
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample
from torch.utils.data import Dataset

from amortized.contexts.data_module import ContextDataModule
from amortized.contexts.images import find, folders
from amortized.contract import ProblemError, stream_seed

SIDE = 28
"""Of the images, in pixels."""


class CharacterTask(NamedTuple):
    """B tasks of N characters: K examples of each, and Q further images of each to classify."""

    support_x: Tensor
    """``(B, N K, 28, 28)``, ink is 1."""
    support_y: Tensor
    """Which of the N, ``(B, N K)``."""
    query_x: Tensor
    """``(B, N Q, 28, 28)``."""
    query_y: Tensor
    """``(B, N Q)``."""


class CharacterTasks(ContextDataModule, abc.ABC):
    """N-way K-shot tasks of characters, without end for training; a subclass has the :meth:`images` of each split.

    In training a character turned by a right angle is another character, and every image is turned, sheared, scaled and
    moved a little. Evaluation tasks are as the images are, each with a stream of its own.

    Args:
        ways: N, characters in a task.
        shots: K, examples of each.
        queries: Q, further images of each.
        train_ways: characters in a training task, N unless it is given; the model has as many classes. More make each image
            of a batch tell more: training is against all of them, evaluation stays as it is.
        distortion: of training images: 1 turns and shears by up to 0.3, scales by 20 %, moves by 2 pixels; 0: none.
        **kwargs: see :class:`~amortized.ContextDataModule`.

    Raises:
        ValueError: if a number is out of its range.
    """

    def __init__(
        self,
        ways: int = 5,
        shots: int = 1,
        queries: int = 5,
        distortion: float = 1.0,
        train_ways: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if train_ways is not None and train_ways < ways:
            raise ValueError(f"data.train_ways must be at least data.ways, {ways}; got {train_ways}")
        for name, least in (("ways", 2), ("shots", 1), ("queries", 1), ("distortion", 0)):
            if locals()[name] < least:
                raise ValueError(f"data.{name} must be at least {least}; got {locals()[name]}")
        self.ways, self.shots, self.queries, self.distortion = ways, shots, queries, distortion
        self.train_ways = ways if train_ways is None else train_ways

    @abc.abstractmethod
    def images(self, split: str) -> Tensor:
        """Bytes ``(characters, hands, 28, 28)``, ink high."""

    @functools.cached_property
    def training_images(self) -> Tensor:
        """The training characters, turned by 0, 1, 2 and 3 right angles."""
        return torch.cat([self.images("train").rot90(k, (2, 3)) for k in range(4)])

    def sample(self, n: int, generator: torch.Generator) -> CharacterTask:
        if self.training_images.device != generator.device:
            self.training_images = self.training_images.to(generator.device)
        a = self.draw_tasks(self.training_images, n, generator, self.train_ways)
        if not self.distortion:
            return a
        return a._replace(support_x=self.distort(a.support_x, generator), query_x=self.distort(a.query_x, generator))

    def contexts(self, split: str) -> _Tasks | None:
        return None if split == "train" else _Tasks(self, self.images(split), split, self.num_rows[split])

    def draw_tasks(self, images: Tensor, n: int, generator: torch.Generator, ways: int) -> CharacterTask:
        """Tasks of ``ways`` characters, from those of images ``(C, hands, 28, 28)``; no image is in a task twice."""
        characters, hands = images.shape[:2]
        each = self.shots + self.queries
        if characters < ways or hands < each:
            raise ProblemError(
                f"{type(self).__name__} has {characters} characters in {hands} hands; tasks of {ways} with {self.shots} + "
                f"{self.queries} images each need more: lower data.ways, data.shots or data.queries"
            )
        options: Any = {"generator": generator, "device": generator.device}
        which = torch.rand(n, characters, **options).topk(ways).indices
        hand = torch.rand(n, ways, hands, **options).topk(each).indices
        drawn = images[which.unsqueeze(2), hand].float() / 255
        label = torch.arange(ways, device=generator.device).view(1, -1, 1).expand(n, -1, each)
        (support_x, query_x), (support_y, query_y) = (
            (part.flatten(1, 2) for part in whole.split([self.shots, self.queries], 2)) for whole in (drawn, label)
        )
        return CharacterTask(support_x, support_y, query_x, query_y)

    def distort(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Images ``(B, K, 28, 28)``, each under an affine map of its own that is near the identity."""
        many = x.flatten(0, 1).unsqueeze(1)
        u = self.distortion * (2 * torch.rand(6, len(many), generator=generator, device=generator.device) - 1)
        turn, shear, wide, high, right, down = u * u.new_tensor([0.3, 0.3, 0.2, 0.2, 0.15, 0.15]).unsqueeze(1)
        cos, sin = turn.cos(), turn.sin()
        rows = [(1 + wide) * cos, shear - sin, right, (1 + high) * sin, (1 + high) * cos, down]
        grid = affine_grid(torch.stack(rows, 1).unflatten(1, (2, 3)), list(many.shape), align_corners=False)
        return grid_sample(many, grid, align_corners=False).view_as(x)


class _Tasks(Dataset):
    """The evaluation tasks of a split, each drawn when it is asked for: the images of all of them would fill the memory."""

    def __init__(self, data: CharacterTasks, images: Tensor, split: str, rows: int) -> None:
        self.data, self.images, self.split, self.rows = data, images, split, rows

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, row: int) -> CharacterTask:
        generator = torch.Generator().manual_seed(stream_seed(self.data.seed, self.split, row))
        return CharacterTask(*(leaf[0] for leaf in self.data.draw_tasks(self.images, 1, generator, self.data.ways)))


class Omniglot(CharacterTasks):
    """Handwritten characters of ``omniglot_small_28.npz``: 242 of 8 alphabets by 20 people.

    Training has Greek, Japanese (katakana), Korean, Latin and Sanskrit (179 characters, 716 with those turned),
    validation Tagalog (17), the test Balinese and Early Aramaic (46). Drawings are :func:`framed`. The file is looked
    for in the folder ``omniglot`` of the directory that the environment variable ``AMORTIZED_DATA`` names, and of
    ``~/.cache/amortized``: ``images`` ``(C, 20, 28, 28)`` bytes with ink high, and ``alphabet`` ``(C,)``.

    Source: Lake, Salakhutdinov & Tenenbaum (2015), *Human-level concept learning through probabilistic program induction*.

    Args:
        root: directory of the file, or of that folder; given one, no other is looked at.
        **kwargs: see :class:`CharacterTasks`.
    """

    free_to_resume = (*ContextDataModule.free_to_resume, "root")
    HELD_OUT: ClassVar = {"val": ("Tagalog",), "test": ("Balinese", "Early_Aramaic")}
    FILE = "omniglot_small_28.npz"

    def __init__(self, root: str | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.root = root

    def images(self, split: str) -> Tensor:
        import numpy as np

        path = find("omniglot", self.FILE, self.root)
        if path is None:
            raise ProblemError(
                f"no {self.FILE} in {', '.join(map(str, folders('omniglot', self.root)))}: put it there, or name its directory "
                "with data.root or the environment variable AMORTIZED_DATA; the recipe glyphs needs no file"
            )
        try:
            with np.load(path, allow_pickle=False) as file:
                images, alphabet = file["images"], file["alphabet"]
        except Exception as error:  # numpy, zipfile and zlib have one for every kind of damage
            raise ProblemError(f"{path} is no readable .npz file with arrays 'images' and 'alphabet'") from error
        held = np.isin(alphabet, [name for part in self.HELD_OUT.values() for name in part])
        chosen = ~held if split == "train" else np.isin(alphabet, self.HELD_OUT[split])
        return framed(torch.from_numpy(images[chosen]))


def framed(images: Tensor) -> Tensor:
    """Drawings with their ink around the middle and of one size, as those of MNIST are; bytes ``(C, hands, side, side)``.

    The root mean square distance of the ink from its mean becomes 0.45 half widths, by a factor between 0.77 and 2.
    """
    x = images.flatten(0, 1).unsqueeze(1).float()
    place = (2 * torch.arange(x.shape[-1]) + 1) / x.shape[-1] - 1
    ink = x.sum((1, 2, 3)).clamp(min=1)
    columns, rows = x.sum((1, 2)), x.sum((1, 3))
    right, down = ((part * place).sum(1) / ink for part in (columns, rows))
    apart = (columns * (place - right.unsqueeze(1)) ** 2 + rows * (place - down.unsqueeze(1)) ** 2).sum(1) / ink
    factor, zero = (apart.sqrt() / 0.45).clamp(0.5, 1.3), torch.zeros_like(ink)
    maps = torch.stack([factor, zero, right, zero, factor, down], 1).unflatten(1, (2, 3))
    moved = grid_sample(x, affine_grid(maps, list(x.shape), align_corners=False), align_corners=False)
    return moved.round().byte().view_as(images)


class Glyphs(CharacterTasks):
    """Letters in the 12 styles of the DejaVu fonts that come with matplotlib: sans, mono and serif, bold and slanted.

    Training has Latin and Cyrillic letters, validation Greek ones, the test Armenian and Georgian. Letters with
    accents, and those that look like one before them, are left out. Nothing is read but the fonts.
    """

    SCRIPTS: ClassVar = {"train": ("LATIN", "CYRILLIC"), "val": ("GREEK",), "test": ("ARMENIAN", "GEORGIAN")}

    def images(self, split: str) -> Tensor:
        return glyphs(self.SCRIPTS[split])


@functools.cache
def glyphs(scripts: tuple[str, ...]) -> Tensor:
    """The letters of some scripts in all styles of DejaVu, bytes ``(letters, 12, 28, 28)``, centred, all of one size of type."""
    import unicodedata
    from pathlib import Path

    import matplotlib
    import numpy as np
    from fontTools.ttLib import TTFont
    from PIL import Image, ImageDraw, ImageFont

    folder = Path(matplotlib.get_data_path(), "fonts", "ttf")
    paths = sorted(path for path in folder.glob("DejaVuS*.ttf") if "Display" not in path.name)
    letters = set.intersection(*(set(TTFont(path, lazy=True).getBestCmap()) for path in paths))
    fonts = [ImageFont.truetype(str(path), 24) for path in paths]
    found: dict[bytes, np.ndarray] = {}
    for letter in map(chr, sorted(letters)):
        script = unicodedata.name(letter, "").split(" ")[0]
        if (
            script not in scripts
            or unicodedata.category(letter) not in ("Lu", "Ll")
            or unicodedata.decomposition(letter)
        ):
            continue
        styles = []
        for font in fonts:
            page = Image.new("L", (SIDE, SIDE))
            left, top, right, bottom = font.getbbox(letter)
            ImageDraw.Draw(page).text(((SIDE - left - right) / 2, (SIDE - top - bottom) / 2), letter, 255, font)
            styles.append(np.asarray(page))
        drawn = np.stack(styles)
        found.setdefault(drawn.tobytes(), drawn)
    return torch.from_numpy(np.stack(list(found.values())))
