"""``amortized list``: the packaged recipes, as their headers tell them."""

from __future__ import annotations

import textwrap

from amortized.cli.errors import UsageError, close
from amortized.cli.recipes import comment, header, recipes


def listing(word: str | None = None, width: int = 80) -> str:
    """Each recipe with its training time, its gap, what it needs and what it shows, for a terminal of so many columns.

    Of all recipes the beginning of what they show, of those with a word the whole sentence.

    Args:
        word: only those with this in their name or header.
        width: columns.

    Raises:
        UsageError: if no recipe has the word.
    """
    known = recipes()
    chosen = {n: p for n, p in known.items() if word is None or word.lower() in f"{n} {comment(p)}".lower()}
    if not chosen:
        raise UsageError(f"no recipe has {word!r} in its name or header{close(str(word), known)}; see amortized list")
    name_width = max(len("recipe"), *map(len, chosen)) + 2
    lines = [f"{'recipe':<{name_width}}{'trains in':<21}{'gap':<22}needs"]
    for name, path in chosen.items():
        told = header(path)
        lines += [f"{name:<{name_width}}{told.time:<21}{told.gap:<22}{told.needs or '-'}"]
        shows = textwrap.wrap(told.shows, width - 4)
        if word is None and len(shows) > 1:
            shows = [textwrap.shorten(told.shows, width - 4, placeholder=" …")]
        lines += [f"    {line}" for line in shows]
    first = "vae_digits" if "vae_digits" in chosen else next(iter(chosen))
    following = {
        f"fit -c {first}": "train it, and measure it against a solver",
        f"list {first}": "the whole of what it shows",
        f"copy {first}": "its settings as a file of yours",
        "new PROBLEM": "a problem of your own",
    }
    column = max(map(len, following)) + 3
    steps = [f"      amortized {command:<{column}}{what}" for command, what in following.items()]
    lines += ["", steps[0].replace("      ", "next: ", 1), *steps[1:]]
    return "\n".join([*lines, ""])
