"""Where in a user's own code an error comes from, in one line."""

from __future__ import annotations

import sysconfig
import traceback
from pathlib import Path

_OURS = Path(__file__).parent
_LIBRARIES = tuple(sysconfig.get_paths()[name] for name in ("stdlib", "purelib", "platlib"))


def one_line(error: BaseException) -> str:
    """An error's type and first line, with the innermost place of it that is not in a library, and how to see all.

    >>> try:
    ...     {}["radius"]
    ... except KeyError as error:
    ...     one_line(error).split(" (")[0]
    "KeyError: 'radius'"
    """
    said = next((line for line in str(error).splitlines() if line.strip()), "")
    text = f"{type(error).__name__}: {said}" if said else type(error).__name__
    place = _place(error)
    return f"{text} ({f'{place}; ' if place else ''}AMORTIZED_DEBUG=1 shows all)"


def _place(error: BaseException) -> str | None:
    theirs, problems = None, None
    for frame in traceback.extract_tb(error.__traceback__):
        path = Path(frame.filename)
        if path.is_relative_to(_OURS):
            if path.parent.name in ("problems", "networks"):
                problems = frame
        elif not frame.filename.startswith((*_LIBRARIES, "<")):
            theirs = frame
    frame = theirs or problems
    return None if frame is None else f"{frame.filename}:{frame.lineno}, in {frame.name}"
