"""From a command line or recipe to settings: short names of classes, and one line for what cannot be read."""

from __future__ import annotations

import contextlib
import functools
import importlib
import re
import sys
import textwrap
from collections.abc import Iterable
from typing import Any

import torch
import yaml
from jsonargparse import get_loader, set_dumper, set_loader
from lightning.pytorch.cli import LightningArgumentParser

from amortized.cli.errors import UsageError, close
from amortized.contexts.data_module import ContextDataModule
from amortized.contexts.solutions import SolutionSet
from amortized.contract import faults
from amortized.losses.distances import Distance
from amortized.losses.objective import Loss
from amortized.module import AmortizedModule
from amortized.solvers import Solver

NAMED = ("model", "data", "gap", "budget")
"""Settings with classes in them, which may be given by their short names."""

MAX_CHARACTERS, MAX_DEPTH = 1_000_000, 100


def read(text: str) -> Any:
    """A recipe or a single setting, from YAML; the project's own classes under their full names.

    Raises:
        UsageError: for aliases (``*name``), by which a file of a few lines can stand for gigabytes, and for what is longer
            than a megabyte or nested more than a hundred times.
    """
    if len(text) > MAX_CHARACTERS:
        raise UsageError(f"a recipe or setting of {len(text):,} characters; at most {MAX_CHARACTERS:,} are read")
    if "*" in text or len(text) > MAX_DEPTH:
        with contextlib.suppress(yaml.YAMLError):  # the loader will say what it is
            _check_events(text)
    return full_names(get_loader("yaml")(text))


def _check_events(text: str) -> None:
    depth = 0
    for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        if isinstance(event, yaml.AliasEvent):
            raise UsageError("YAML aliases (*name) are not read: write out what they stand for")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise UsageError(f"a recipe or setting is nested more than {MAX_DEPTH} times")


def full_names(settings: Any, named: bool = False) -> Any:
    """Settings in which a short name of a class of ours is its full one, so that it means ours where a library has one too."""
    if isinstance(settings, dict):
        return {k: full_names(v, named or k in NAMED or k == "class_path") for k, v in settings.items()}
    if isinstance(settings, list):
        return [full_names(value, named) for value in settings]
    return short_names().get(settings, settings) if named and isinstance(settings, str) else settings


def full_options(words: list[str]) -> list[str]:
    """The same of what was typed: ``--model VAE`` and ``--model=VAE``."""
    options = [word.partition("=")[0] for word in words]
    named = [option.startswith("--") and option[2:].split(".")[0] in NAMED for option in options]
    found = []
    for at, word in enumerate(words):
        option, equals, value = word.partition("=")
        if named[at] and equals:
            word = f"{option}={full_names(value, True)}"
        elif at and named[at - 1] and "=" not in words[at - 1]:
            word = full_names(word, True)
        found.append(word)
    return found


@functools.cache
def short_names() -> dict[str, str]:
    """Full names by the short names that one class of ours has, and no optimizer."""
    ours: dict[str, set[str]] = {}
    for base in _bases():
        for cls in _subclasses(base):
            ours.setdefault(cls.__name__, set()).add(_path(cls))
    theirs = {name for module in (torch.optim, torch.optim.lr_scheduler) for name in vars(module)}
    return {name: paths.pop() for name, paths in ours.items() if len(paths) == 1 and name not in theirs}


def _path(cls: type) -> str:
    """The shortest full name of a class: that of the outermost package which has it."""
    parts = cls.__module__.split(".")
    packages = [".".join(parts[:n]) for n in range(1, len(parts))]
    module = next((p for p in packages if getattr(sys.modules[p], cls.__name__, None) is cls), cls.__module__)
    return f"{module}.{cls.__qualname__}"


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def write(settings: Any) -> str:
    """Settings as YAML that :func:`read` reads."""
    text: str = yaml.dump(settings, Dumper=_Dumper, default_flow_style=False, allow_unicode=True, sort_keys=False)
    return text


set_loader("recipe", read, (yaml.YAMLError,))

set_dumper("recipe", write)


class Parser(LightningArgumentParser):
    """Says what is wrong in one line, with the names that come close; its help fits a screen."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("allow_abbrev", False)
        kwargs.setdefault("parser_mode", "recipe")
        super().__init__(*args, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> Any:
        cause = None if ex is None else faults.origin(ex)
        if cause is not None and faults.place(cause):  # a file of the user's fails as it is imported
            raise UsageError(f"{faults.describe(cause)}; AMORTIZED_DEBUG=1 shows the whole traceback") from ex
        raise UsageError(cause_of(message, self.options()))

    def options(self) -> list[str]:
        """The names of its settings."""
        return list(self.get_defaults().keys())

    def format_help(self, *args: Any, **kwargs: Any) -> str:
        return _ours_first(super().format_help(*args, **kwargs))


def _ours_first(text: str) -> str:
    """A help text whose lists of known classes name ours alone, where there are any, and how many others there are."""

    def shorter(found: re.Match[str]) -> str:
        names = re.split(r",\s+", found[1])
        ours = [name for name in names if name.startswith("amortized.")]
        if not ours or len(ours) == len(names):
            return found[0]
        listed = f"known subclasses: {', '.join(ours)}, and {len(names) - len(ours)} of other libraries)"
        indent = " " * 24
        return "\n" + textwrap.fill(listed, 79, initial_indent=indent, subsequent_indent=indent)

    return re.sub(r"\s+known\s+subclasses:\s+([^()]*)\)", shorter, text)


def cause_of(message: str, options: Iterable[str] = ()) -> str:
    r"""One line from jsonargparse's report: the setting, what is wrong with it, and the names that come close.

    >>> print(cause_of('Parser key "model":\n  Does not validate against\n  Errors:\n    - latent: Expected an int'))
    model: latent: Expected an int
    >>> print(cause_of("unrecognized arguments: --trainer.max_step 5", ["trainer.max_steps", "trainer.max_time"]))
    there is no option --trainer.max_step (did you mean --trainer.max_steps or --trainer.max_time?)
    """
    lines = [line.strip().lstrip("- ") for line in message.splitlines() if line.strip()]
    if unknown := re.match(r"unrecognized arguments: (--?[^\s=]+)", message):
        return f"there is no option {unknown[1]}{close(unknown[1], [f'--{option}' for option in options])}"
    setting = ".".join(key for line in lines for key in re.findall(r'Parser key "([^"]+)"', line))
    around = r"Parser key|Does not validate|Subtypes:|Errors:|Given value|Expected a path|Expected a <class 'NoneType'>"
    text = "; ".join(dict.fromkeys(line for line in lines if not re.match(around, line))) or lines[0]
    text = text.replace(":; ", ": ")
    if name := re.search(r"Expected a dot import path string: (\S+)", text):
        classes = [cls.__name__ for base in _bases() for cls in _subclasses(base)]
        text = f"there is no class {name[1]!r}{close(name[1], classes)}"
    elif name := re.fullmatch(r"Option '(\w+)' is not accepted", text):  # by the parser of one class: these are its own
        text += close(name[1], {option.split(".")[-1] for option in options})
    elif "Expected an instantiatable class, but is abstract" in text:
        given = re.search(r"Given value: (\S+)", message)
        text = _abstract(given[1] if given else "")
    return f"{setting}: {text}" if setting else text


def _abstract(path: str) -> str:
    module, _, name = short_names().get(path, path).rpartition(".")
    try:
        missing = sorted(getattr(importlib.import_module(module), name).__abstractmethods__)
    except (ImportError, AttributeError, ValueError):
        missing = []
    what = "objective(b, a)" if missing == ["objective"] else " and ".join(missing) or "its abstract methods"
    return f"{path or 'the class'} is abstract: write {what}"


def _bases() -> tuple[type, ...]:
    return AmortizedModule, ContextDataModule, SolutionSet, Solver, Loss, Distance, torch.nn.Module


def _subclasses(cls: type) -> list[type]:
    children: list[type] = cls.__subclasses__()
    below = [c for child in children for c in (child, *_subclasses(child))]
    return [c for c in below if c.__module__.startswith("amortized")]
