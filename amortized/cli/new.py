"""``amortized new PROBLEM``: a problem, its recipe and its test, which pass as they are, to change into one's own."""

from __future__ import annotations

import importlib.util
import keyword
import re
from pathlib import Path
from string import Template

from amortized.cli.errors import UsageError

TEMPLATES = Path(__file__).parent / "template"
"""Files with ``$module`` and ``$Problem`` in place of the names."""

FILES = {
    "problem.py.txt": ("{module}.py", "the problem: change objective(b, a), and sample(n, generator)"),
    "recipe.yaml.txt": ("{module}.yaml", "the recipe: network, steps, and the solver that the gap is against"),
    "test.py.txt": ("test_{module}.py", "its test: the contract, and a short training"),
}
"""Of each template the file that it becomes, and what that is."""


def new(problem: str, folder: Path) -> str:
    """Write the files of a new problem, and say what to do with them.

    Args:
        problem: its name, ``Portfolio`` or ``inverse_kinematics``.
        folder: where to.

    Raises:
        UsageError: if that is no name, is one that Python or an installed package has, or a file of it is there already.
    """
    names = named(problem)
    files = {template: folder / name.format(**names) for template, (name, _) in FILES.items()}
    if there := [path.name for path in files.values() if path.exists()]:
        raise UsageError(
            f"{' and '.join(there)} {'is' if len(there) == 1 else 'are'} here already: name another problem"
        )
    if importlib.util.find_spec(names["module"]) is not None:
        raise UsageError(
            f"{names['module']}.py would hide the installed module {names['module']}: name another problem"
        )
    for template, path in files.items():
        text = (TEMPLATES / template).read_text(encoding="utf-8")
        path.write_text(Template(text).substitute(names), encoding="utf-8")
    width = max(len(path.name) for path in files.values()) + 2
    lines = [f"{path.name:<{width}}{FILES[template][1]}" for template, path in files.items()]
    module = names["module"]
    return "\n".join(
        [
            *lines,
            "",
            f"next: pytest test_{module}.py             it passes as it is, and says what breaks",
            f"      amortized fit -c {module}.yaml      train, and measure the gap; a minute",
            "",
        ]
    )


def named(problem: str) -> dict[str, str]:
    """A problem's name as a class (``$Problem``), as a module (``$module``) and in words (``$words``).

    Raises:
        UsageError: if it is no name.
    """
    words = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z0-9]+|[0-9]+", problem)
    module = "_".join(words).lower()
    given = problem.replace("-", "_").isidentifier()
    if not given or not module.isidentifier() or keyword.iskeyword(module):
        raise UsageError(
            f"a problem's name has letters, digits and _, as Portfolio or inverse_kinematics; got {problem!r}"
        )
    return {
        "Problem": "".join(word[0].upper() + word[1:] for word in words),
        "module": module,
        "words": " ".join(words).lower(),
    }
