"""Images from files: any mode, size and orientation in, ``(3, H, W)`` of 8 bits out; decoded when first used, and kept."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.nn.functional import interpolate

from amortized.contexts.data_module import data_roots
from amortized.contract import ProblemError

DEPTHS = (8, 10, 12, 14, 16)
"""Bits that cameras and scanners have for a pixel."""


def suffixes() -> set[str]:
    """Of the files that Pillow opens, lower case."""
    Image.init()
    return {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}


def read_image(path: str | Path, short: int | None = None) -> Tensor:
    """An image file as ``(3, H, W)``, uint8: turned as its EXIF says, grey made colour, transparency laid on white.

    Grey values of more than 8 bits are scaled by their range: integers by the least of 8, 10, 12, 14 and 16 bits that holds
    all of the image (12 bits in a file of 16 are no black image), floats by 1, where they lie in [0, 1], else by their greatest.

    Args:
        path: the file.
        short: reduce the image to this short side, in pixels, if it is larger.

    Raises:
        ProblemError: naming the file, if it is missing, truncated or no image.
    """
    try:
        with Image.open(path) as opened:
            image: Image.Image = ImageOps.exif_transpose(opened)
            if image.mode[0] in "IF":  # 16 or 32 bits of grey, or floats, which Pillow would cut off at 255
                image = Image.fromarray(_eight_bits(np.asarray(image)))
            if image.has_transparency_data:
                layer = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
            image = image.convert("RGB")
    except FileNotFoundError:
        raise ProblemError(f"no such image: {path}") from None
    except UnidentifiedImageError:
        raise ProblemError(f"{path} is no image, or of a format that Pillow does not read") from None
    except Exception as error:  # the readers of some formats do not expect damage, and raise what comes
        raise ProblemError(f"{path} cannot be read: {str(error) or type(error).__name__}") from error
    if short is not None and min(image.size) > short:
        scale = short / min(image.size)
        width, height = (max(1, round(n * scale)) for n in image.size)
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def _eight_bits(grey: np.ndarray) -> np.ndarray:
    """Grey values as bytes, scaled by their range; those below 0 are lifted to it."""
    whole, grey = grey.dtype.kind in "iu", grey.astype(np.float64)
    if not np.isfinite(grey).all():
        raise ValueError("it has pixels that are not finite")
    grey = grey - min(grey.min(), 0)
    scales = [2.0**bits - 1 for bits in DEPTHS] if whole else [1.0]
    scale = next((scale for scale in scales if grey.max() <= scale), grey.max())
    return (grey * (255 / scale)).round().astype(np.uint8)


def write_image(image: Tensor, path: str | Path) -> None:
    """Write ``(3, H, W)`` in [0, 1] as a file of 8 bits; its suffix says the format."""
    pixels = (image.detach().float().clamp(0, 1) * 255).round().to(torch.uint8)
    Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy()).save(path)


def find_folder(path: str | Path) -> Path:
    """A folder or file as it is given, or else under the folder of all data.

    Raises:
        ProblemError: if there is nothing in either place.
    """
    places = [Path(path), *(root / path for root in data_roots())]
    for place in places:
        if place.exists():
            return place
    hint = "" if len(places) > 1 else "; set AMORTIZED_DATA to the folder that holds it"
    raise ProblemError(f"no such folder of images: {' or '.join(map(str, places))}{hint}")


class ImageList:
    """A sequence of images ``(3, H, W)``, uint8, with names; those of files are decoded when first used.

    Args:
        entries: files, or images.
        names: of the images; files are named after themselves.
        short: reduce files to this short side, in pixels.
    """

    def __init__(
        self, entries: Iterable[Path | Tensor], names: Iterable[str] | None = None, short: int | None = None
    ) -> None:
        self.entries = list(entries)
        self.names = [Path(e).stem for e in self.entries if isinstance(e, Path)] if names is None else list(names)
        self.short = short

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Tensor:
        entry = self.entries[index]
        if isinstance(entry, Path):
            entry = read_image(entry, self.short)
            if self.short is not None:  # whole photographs are not kept
                self.entries[index] = entry
        return entry

    def __iter__(self) -> Iterator[Tensor]:
        return (self[index] for index in range(len(self)))

    def part(self, indices: Iterable[int]) -> ImageList:
        """Some of the images."""
        indices = list(indices)
        return ImageList([self.entries[i] for i in indices], [self.names[i] for i in indices], self.short)


def image_folder(path: str | Path, short: int | None = None) -> ImageList:
    """The images of a folder (or the one image file), in the order of their names; what else is in it is named in a warning.

    Hidden files are left out without a word.

    Raises:
        ProblemError: if there is no such folder, or no image in it.
    """
    place = find_folder(path)
    if place.is_file():
        return ImageList([place], short=short)
    known = suffixes()
    found = {file: file.suffix.lower() in known and file.is_file() for file in sorted(place.glob("[!.]*"))}
    files = [file for file, is_image in found.items() if is_image]
    others = ", ".join(f"{file.name}/" if file.is_dir() else file.name for file in found if not found[file])
    if not files:
        raise ProblemError(f"there is no image in {place}" + (f", but {others}" if others else ""))
    if others:
        rank_zero_warn(f"{place}: {len(found) - len(files)} left out, being no images: {others}")
    stems = [file.stem for file in files]
    return ImageList(files, [f.stem if stems.count(f.stem) == 1 else f.name for f in files], short)


def photographs() -> ImageList:
    """Six pieces each of the three photographs that scikit-learn and matplotlib bring: no download, 18 images."""
    from matplotlib.cbook import get_sample_data
    from sklearn.datasets import load_sample_images

    found = [torch.from_numpy(image.copy()).permute(2, 0, 1) for image in load_sample_images().images]
    found.append(read_image(get_sample_data("grace_hopper.jpg", asfileobj=False)))
    pieces, names = [], []
    for name, image in zip(("china", "flower", "hopper"), found, strict=True):
        long = 3 if image.shape[2] > image.shape[1] else 2
        for y, line in enumerate(image.tensor_split(5 - long, dim=1)):
            for x, piece in enumerate(line.tensor_split(long, dim=2)):
                pieces.append(piece.contiguous())
                names.append(f"{name}-{y}{x}")
    return ImageList(pieces, names)


def textures(count: int, side: int = 192, seed: int = 0) -> ImageList:
    """Procedural styles: coloured waves, bent by smooth noise, cut into a few flat colours or left soft."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    def noise(cells: int) -> Tensor:
        grid = torch.randn(1, 1, cells, cells, generator=generator)
        return interpolate(grid, (side, side), mode="bicubic", align_corners=True)[0, 0]

    y, x = torch.meshgrid(*[torch.linspace(0, 1, side)] * 2, indexing="ij")
    made = []
    for _ in range(count):
        angle, waves, bend = 2 * math.pi * float(uniform(1)), 4 + 36 * float(uniform(1)) ** 2, float(uniform(1))
        along = x * math.cos(angle) + y * math.sin(angle) + bend * 0.3 * noise(3 + int(6 * uniform(1)))
        field = torch.sin(2 * math.pi * waves * along) + (2 * float(uniform(1))) * noise(8 + int(56 * uniform(1)))
        field = (field - field.mean()) / field.std()
        palette = uniform(5, 3)
        at = (field.clamp(-1.8, 1.8) / 1.8 + 1) * 2
        if uniform(1) < 0.5:
            at = at.round()
        low = at.floor().clamp(max=3)
        share = (at - low)[..., None]
        image = palette[low.long()] * (1 - share) + palette[low.long() + 1] * share
        image = image + 0.1 * float(uniform(1)) * noise(side)[..., None]
        made.append((image.clamp(0, 1) * 255).to(torch.uint8).permute(2, 0, 1).contiguous())
    return ImageList(made, [f"texture-{k}" for k in range(count)])


def draw_index(chance: torch.Generator, n: int) -> int:
    """One of 0, ..., n - 1."""
    return int(torch.randint(n, (), generator=chance))


def centre(image: Tensor, size: int) -> Tensor:
    """The central square of an image, as ``(3, size, size)`` in [0, 1]."""
    short = min(image.shape[1:])
    y, x = ((n - short) // 2 for n in image.shape[1:])
    return resized(image[:, y : y + short, x : x + short], (size, size))


def crop(
    image: Tensor, size: int, short: int, chance: torch.Generator, scales: tuple[float, float] = (1.0, 1.8)
) -> Tensor:
    """A random window ``(3, size, size)`` of the image, its short side at a random one of ``scales`` times ``short``."""
    scale = scales[0] * (scales[1] / scales[0]) ** float(torch.rand((), generator=chance))
    height, width = image.shape[1:]
    side = max(1, min(round(size * min(height, width) / (short * scale)), height, width))
    y, x = draw_index(chance, height - side + 1), draw_index(chance, width - side + 1)
    window = image[:, y : y + side, x : x + side]
    if torch.rand((), generator=chance) < 0.5:
        window = window.flip(2)
    return resized(window, (size, size))


def pixels(image: Tensor) -> Tensor:
    """A batch of one image ``(1, 3, H, W)`` in [0, 1]."""
    return image[None].float() / 255


def resized(image: Tensor, size: Sequence[int]) -> Tensor:
    """An image of 8 bits as ``(3, *size)`` in [0, 1]."""
    smaller = image.shape[1] > size[0]
    found = interpolate(pixels(image), tuple(size), mode="bicubic", antialias=smaller, align_corners=False)
    return found[0].clamp(0, 1)
