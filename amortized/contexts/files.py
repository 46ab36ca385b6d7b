"""Contexts from files: whatever has one meaning is read; all else is refused in a line that says what was expected."""

from __future__ import annotations

import contextlib
import csv
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from amortized import npz
from amortized.contract import Context, ProblemError, map_leaves, num_rows

Array = TypeVar("Array", Tensor, np.ndarray)

MEMORY = 2**28
"""Bytes of a file up to which it is read whole."""


def open_contexts(path: str | Path, like: Context) -> Context | FileRows:
    """The contexts of a file: as :func:`load_contexts`, or read as they are needed if the file is large and can be mapped.

    Raises:
        ProblemError: as :func:`load_contexts`.
    """
    path = Path(path).expanduser()
    if path.suffix.lower() in (".npy", ".npz") and path.is_file() and path.stat().st_size > MEMORY:
        with contextlib.suppress(OSError, ValueError):  # compressed, or damaged: told where it is read whole
            return FileRows(path, like)
    return load_contexts(path, like)


def load_contexts(path: str | Path, like: Context) -> Context:
    """Read contexts from a file.

    * A tensor: ``.npy``, ``.pt``, or for shapes ``(B,)`` and ``(B, n)`` a ``.csv`` with n columns of numbers, with or
      without a line of names; also a ``.npz`` or a dict that holds nothing else.
    * A ``NamedTuple``: ``.npz``, or ``.pt`` with a dict of tensors, or ``.npy`` with a record array; by the names of
      its fields, those of a nested one dotted (``outer.inner``).

    Numbers of any precision and byte order become those of the expected type, where it can hold them; real numbers are
    rounded to it. Nothing in a file is executed.

    Args:
        path: the file.
        like: contexts of the expected fields, shapes (but for the leading dimension) and types.

    Raises:
        ProblemError: if the file is missing or damaged, if fields are missing or their leading dimensions differ, or if
            shapes or types are others.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise ProblemError(f"no such file of contexts: {path}")
    expected = fields(like)
    try:
        found = {name: _tensor(values, name) for name, values in _read(path, expected).items()}
        rows = iter(_matched(found, expected))
    except ProblemError as error:
        raise ProblemError(f"{path} {error}; expected {_forms(expected)}") from error
    return map_leaves(lambda _: next(rows), like)


class FileRows(Dataset):
    """The rows of a ``.npy`` or uncompressed ``.npz`` file, which is mapped into memory, not read.

    Args:
        path: the file.
        like: contexts of the expected fields, shapes and types.

    Raises:
        ProblemError: as :func:`load_contexts`; for numbers that the expected type cannot hold, once they are needed.
        ValueError: if it cannot be mapped.
    """

    def __init__(self, path: Path, like: Context) -> None:
        self.path, self.like = path, map_leaves(lambda leaf: leaf[:0].cpu(), like)
        self._columns: list[np.ndarray] | None = None
        self.rows = len(self._mapped()[0])

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, row: int) -> Any:
        return map_leaves(lambda leaf: leaf[0], self.take(torch.tensor([row])))

    def __getstate__(self) -> dict[str, Any]:
        """For another process, which maps the file itself."""
        return self.__dict__ | {"_columns": None}

    def take(self, index: Tensor) -> Context:
        """The rows that ``index`` names, in its order."""
        expected = fields(self.like)
        columns = zip(expected.items(), self._mapped(), strict=True)
        try:
            rows = iter([_cast(_tensor(held[index.numpy()], name), leaf.dtype, name) for (name, leaf), held in columns])
        except ProblemError as error:
            raise ProblemError(f"{self.path} {error}; expected {_forms(expected)}") from error
        return map_leaves(lambda _: next(rows), self.like)

    def _mapped(self) -> list[np.ndarray]:
        if self._columns is None:
            expected = fields(self.like)
            if self.path.suffix.lower() == ".npz":
                held = npz.mapped(self.path)
            else:
                held = _records(np.lib.format.open_memmap(self.path, mode="r"))
            try:
                self._columns = _placed(held, expected)
            except ProblemError as error:
                raise ProblemError(f"{self.path} {error}; expected {_forms(expected)}") from error
        return self._columns


def as_contexts(given: Any, like: Context) -> Context:
    """Contexts from arrays: a tensor or array, nested lists, or the fields of a context by name, dotted where it is nested.

    Args:
        given: ``(B, *)`` of each field, or ``(*)`` of each: one context, which becomes B = 1.
        like: contexts of the expected fields, shapes (but for the leading dimension) and types.

    Raises:
        ProblemError: as :func:`load_contexts`.
    """
    expected = fields(like)
    try:
        found = {name: _tensor(values, name) for name, values in _named(given).items()}
        if len(found) == len(expected) == 1:
            found = dict(zip(expected, found.values(), strict=True))
        if all(name in found and found[name].shape == leaf.shape[1:] for name, leaf in expected.items()):
            found = {name: values.unsqueeze(0) for name, values in found.items()}
        rows = iter(_matched(found, expected))
    except ProblemError as error:
        raise ProblemError(f"what was given {error}; expected {_arrays(expected)}") from error
    return map_leaves(lambda _: next(rows), like)


def _named(given: Any, name: str = "") -> dict[str, Any]:
    """What was given by the names of its fields."""
    parts = given._asdict() if hasattr(given, "_asdict") else given
    if not isinstance(parts, dict):
        return {name: given}
    return {
        key: value
        for field, part in parts.items()
        for key, value in _named(part, f"{name}.{field}" if name else str(field)).items()
    }


def _arrays(expected: dict[str, Tensor]) -> str:
    """What arrays are expected, in words."""
    shapes = {name: ", ".join(["B", *map(str, leaf.shape[1:])]) for name, leaf in expected.items()}
    if "" in expected:
        return f"{_type(expected[''].dtype)} numbers of shape ({shapes['']})"
    return f"the fields {', '.join(f'{name} ({shape})' for name, shape in shapes.items())}"


def fields(a: Context, name: str = "") -> dict[str, Tensor]:
    """The tensors of a context by their names, dotted where it is nested; the name of a lone tensor is empty."""
    if isinstance(a, Tensor):
        return {name: a}
    parts = a._asdict().items()
    return {k: leaf for field, part in parts for k, leaf in fields(part, f"{name}.{field}" if name else field).items()}


def nan_in(a: Context) -> np.ndarray:
    """Of each row what is NaN in it, in words ``(B,)``: ``NaN in value, mask``; of a lone tensor ``NaN in its context``."""
    words = np.full(num_rows(a), "", object)
    for name, leaf in fields(a).items():
        for row in leaf.isnan().unsqueeze(-1).flatten(1).any(1).nonzero()[:, 0].tolist():
            words[row] = f"{words[row]}, {name}" if words[row] else f"NaN in {name or 'its context'}"
    return words.astype(str)


def tell_nan(why: np.ndarray, first: int = 0) -> str:
    """The first ten rows of :func:`nan_in` that have a NaN, in words; counted from ``first``; nothing if there are none."""
    rows = np.flatnonzero(why != "")
    named = ", ".join(f"row {first + row} ({why[row]})" for row in rows[:10]) + ", ..." * (len(rows) > 10)
    return f"not solved, as there is NaN in the context: {named}" if len(rows) else ""


def _read(path: Path, expected: dict[str, Tensor]) -> dict[str, Any]:
    """The arrays in a file by name; a lone one's name is empty."""
    kind = path.suffix.lower()
    if kind not in (".npy", ".npz", ".pt", ".csv"):
        raise ProblemError(f"is no file of a kind that contexts are read from ({kind or 'it has no suffix'})")
    if kind == ".csv":
        return {"": _table(path, column=[leaf.ndim for leaf in expected.values()] == [1])}
    try:
        if kind == ".pt":
            saved: Any = torch.load(path, map_location="cpu", weights_only=True)
            return {str(name): values for name, values in saved.items()} if isinstance(saved, dict) else {"": saved}
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return _records(loaded)
        with loaded:
            return dict(loaded)
    except Exception as error:  # numpy, torch, zipfile, zlib and pickle have one for every kind of damage
        # Their messages tell how to load such a file unsafely.
        why = error.strerror if isinstance(error, OSError) else None
        raise ProblemError(f"cannot be read: {why or 'it is damaged, or holds other things than numbers'}") from error


def _records(loaded: np.ndarray) -> dict[str, np.ndarray]:
    """The fields of an array of records; any other array has no name."""
    names = loaded.dtype.names or ()
    return {name: loaded[name] for name in names} if names else {"": loaded}


def _table(path: Path, column: bool) -> np.ndarray:
    """The numbers of a CSV file, ``(rows, columns)``, or ``(rows,)`` of its only ``column``."""
    try:
        with path.open(encoding="utf-8-sig") as file:  # Excel opens a file with a byte order mark
            lines = [line for line in file if line.strip() and not line.startswith("#")]
        if lines and not any(map(_is_number, next(csv.reader(lines)))):
            del lines[0]
        if not lines:
            raise ProblemError("has no rows")
        table: np.ndarray = np.loadtxt(lines, delimiter=",", quotechar='"', ndmin=2)
    except ProblemError:
        raise
    except (OSError, ValueError) as error:
        raise ProblemError(f"is no table of numbers: {str(error).split(';')[0]}") from error
    return table[:, 0] if column and table.shape[1] == 1 else table


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _tensor(values: Any, name: str) -> Tensor:
    if isinstance(values, Tensor):
        return values.detach().to_dense() if values.layout is not torch.strided else values.detach()
    try:
        array = np.asarray(values)
    except (ValueError, TypeError, RuntimeError):  # a list whose parts differ in length, or of tensors with a graph
        array = np.empty((), object)
    kind, size = array.dtype.kind, array.dtype.itemsize
    if kind not in "biufc":
        what = array.dtype if isinstance(values, np.ndarray) else type(values).__name__
        raise ProblemError(f"holds other things than numbers{f' in {name}' if name else ''} ({what})")
    native = array.dtype.newbyteorder("=")
    if size > {"f": 8, "c": 16}.get(kind, size):  # more than double precision, which torch does not have
        native = np.dtype(np.float64 if kind == "f" else np.complex128)
    return torch.from_numpy(np.array(array, native, order="C"))


def _matched(found: dict[str, Tensor], expected: dict[str, Tensor]) -> list[Tensor]:
    """What was found in the order, the shapes and the types of what is expected."""
    placed = zip(expected.items(), _placed(found, expected), strict=True)
    return [_cast(values, leaf.dtype, name) for (name, leaf), values in placed]


def _placed(found: dict[str, Array], expected: dict[str, Tensor]) -> list[Array]:
    """What was found in the order of what is expected, and of its shapes."""
    if len(found) == len(expected) == 1 and "" in (*found, *expected):
        found = dict(zip(expected, found.values(), strict=True))  # there is only one place for it
    if found.keys() != expected.keys():
        raise ProblemError("holds one array" if [*found] == [""] else f"has the fields {', '.join(found) or 'none'}")
    for name, leaf in expected.items():
        shape = found[name].shape
        if not shape or shape[1:] != leaf.shape[1:]:
            raise ProblemError(f"has contexts of shape {tuple(shape)}{f' in {name}' if name else ''}")
    sizes = {name: len(found[name]) for name in expected}
    if len(set(sizes.values())) > 1:
        counts = ", ".join(f"{name} {rows}" for name, rows in sizes.items())
        raise ProblemError(f"has fields with different numbers of rows: {counts}")
    if not all(sizes.values()):
        raise ProblemError("has no rows")
    return [found[name] for name in expected]


def _cast(given: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    where = f" in {name}" if name else ""
    if given.is_complex() and not dtype.is_complex:
        raise ProblemError(f"holds {_type(given.dtype)} numbers{where}, which {_type(dtype)} cannot")
    cast = given.to(dtype)
    if not (dtype.is_floating_point or dtype.is_complex):
        lost = cast.double() != given.double()
        if lost.any():
            raise ProblemError(f"holds {given[lost][0].item()}{where}, which {_type(dtype)} cannot")
    return cast


def _type(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _forms(expected: dict[str, Tensor]) -> str:
    shapes = {name: f"({', '.join(['B', *map(str, leaf.shape[1:])])})" for name, leaf in expected.items()}
    if "" in expected:
        kinds = ".npy, .pt or .csv" if expected[""].ndim < 3 else ".npy or .pt"
        return f"a {_type(expected[''].dtype)} tensor of shape {shapes['']} in a {kinds} file"
    named = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
    return f"the fields {named} in a .npz file, or a dict of tensors in a .pt file"
