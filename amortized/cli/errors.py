"""Faults in a command line, and names that come close to what was typed."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UsageError(ValueError):
    """The command line asks for something impossible."""


def close(name: str, known: Iterable[str]) -> str:
    """A question with the known names that are spelt like this one, or are its initials (``learning_rate``: ``lr``)."""
    names = sorted(set(known))
    initials = "".join(word[:1] for word in name.split("_"))
    found = [initials] if len(initials) > 1 and initials in names else []
    found += [close for close in difflib.get_close_matches(name, names, n=3, cutoff=0.6) if close not in found]
    return f" (did you mean {' or '.join(found[:3])}?)" if found else ""
