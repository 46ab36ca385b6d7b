"""The commands that start something new, and take no time: ``list``, ``copy`` and ``new``."""

from __future__ import annotations

import argparse
import platform
import shutil
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NoReturn

from amortized.cli.errors import UsageError
from amortized.cli.help_text import STARTING
from amortized.cli.listing import listing
from amortized.cli.new import new
from amortized.cli.recipes import resolve_recipe


class _Parser(argparse.ArgumentParser):
    """One that tells a fault in one line."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{self.prog}: {message}; {self.prog} --help tells more")


def start(command: str, given: Sequence[str]) -> str:
    """What the command has to say, having done its work.

    Args:
        command: one of :data:`~amortized.cli.help_text.STARTING`.
        given: what was typed after it.

    Raises:
        UsageError: if it cannot be done.
    """
    parser = _Parser(f"amortized {command}", description=STARTING[command].capitalize() + ".", allow_abbrev=False)
    parser.add_argument(**_ARGUMENTS[command])  # type: ignore[arg-type]
    (argument,) = vars(parser.parse_args(given)).values()
    return _DO[command](argument)


def versions() -> str:
    """Of the package, and of what a result depends on."""

    def of(package: str) -> str:
        try:
            return f"{package} {version(package)}"
        except PackageNotFoundError:
            return f"{package}, not installed"

    return f"{of('amortized')} ({of('torch')}, {of('lightning')}, Python {platform.python_version()})\n"


def copy(name: str) -> str:
    """A recipe, as a file of the working directory.

    Raises:
        UsageError: if there is no such recipe, or the file is there already.
    """
    source = Path(resolve_recipe(name))
    path = Path(source.name)
    if path.exists():
        raise UsageError(f"{path} is here already: rename it, or go on with amortized fit -c {path}")
    text = source.read_text(encoding="utf-8")
    path.write_text(text.replace(f"amortized fit -c {source.stem}", f"amortized fit -c {path}"), encoding="utf-8")
    return "\n".join(
        [
            f"{path} is yours to change; its first lines say what it shows, how long it takes, and which gap to expect",
            "",
            f"next: amortized fit -c {path}",
            f"      amortized fit -c {path} --print_config     every setting, those at their defaults too",
            "",
        ]
    )


_ARGUMENTS = {
    "list": {"dest": "word", "metavar": "WORD", "nargs": "?", "help": "only recipes with this in their name or header"},
    "copy": {"dest": "name", "metavar": "NAME", "help": "of a recipe; amortized list has them"},
    "new": {"dest": "problem", "metavar": "PROBLEM", "help": "its name, as Portfolio or inverse_kinematics"},
}

_DO: dict[str, Callable[[str], str]] = {
    "list": lambda word: listing(word, min(shutil.get_terminal_size((80, 24)).columns, 120)),
    "copy": copy,
    "new": lambda problem: new(problem, Path()),
}
