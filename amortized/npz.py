"""``.npz`` files that are written whole or not at all, in pieces if they are large, and mapped into memory rather than read."""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from amortized import disk


class Column(NamedTuple):
    """An array that is written in pieces, of which one at a time is in memory."""

    dtype: np.dtype
    shape: tuple[int, ...]
    pieces: Iterable[np.ndarray]
    """Its rows, in order; each of that dtype."""


def write(path: Path, columns: Mapping[str, np.ndarray | Column]) -> None:
    """Write arrays by name, without compression; the same arrays are the same bytes, whenever they are written."""
    with disk.whole(path) as unfinished, zipfile.ZipFile(unfinished, "w") as archive:
        for name, given in columns.items():
            column = Column(given.dtype, given.shape, [given]) if isinstance(given, np.ndarray) else given
            head = {
                "descr": np.lib.format.dtype_to_descr(column.dtype),
                "fortran_order": False,
                "shape": column.shape,
            }
            # Under a date of its own: today's would make other bytes.
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as file:
                np.lib.format.write_array_header_1_0(file, head)
                for piece in column.pieces:
                    file.write(piece.tobytes())


def mapped(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an uncompressed ``.npz`` file, mapped into memory; no file stays open.

    Raises:
        ValueError: if it is compressed or damaged, or has arrays by columns or of Python objects.
    """
    try:
        return _mapped(path)
    except (RuntimeError, zipfile.BadZipFile, struct.error) as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def _mapped(path: Path) -> dict[str, np.ndarray]:
    data = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8).numpy()
    found = {}
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            # Of the name and of what follows it.
            lengths = struct.unpack_from("<HH", data.data, entry.header_offset + 26)
            start = entry.header_offset + 30 + sum(lengths)
            head = io.BytesIO(data[start : start + 2**16].tobytes())
            version = np.lib.format.read_magic(head)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, by_columns, dtype = read(head)
            if entry.compress_type != zipfile.ZIP_STORED or by_columns or dtype.hasobject:
                raise ValueError(f"{path}: {entry.filename} cannot be mapped")
            found[entry.filename.removesuffix(".npy")] = np.ndarray(shape, dtype, data.data, start + head.tell())
    return found
