"""Objects from the settings that a recipe, or a checkpoint, has of them.

Settings are code: they name classes, which are imported and called. Rebuild only what you trust, as with a recipe.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from typing import Any, TypeVar

from jsonargparse import ArgumentError, ArgumentParser

from amortized.checkpoint import MismatchError

T = TypeVar("T")


def rebuild(settings: dict[str, Any], base: type[T], what: str) -> T:
    """The object of ``{class_path: ..., init_args: ...}``.

    Args:
        settings: its class by full name, and the arguments of its ``__init__``.
        base: what it must be an instance of.
        what: whose it is; opens the message of an error.

    Raises:
        MismatchError: if a class is not importable here, is no ``base``, or does not take these arguments.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(base, "object", required=True)
    try:
        built: T = parser.instantiate(parser.parse_object({"object": _known(settings)}))["object"]
        return built
    except ArgumentError as error:
        path = settings.get("class_path")
        if missing := _missing(settings):
            raise MismatchError(
                f"{what}: {missing} cannot be imported here: put the file that has the class on the path (PYTHONPATH)"
            ) from error
        around = (
            "Parser key",
            "Does not validate",
            "Subtypes:",
            "Errors:",
            "Given value",
            "Expected a <class 'NoneType'>",
        )
        lines = [line.strip(" -") for line in str(error).splitlines() if line.strip()]
        why = [line for line in lines if not line.startswith(around)] or lines
        raise MismatchError(f"{what}: {path} cannot be built from its settings: {why[-1]}") from error


def _known(settings: Any) -> Any:
    """The settings without those that are ``None`` and that a class of this version does not have any more."""
    if isinstance(settings, list):
        return [_known(value) for value in settings]
    if not isinstance(settings, dict):
        return settings
    settings = {name: _known(value) for name, value in settings.items()}
    if _missing({"class_path": settings.get("class_path")}):
        settings["class_path"] = _moved(settings["class_path"])
    given = settings.get("init_args")
    if isinstance(settings.get("class_path"), str) and isinstance(given, dict) and not _missing(settings):
        module, _, name = settings["class_path"].rpartition(".")
        bases = getattr(getattr(importlib.import_module(module), name), "__mro__", ())
        takes = {parameter for base in bases for parameter in inspect.signature(base.__init__).parameters}
        settings["init_args"] = {name: value for name, value in given.items() if name in takes or value is not None}
    return settings


def _moved(path: str) -> str:
    """Where a class of this project is now that is not where a checkpoint says; the path itself, if there is none."""
    if not path.startswith("amortized."):
        return path
    for package in ("amortized.networks", "amortized.problems", "amortized.solvers"):
        importlib.import_module(package)
    name = path.rpartition(".")[2]
    for module in [module for known, module in sys.modules.items() if known.startswith("amortized.")]:
        found = getattr(module, name, None)
        if isinstance(found, type) and found.__module__ == module.__name__:
            return f"{found.__module__}.{name}"
    return path


def _missing(settings: Any) -> str | None:
    """The first class of settings that is not there, if one is not."""
    if isinstance(settings, dict):
        path = settings.get("class_path")
        if isinstance(path, str):
            module, _, name = path.rpartition(".")
            try:
                getattr(importlib.import_module(module), name)
            except (ImportError, AttributeError, ValueError):
                return path
        return next((found for value in settings.values() if (found := _missing(value))), None)
    if isinstance(settings, list):
        return next((found for value in settings if (found := _missing(value))), None)
    return None
