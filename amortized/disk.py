"""Files and folders that are whole and still there after the power is cut."""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
from collections.abc import Iterator
from pathlib import Path


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's names, are on the disk."""
    if os.name == "nt" and path.is_dir():  # Windows does not open folders, and writes names at once
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def unfinished(path: Path) -> Path:
    """Beside a file, the name under which this process writes it: no other's, also of another machine that has the same disk."""
    return path.with_name(f".{socket.gethostname()}.{os.getpid()}.{path.name}.unfinished")


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A file to write, which is ``path`` at the end, or gone after a fault: its content reaches the disk before its name does."""
    new = unfinished(path)
    try:
        yield new
        sync(new)
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)
    sync(path.parent)


def write(path: Path, content: str | bytes) -> None:
    """Write a file whole or not at all. Text is written as UTF-8."""
    with whole(path) as new:
        new.write_bytes(content.encode() if isinstance(content, str) else content)


def make(folder: Path) -> Path:
    """Make a folder and those it lies in, unless they are there."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in reversed(missing):
        sync(path.parent)
    return folder


def make_new(folder: Path) -> Path:
    """Make a folder that nobody else has: this one, or the first free one of ``folder-2``, ``folder-3``, ...

    Of processes that ask for the same at once, each gets its own.
    """
    make(folder.parent)
    for number in itertools.count(1):
        own = folder if number == 1 else folder.with_name(f"{folder.name}-{number}")
        try:
            own.mkdir()
        except FileExistsError:
            continue
        sync(own.parent)
        return own
    raise AssertionError("there is no last number")
