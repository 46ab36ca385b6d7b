"""What ``--help`` prints: a screen, with pointers to the rest."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable

from amortized.cli.errors import UsageError, close

GROUPS = {
    "model": "the problem and its network: --model CLASS, then --model.SETTING; --model.help CLASS lists a class's own",
    "data": "contexts, batches, workers: --data CLASS, then --data.SETTING; --data.help CLASS",
    "trainer": "Lightning's Trainer: steps, devices, precision, loggers, callbacks",
    "gap": "the amortization gap: its solver and how much time it may take",
    "budget": "what solvers need to reach the network's quality",
    "certificate": "the bound on what a prediction lacks, calibrated after training",
    "checkpoint": "how often checkpoints are saved and how many are kept",
}
"""The groups of options, with what they are about."""


def help_text(command: str, whole: str, recipes: Iterable[str], topic: str | None = None) -> str:
    """The help of a command: on one screen, or a group of options of its own, or all of them.

    Args:
        command: ``fit``, for example.
        whole: the help of its parser.
        recipes: names of the packaged ones.
        topic: a group, or ``all``.

    Raises:
        UsageError: if there is no such group.
    """
    if topic == "all":
        return whole
    entries = [text for text in re.split(r"\n(?=  -)|\n\n", whole) if text.startswith("  -")]
    if topic is not None:
        if topic not in GROUPS:
            raise UsageError(f"no group of options {topic!r}{close(topic, GROUPS)}; there are {', '.join(GROUPS)}, all")
        head = re.compile(rf"  --{topic}[ .]")
        return "\n".join([f"{topic}: {GROUPS[topic]}", "", *filter(head.match, entries), ""])
    lines = [f"usage: amortized {command} [-c RECIPE] [--model CLASS --data CLASS] [--SETTING VALUE]", ""]
    lines += textwrap.wrap(f"Recipes: {', '.join(recipes)}, or the path of a YAML file. {TRUST} {IMPORTS}", 80)
    lines += ["", "options:"]
    for text in entries:
        name, about = re.match(r"  ([^\s,]+)[^\n]*?(?:\s{2,}|\n\s+)(.*)", text, re.DOTALL).groups()  # type: ignore[union-attr]
        if "." not in name and name[2:] not in GROUPS:
            about = re.split(r"\. | \(type", re.sub(r"\s+", " ", about))[0].rstrip(".")
            lines += textwrap.wrap(f"{name:<18}{about}", 78, initial_indent="  ", subsequent_indent=" " * 20)
    lines += ["", "groups of options:"]
    for name, about in GROUPS.items():
        lines += textwrap.wrap(f"{f'--{name}.*':<18}{about}", 78, initial_indent="  ", subsequent_indent=" " * 20)
    more = f"amortized {command} --help GROUP lists a group, --help all everything; "
    more += "--print_config prints every setting with its value."
    return "\n".join([*lines, "", *textwrap.wrap(more, 80), ""])


TRUST = "A recipe is code: it can name any class that can be imported. Run only those you trust."
IMPORTS = "Classes in files of the working directory can be named too: circle.Ellipse is the one in circle.py."
COMMANDS = {
    "fit": "train a model, then measure it on the test contexts",
    "validate": "measure a trained model on the validation contexts",
    "test": "measure a trained model on the test contexts, with a report",
    "predict": "write the solutions of given contexts to a file",
    "export": "write prediction, objective and certificate as one graph",
    "serve": "solve contexts that come by HTTP",
    "solve": "solve any number of contexts into a folder of shards, certified",
}
STARTING = {
    "list": "the recipes that come with it: what each shows, minutes, gap",
    "copy": "a recipe as a file of yours, to change",
    "new": "a problem of your own: its file, recipe and test, to change",
}
"""Commands that are answered at once."""


def top_help() -> str:
    """The help of the command line itself."""
    about = (
        "Amortized optimization: train a network to solve min_b L(b; a) for any context a, and measure what it lacks."
    )
    about = f"{about} {IMPORTS}"
    first, commands = ([f"  {name:<10}{what}" for name, what in some.items()] for some in (STARTING, COMMANDS))
    start = ["usage: amortized COMMAND -c RECIPE [--SETTING VALUE ...]", "", *textwrap.wrap(about, 80), ""]
    more = ["amortized COMMAND --help tells more; amortized --version says which this is.", ""]
    more += ["first: amortized fit -c vae_digits     half a minute, no data or account needed", ""]
    return "\n".join([*start, "to start:", *first, "", "to work:", *commands, "", *more])
