"""Recipes: packaged YAML files, by name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from amortized.cli.errors import UsageError, close


class Header(NamedTuple):
    """What the comment that a recipe opens with says."""

    shows: str
    """Its first sentence."""
    time: str
    """How long it takes to train, on what."""
    gap: str
    """What to expect, with its tolerance."""
    needs: str
    """Files or packages that a plain installation does not have; empty if there are none."""


def recipe_folder() -> Path:
    """Where the packaged recipes are: in the installed package, or beside it in a clone."""
    here = Path(__file__).parent.parent
    return here / "recipes" if (here / "recipes").is_dir() else here.parent / "recipes"


def recipes() -> dict[str, Path]:
    """The packaged recipes by name."""
    return {path.stem: path for path in sorted(recipe_folder().glob("*.yaml"))}


def resolve_recipe(name: str) -> str:
    """The path of a recipe: a file, or the name of a packaged one.

    Raises:
        UsageError: if it is neither; with the closest names.
    """
    if Path(name).is_file():
        return name
    known = recipes()
    if name.removesuffix(".yaml") in known:
        return str(known[name.removesuffix(".yaml")])
    files = [str(path) for path in sorted(Path(name).parent.glob("*.yaml"))]
    raise UsageError(
        f"no recipe {name!r}{close(name, [*known, *files])}: write the path of a YAML file, or a name from amortized list"
    )


def comment(path: Path) -> str:
    """The comment that a recipe opens with, in one line."""
    lines = path.read_text(encoding="utf-8").splitlines()
    top = next((number for number, line in enumerate(lines) if not line.startswith("#")), len(lines))
    return " ".join(line.removeprefix("#").strip() for line in lines[:top])


def header(path: Path) -> Header:
    """The parts of a recipe's :func:`comment`; what it does not say is empty."""
    text = comment(path)
    found = {
        "shows": re.match(r"(.+?(?<! al)\.)(?:\s|$)", text),
        "time": re.search(r"about ([\d.]+ (?:s|min) on (?:one core|a GPU|\d+ cores))", text),
        "gap": re.search(r"expected gap: ([\d.e-]+ ± [\d.e-]+)", text),
        "needs": re.search(r"(?:^|[.;] |  )[Nn]eeds (.+?)(?: \(|[.;,]|$)", text),
    }
    return Header(**{name: match[1] if match else "" for name, match in found.items()})
