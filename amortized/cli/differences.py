"""Where the recipe that a checkpoint was trained with differs from the one given.

A class is the same wherever it has moved to. Nothing is imported on the word of the saved recipe: its paths are only
looked up among the modules of this project that are imported already; the given recipe's have been imported to parse it.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from typing import Any

_OURS = re.compile(r"amortized(\.\w+)+")


def differences(saved: Any, given: Any, at: str = "") -> list[str]:
    """Where two recipes differ, one line each: ``model.network.hidden: the checkpoint has 64, given 32``.

    A setting that a class did not have when the checkpoint was written counts as its default; NaN equals NaN.
    """
    if isinstance(saved, dict) and isinstance(given, dict):
        if "class_path" in saved and "class_path" in given:
            if not same_class(saved["class_path"], given["class_path"]):
                return differences(saved["class_path"], given["class_path"], f"{at}.class_path")
            defaults = _defaults(given["class_path"]) or _defaults(saved["class_path"])
            saved, given = (
                {**part, "class_path": None, "init_args": _settings(part, defaults)} for part in (saved, given)
            )
        return [
            line
            for key in dict.fromkeys([*saved, *given])
            for line in differences(saved.get(key), given.get(key), f"{at}.{key}" if at else str(key))
        ]
    if isinstance(saved, list) and isinstance(given, list) and len(saved) == len(given):
        pairs = enumerate(zip(saved, given, strict=True))
        lines = [line for i, (one, other) in pairs for line in differences(one, other, f"{at}[{i}]")]
        if not lines or any(isinstance(one, dict) for one in saved):
            return lines
    both_nan = saved != saved and given != given
    if saved == given or both_nan or (_is_ours(saved) and _is_ours(given) and same_class(saved, given)):
        return []
    return [f"{at}: the checkpoint has {saved!r}, given {given!r}"]


def without(part: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """The model or the data of a recipe, but for some of its settings."""
    return {**part, "init_args": {name: value for name, value in _settings(part).items() if name not in names}}


def same_class(saved: Any, given: Any) -> bool:
    """Whether two import paths name the same class: that of this project which both lead to, else by their last name."""
    if saved == given or not (isinstance(saved, str) and isinstance(given, str)):
        return bool(saved == given)
    one, other = _imported(saved), _imported(given)
    if one is not None and other is not None:
        return one is other
    return saved.rpartition(".")[2] == given.rpartition(".")[2]


def named(class_path: str) -> Any:
    """What a path of the given recipe names, by importing it."""
    module, _, name = class_path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def _is_ours(value: Any) -> bool:
    return isinstance(value, str) and _OURS.fullmatch(value) is not None


def _imported(path: str) -> Any:
    """What a path of this project names, without importing anything; ``None`` if that is not known."""
    module, _, name = path.rpartition(".")
    return getattr(sys.modules.get(module), name, None) if _is_ours(path) else None


def _settings(part: dict[str, Any], defaults: dict[str, Any] | None = None) -> dict[str, Any]:
    given = part.get("init_args")
    return {**(defaults or {}), **(given if isinstance(given, dict) else {})}


def _defaults(class_path: str) -> dict[str, Any]:
    """The default settings of a class that is imported, and of its bases: those that are plain values, as a recipe has them."""
    module, _, name = class_path.rpartition(".")
    bases = reversed(getattr(getattr(sys.modules.get(module), name, None), "__mro__", ()))
    every = [parameter for base in bases for parameter in inspect.signature(base.__init__).parameters.values()]
    plain = {p.name: list(p.default) if isinstance(p.default, tuple) else p.default for p in every}
    return {name: value for name, value in plain.items() if isinstance(value, bool | int | float | str | list | None)}
