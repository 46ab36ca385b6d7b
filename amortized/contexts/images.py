"""Images as contexts: digits inside a package, or MNIST, Fashion-MNIST and Omniglot from files; binarised or grey."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.error import URLError

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from amortized.contexts.data_module import ContextDataModule, data_roots
from amortized.contract import Context, ProblemError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Dataset = Literal["digits", "mnist", "fashion-mnist", "omniglot"]

SOURCES = {
    "mnist": "https://ossci-datasets.s3.amazonaws.com/mnist",
    "fashion-mnist": "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com",
}
"""Where the four files of a set are to be had."""

SHA256 = {
    "mnist/train-images-idx3-ubyte": "0b367032e93c5d0cea0925647cfdb18614af8ee15f83e6f2fc2ad904a6835971",
    "mnist/t10k-images-idx3-ubyte": "1a1a05eab793c14bb050b398624a11b0ffd1a2953baed553b1b9bd079e2a20be",
    "mnist/train-labels-idx1-ubyte": "1787548bbe0bff1ec2ecdc0ef292b02df999e2d1a6002d27500982c652b17203",
    "mnist/t10k-labels-idx1-ubyte": "b91679a0acfe4ba0e50a2437a903084cba1f5f92592b016a25a7dfd00455798b",
    "fashion-mnist/train-images-idx3-ubyte": "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7",
    "fashion-mnist/t10k-images-idx3-ubyte": "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa",
    "fashion-mnist/train-labels-idx1-ubyte": "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056",
    "fashion-mnist/t10k-labels-idx1-ubyte": "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05",
}
"""Of the compressed files, as published."""

SYSTEM = Path("/usr/share/datasets")
"""Where Debian's package dataset-fashion-mnist puts its files."""


class Images(ContextDataModule):
    """Flat images ``(B, pixels)`` in [0, 1]; binarised anew each time in training, once for evaluation.

    * ``digits``: scikit-learn's 1,797 of 8 x 8 pixels: 1,257 train, 180 validate, 360 test. Inside the package.
    * ``mnist``, ``fashion-mnist``: 28 x 28, from IDX files, gzipped or not. The last 10,000 training images are for
      validation.
    * ``omniglot``: 28 x 28, ``omniglot_small_28.npz``: of 20 drawers, 16 train, 2 validate, 2 test.

    Of the validation and test images the first ``num_val`` and ``num_test`` are taken. Files are looked for in the
    folder ``mnist`` (or ``fashion-mnist``, ``omniglot``) of the directory that the environment variable
    ``AMORTIZED_DATA`` names, of ``~/.cache/amortized`` and of Debian's ``/usr/share/datasets``. MNIST and Fashion-MNIST
    are otherwise downloaded to the cache, and their SHA-256 checked.

    Args:
        dataset: which of them.
        root: directory of the files, or of that folder; given one, no other is looked at, and nothing downloaded.
        binarise: pixels are drawn from their grey values (Salakhutdinov & Murray 2008); else they stay grey.
        num_val: validation images at most.
        num_test: test images at most.
        **kwargs: see :class:`~amortized.ContextDataModule`.
    """

    free_to_resume = (*ContextDataModule.free_to_resume, "root")

    def __init__(
        self,
        dataset: Dataset = "digits",
        root: str | None = None,
        binarise: bool = True,
        num_val: int = 1024,
        num_test: int = 1024,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_val=num_val, num_test=num_test, **kwargs)
        if dataset not in ("digits", *FILES):
            raise ValueError(f"Images: dataset must be one of digits, {', '.join(FILES)}; got {dataset!r}")
        self.dataset, self.root, self.binarise = dataset, root, binarise

    @property
    def files(self) -> tuple[str, ...]:
        """Those that the data set needs."""
        return FILES[self.dataset]

    def prepare_data(self) -> None:
        """Downloads what is missing and can be had."""
        if self.dataset in SOURCES and self.root is None:
            for file in self.files:
                if find(self.dataset, file) is None:
                    download(self.dataset, file)
        super().prepare_data()  # last: it may solve them

    def contexts(self, split: str) -> Tensor:
        grey = handwritten_digits(split)[0] if self.dataset == "digits" else self._from_files(split)
        if split == "train":
            return grey
        grey = unit(grey[: self.num_rows[split]])
        generator = torch.Generator().manual_seed({"val": 1257, "test": 1437}[split])
        return torch.bernoulli(grey, generator=generator) if self.binarise else grey

    def _from_files(self, split: str) -> Tensor:
        if self.dataset == "omniglot":
            images = read_npz(located(self.dataset, FILES["omniglot"][0], self.root))  # characters x drawers
            first, last = {"train": (0, 16), "val": (16, 18), "test": (18, 20)}[split]
            images = images[:, first:last].reshape(-1, 28 * 28)
            order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
            return torch.from_numpy(images)[order]
        return self.part(split, FILES[self.dataset], (28, 28)).flatten(1)

    def part(self, split: str, files: tuple[str, ...], row: tuple[int, ...] = ()) -> Tensor:
        """The rows of a split, bytes of that shape, in IDX files for training and for the test."""
        path = located(self.dataset, files[-1 if split == "test" else 0], self.root)
        rows = read_idx(path)
        if rows.shape[1:] != row:
            wanted = f"images {('N', *row)}".replace("'", "") if row else "labels (N,)"
            raise ProblemError(f"{path} holds an array of shape {rows.shape}; {self.dataset} has {wanted}")
        if split != "test" and len(rows) <= 10_000:
            raise ProblemError(
                f"{path} holds {len(rows)} images, of which the last 10,000 are for validation: there are none to train on"
            )
        kept = {"train": slice(0, len(rows) - 10_000), "val": slice(len(rows) - 10_000, None), "test": slice(None)}
        return torch.from_numpy(rows[kept[split]])

    def augment(self, a: Context, generator: torch.Generator) -> Tensor:
        grey = unit(a)
        return torch.bernoulli(grey, generator=generator) if self.binarise else grey


def show(axes: Axes, pixels: Tensor, height: int | None = None) -> None:
    """Draw flat grey pixels in [0, 1] as an image: of that height, else as a square, else in one line."""
    image = _shaped(pixels, height)
    aspect: Literal["equal", "auto"] = "equal" if len(image) > 1 else "auto"
    axes.imshow(image.cpu().numpy(), cmap="gray_r", vmin=0, vmax=1, aspect=aspect)


def show_lines(axes: Axes, lines: dict[str, Tensor], height: int | None = None) -> None:
    """Draw lines of images ``(n, pixels)`` as :func:`show` does, each line with its name: in one picture, for axes are slow."""
    images = _shaped(torch.stack(list(lines.values())), height)
    framed = pad(images, (1, 1, 1, 1), value=0.1)
    aspect: Literal["equal", "auto"] = "equal" if images.shape[2] > 1 else "auto"
    mosaic = framed.transpose(1, 2).flatten(0, 1).flatten(1)
    axes.imshow(mosaic.cpu().numpy(), cmap="gray_r", vmin=0, vmax=1, aspect=aspect)
    tall = framed.shape[2]
    axes.set_yticks([tall * (k + 0.5) - 0.5 for k in range(len(lines))], list(lines), fontsize=8)
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _shaped(pixels: Tensor, height: int | None) -> Tensor:
    """Flat pixels ``(*, pixels)`` as images ``(*, height, width)``."""
    side = math.isqrt(pixels.shape[-1])
    return pixels.float().unflatten(-1, (height or (side if side**2 == pixels.shape[-1] else 1), -1))


def unit(grey: Tensor) -> Tensor:
    """Grey values in [0, 1]; files have bytes, which stay bytes in memory."""
    return grey.float() / 255 if grey.dtype == torch.uint8 else grey


def handwritten_digits(split: str) -> tuple[Tensor, Tensor]:
    """Grey values ``(N, 64)`` in [0, 1] and labels ``(N,)`` of scikit-learn's digits; a split is the same for every seed."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = torch.randperm(len(digits.data), generator=torch.Generator().manual_seed(0))
    first, last = {"train": (0, 1257), "val": (1257, 1437), "test": (1437, 1797)}[split]
    chosen = order[first:last]
    return torch.from_numpy(digits.data)[chosen].float() / 16, torch.from_numpy(digits.target)[chosen]


FILES: dict[str, tuple[str, ...]] = {
    "mnist": ("train-images-idx3-ubyte", "t10k-images-idx3-ubyte"),
    "fashion-mnist": ("train-images-idx3-ubyte", "t10k-images-idx3-ubyte"),
    "omniglot": ("omniglot_small_28.npz",),
}
"""Training images first, test images last."""

LABELS: dict[str, tuple[str, ...]] = {
    "mnist": ("train-labels-idx1-ubyte", "t10k-labels-idx1-ubyte"),
    "fashion-mnist": ("train-labels-idx1-ubyte", "t10k-labels-idx1-ubyte"),
}
"""The labels of those, likewise."""


def cache() -> Path:
    """Where downloads go."""
    return Path("~/.cache/amortized").expanduser()


def folders(name: str, root: str | None = None) -> list[Path]:
    """Where files of a set are looked for, in order."""
    if root:  # other sets may have files of the same name, so only a folder that was named for this one is looked at
        return [Path(root).expanduser() / name, Path(root).expanduser()]
    return [base / name for base in (*data_roots(), cache(), SYSTEM)]


def find(name: str, file: str, root: str | None = None) -> Path | None:
    """The first file of that name, or of that name with ``.gz``; ``None`` if there is none."""
    for folder in folders(name, root):
        for path in (folder / file, folder / f"{file}.gz"):
            if path.is_file():
                return path
    return None


def located(name: str, file: str, root: str | None = None) -> Path:
    """As :func:`find`.

    Raises:
        ProblemError: if there is none; it says where one would be looked for.
    """
    path = find(name, file, root)
    if path is None:
        where = ", ".join(str(folder) for folder in folders(name, root))
        raise ProblemError(
            f"no {file} (or {file}.gz) of {name} in {where}: put it there, or name its directory with data.root or "
            "the environment variable AMORTIZED_DATA"
        )
    return path


def download(name: str, file: str) -> Path:
    """Fetch a published file into the cache, whole and with its checksum, or not at all."""
    url, path = f"{SOURCES[name]}/{file}.gz", cache() / name / f"{file}.gz"
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(url, str(path), SHA256[f"{name}/{file}"])
    except (URLError, OSError, RuntimeError) as error:
        raise ProblemError(
            f"{name} is not here and {url} could not be fetched ({error}): put {file}.gz into {path.parent}, or name its "
            "directory with data.root or the environment variable AMORTIZED_DATA"
        ) from error
    return path


def read_idx(path: Path) -> np.ndarray:
    """The bytes of an IDX file, gzipped or not, in its shape (LeCun, Cortes & Burges, *The MNIST database*).

    Raises:
        ProblemError: if the file is damaged, cut short, or no IDX file of bytes.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            data = file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise ProblemError(f"{path} is damaged ({error}): fetch it again") from error
    if len(data) < 8 or data[:3] != b"\x00\x00\x08" or len(data) < 4 + 4 * data[3]:
        raise ProblemError(f"{path} is no IDX file of bytes: it opens with {data[:4]!r}, not with 0, 0, 8, dimensions")
    dimensions = data[3]
    shape = tuple(np.frombuffer(data, ">u4", dimensions, 4).tolist())
    body = len(data) - 4 - 4 * dimensions
    if body != math.prod(shape):
        raise ProblemError(f"{path} is damaged: it says it holds {shape} bytes, and holds {body}: fetch it again")
    return np.frombuffer(data, np.uint8, offset=4 + 4 * dimensions).reshape(shape).copy()


def read_npz(path: Path) -> np.ndarray:
    """The ``images`` of Omniglot, ``(characters, drawers, 28, 28)`` bytes, ink high.

    Raises:
        ProblemError: if the file is damaged or another.
    """
    try:
        images: np.ndarray = np.load(path, allow_pickle=False)["images"]
    except Exception as error:  # numpy, zipfile and zlib have one for every kind of damage
        raise ProblemError(f"{path} is no readable .npz file with an array 'images'") from error
    if images.dtype != np.uint8 or images.shape[1:] != (20, 28, 28):
        raise ProblemError(f"{path}: images must be bytes (characters, 20, 28, 28); got {images.dtype} {images.shape}")
    return images
