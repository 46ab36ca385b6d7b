"""Rows written part by part, each a pure function of its number, and in the end put together: memory for one part is enough."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from amortized import disk, npz
from amortized.contract import ProblemError

MOST = 32
"""Batches in a part. There are at least twice as many parts, for processes to share, where there are as many batches."""

Table: TypeAlias = Mapping[str, np.ndarray]
"""Columns by name, of as many rows each."""


class Parts:
    """A folder of ``000012.npz`` and the like, each written whole or not at all; what is there is done.

    Args:
        folder: of the parts.
        plan: what the rows are of, as plain values; ``None`` if that is not known: then no part is kept.
        batches: how many there are of; ``None`` if that is not known: then every batch is a part.
    """

    def __init__(self, folder: Path, plan: Any = None, batches: int | None = None) -> None:
        self.folder, self.batches = folder, batches
        self.size = 1 if batches is None else min(max(batches // (2 * MOST), 1), MOST)
        """Batches in a part."""
        self._plan = "" if plan is None else json.dumps(plan | {"batches": batches}, indent=2, sort_keys=True) + "\n"

    def begin(self) -> list[int]:
        """The parts that are done; those of another plan are removed. For one process."""
        note = self.folder / "plan.json"
        if not self._plan or not note.is_file() or note.read_text(encoding="utf-8") != self._plan:
            if self.folder.exists():
                shutil.rmtree(self.folder)
            disk.write(disk.make(self.folder) / note.name, self._plan)
        return sorted(int(path.stem) for path in self.folder.glob("[0-9]*.npz"))

    def all(self) -> range:
        """The numbers of the parts, where that of the batches is known."""
        assert self.batches is not None
        return range(-(-self.batches // self.size))

    def batches_of(self, part: int) -> range:
        """The numbers of its batches."""
        return range(part * self.size, min((part + 1) * self.size, self.batches or part + 1))

    def write(self, part: int, batches: Sequence[Table]) -> None:
        """The rows of its batches."""
        npz.write(self._path(part), joined(batches))

    def read(self, parts: Sequence[int]) -> Iterable[Table]:
        """Parts in order, one after the other mapped into memory; as often as wanted.

        Raises:
            ProblemError: if one of them is not there.
        """
        if missing := [part for part in parts if not self._path(part).is_file()]:
            raise ProblemError(
                f"{self.folder} lacks {len(missing)} of {len(parts)} parts that other processes have written: the run's folder "
                "must be one that all of them share"
            )
        return _Mapped([self._path(part) for part in parts])

    def end(self) -> None:
        """Remove them."""
        shutil.rmtree(self.folder)

    def _path(self, part: int) -> Path:
        return self.folder / f"{part:06d}.npz"


class _Mapped:
    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths

    def __iter__(self) -> Iterator[Table]:
        return map(npz.mapped, self.paths)


def joined(tables: Iterable[Table]) -> dict[str, npz.Column]:
    """All rows of each column, to be written, in order: NaN in those of a table that lacks it.

    Args:
        tables: gone through once here, and once for each column.

    Raises:
        ProblemError: if rows of a column differ in shape.
    """
    rows = 0
    full: list[str] = []
    lacking: set[str] = set()
    held: dict[str, np.ndarray] = {}
    for table in tables:
        rows += (n := len(next(iter(table.values()))))
        lacking |= held.keys() ^ table.keys() if full else set()
        full = max(full, [*table], key=len)
        for name, column in table.items():
            before = held.setdefault(name, column[:0].copy())
            if column.shape[1:] != before.shape[1:]:
                raise ProblemError(
                    f"{name} is of shape {(n, *column.shape[1:])} in one batch, with rows of shape {before.shape[1:]} in "
                    "another: decode must give rows of one shape, or save must write them as files"
                )
            held[name] = before.astype(np.result_type(before, column))
    held |= {name: held[name].astype(np.result_type(held[name], np.float32)) for name in lacking}

    def pieces(name: str) -> Iterator[np.ndarray]:
        like = held[name]
        for table in tables:
            n = len(next(iter(table.values())))
            column = table[name] if name in table else np.full((n, *like.shape[1:]), np.nan, like.dtype)
            yield column.astype(like.dtype, copy=False)

    return {name: npz.Column(held[name].dtype, (rows, *held[name].shape[1:]), pieces(name)) for name in full}
