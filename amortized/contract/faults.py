"""What went wrong, in one line, with its place in the user's own file."""

from __future__ import annotations

import re
import sysconfig
import traceback
from pathlib import Path

import torch

_NOT_USERS = (
    Path(__file__).resolve().parent.parent,
    *(Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib", "purelib", "platlib")),
)


def place(error: BaseException) -> str | None:
    """The innermost line of the user's own code under an error, ``circle.py, line 17, in objective``, if there is one."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_users(frame.filename)]
    if not frames:
        return None
    last = frames[-1]
    return f"{_short(Path(last.filename))}, line {last.lineno}, in {last.name}"


def describe(error: BaseException) -> str:
    """The kind of an error, the first line of its message, and its :func:`place`."""
    message = _first(str(error))
    text = f"{type(error).__name__}: {message}" if message else type(error).__name__
    where = place(error)
    return f"{text} ({where})" if where else text


def origin(error: BaseException) -> BaseException:
    """The first of the errors that led to this one."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return error


def known_cause(error: BaseException) -> str | None:
    """What is missing on this machine for what was asked: memory, or a compiler; ``None`` if it is something else."""
    cause: BaseException | None = error
    while cause is not None:
        text = str(cause)
        if isinstance(cause, MemoryError | torch.OutOfMemoryError) or _ALLOCATOR.search(text):
            size = re.search(r"allocate ([\d.]+ ?(?:bytes|[KMGT]i?B))", text)
            return "out of memory" + (f", where {_bytes(size[1])} more were needed" if size else "")
        if type(cause).__name__ in ("InvalidCxxCompiler", "TritonMissing"):
            return f"compile needs a compiler that is not here: {_first(text)}; install one, or set compile to false"
        cause = cause.__cause__ or cause.__context__
    return None


_ALLOCATOR = re.compile("DefaultCPUAllocator: (can't allocate|not enough) memory")


def _bytes(size: str) -> str:
    return f"{float(size.split()[0]) / 2**30:,.1f} GiB" if size.endswith("bytes") else size


def _first(text: str) -> str:
    return (text.strip().splitlines() or [""])[0]


def _is_users(filename: str) -> bool:
    if filename.startswith("<"):
        return False
    path = Path(filename).resolve()
    return not any(path.is_relative_to(folder) for folder in _NOT_USERS)


def _short(path: Path) -> Path:
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path
