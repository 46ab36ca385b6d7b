"""Recipes: packaged YAML files, by name."""

from __future__ import annotations

from pathlib import Path

from amortized.cli.errors import UsageError, close


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
    raise UsageError(
        f"no recipe {name!r}{close(name, known)}; there are {', '.join(known)}, or give the path of a YAML file"
    )
