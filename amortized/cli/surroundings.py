"""What a command finds around it: a terminal of any encoding, and classes in the working directory."""

from __future__ import annotations

import codecs
import contextlib
import importlib
import io
import os
import sys
from collections.abc import Iterator

from lightning.pytorch.utilities.rank_zero import rank_zero_only


@rank_zero_only
def say(line: str) -> None:
    """Tell the person at the terminal, once."""
    print(line, flush=True)


def _plain(error: UnicodeError) -> tuple[str, int]:
    """Characters for a terminal that lacks those of the table."""
    assert isinstance(error, UnicodeEncodeError)
    plain = {"±": "+-", "─": "-", "−": "-", "…": "~", "·": "-"}
    return "".join(plain.get(character, "?") for character in error.object[error.start : error.end]), error.end


codecs.register_error("plain", _plain)


@contextlib.contextmanager
def any_terminal() -> Iterator[None]:
    """What a terminal's encoding lacks is printed in other characters, rather than an error."""
    streams = [stream for stream in (sys.stdout, sys.stderr) if isinstance(stream, io.TextIOWrapper)]
    before = [stream.errors for stream in streams]
    for stream in streams:
        stream.reconfigure(errors="plain")
    try:
        yield
    finally:
        for stream, errors in zip(streams, before, strict=True):
            stream.reconfigure(errors=errors)


@contextlib.contextmanager
def working_directory_importable() -> Iterator[None]:
    """Last on the path, so that a file there hides no library."""
    here = os.getcwd()
    sys.path.append(here)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.reverse()
        sys.path.remove(here)
        sys.path.reverse()
