"""``amortized fit|validate|test|predict -c RECIPE``: the command line."""

from __future__ import annotations

import sys

from amortized.cli.errors import UsageError
from amortized.cli.help_text import top_help
from amortized.cli.recipes import resolve_recipe


def main(args: list[str] | None = None) -> None:
    """As :func:`amortized.cli.app.main`; help, and a recipe that there is not, are answered before anything heavy is loaded."""
    given = list(sys.argv[1:] if args is None else args)
    if not given or given[0] in ("-h", "--help"):
        print(top_help(), end="")
        raise SystemExit(0)
    try:
        for option, name in zip(given, given[1:], strict=False):
            if option in ("-c", "--config"):
                resolve_recipe(name)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    from amortized.cli.app import main as run

    run(args)
