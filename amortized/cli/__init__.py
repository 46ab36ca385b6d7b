"""``amortized fit|validate|test|predict -c RECIPE``, and ``list``, ``copy``, ``new``: the command line."""

from __future__ import annotations

import sys

from amortized.cli.errors import UsageError
from amortized.cli.help_text import STARTING, top_help
from amortized.cli.recipes import resolve_recipe


def main(args: list[str] | None = None) -> None:
    """As :func:`amortized.cli.app.main`; what needs nothing heavy is answered before that is loaded.

    That is help, the version, the commands that start something new, and a recipe that there is not.
    """
    given = list(sys.argv[1:] if args is None else args)
    try:
        if not given or given[0] in ("-h", "--help"):
            _answer(top_help())
        if given[0] == "--version" or given[0] in STARTING:
            from amortized.cli.starting import start, versions

            _answer(versions() if given[0] == "--version" else start(given[0], given[1:]))
        for option, name in zip(given, given[1:], strict=False):
            if option in ("-c", "--config"):
                resolve_recipe(name)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    from amortized.cli.app import main as run

    run(args)


def _answer(text: str) -> None:
    """Print it, in whatever the terminal can show, and end."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        text = text.replace("±", "+-").encode(encoding, "replace").decode(encoding)
    print(text, end="")
    raise SystemExit(0)
