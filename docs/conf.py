"""The site: ``sphinx-build -W -b html docs docs/_build`` (``pip install -e ".[docs]"``)."""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

project = "amortized"
copyright = "the authors of amortized; Apache-2.0"
release = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M)[1]
html_title = f"amortized {release}"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax"]
exclude_patterns = ["_build"]

# Markdown: mathematics between dollars, headings that can be linked to.
myst_enable_extensions = ["dollarmath", "colon_fence", "deflist"]
myst_heading_anchors = 3

# Docstrings: those of the classes that a user names, in the order of their files.
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True, "show-inheritance": True, "exclude-members": "training_step, forward"}
autodoc_preserve_defaults = True
autodoc_inherit_docstrings = False  # Lightning's are written for its own site
napoleon_use_ivar = True
napoleon_use_rtype = False
add_module_names = False
python_maximum_signature_line_length = 100

html_theme = "furo"
html_static_path: list[str] = []
html_show_sphinx = False


def recipe_table() -> str:
    """The recipes as their first lines tell them, in Markdown."""
    from amortized.cli.recipes import header, recipes

    lines = ["| recipe | what it shows | trains in | gap | needs |", "| --- | --- | --- | --- | --- |"]
    for name, path in recipes().items():
        told = header(path)
        cells = (f"`{name}`", told.shows, told.time, told.gap, told.needs)
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines)


def setup(app):  # noqa: ANN001, ANN201
    """The table of recipes is made when the page is read, and the contents name pages that there are."""

    def fill(app, name, source):  # noqa: ANN001, ANN202
        if name == "recipes":
            source[0] = source[0].replace("% recipes", recipe_table())
        if name == "index":  # of a pattern without a page Sphinx warns
            lines = source[0].splitlines()
            there = [
                line for line in lines if not re.fullmatch(r"\w+\*", line) or any((ROOT / "docs").glob(f"{line}.md"))
            ]
            source[0] = "\n".join(there)

    app.connect("source-read", fill)
