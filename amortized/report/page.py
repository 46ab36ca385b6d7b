"""``report.html``: one file that shows what a run found and how to make it again; it needs no network and no script."""

from __future__ import annotations

import base64
from collections.abc import Iterable
from html import escape
from pathlib import Path

CAPTIONS = {
    "curves": ("Training", "The training signal and the objective on validation contexts; the gap there."),
    "gap": (
        "The amortization gap",
        "How far the prediction is above the best that the solver finds, for each context.",
    ),
    "violation": (
        "Gap and violation",
        "Each context that has a feasible solution: how far the prediction is above it, against what it violates. A point "
        "right of the dotted line is infeasible: its gap means nothing, though it be below 0.",
    ),
    "budget": (
        "Time and evaluations",
        "Solid: solvers started cold. Dashed: the same from the prediction, the network's time included. Star and dotted "
        "line: the network. Below: rows that lack at most the tolerance (see All numbers) of what the cold start lacks. "
        "Rows that a solver never solves keep its curve below 100 %.",
    ),
    "solutions": (
        "Solutions",
        "The first contexts of the test, with what the network predicts and what the solver finds.",
    ),
    "worst": (
        "The worst contexts",
        "Those of the test with the largest gap, the largest first; * marks no finite gap. Where there are constraints, "
        "infeasible predictions come first, and last what no solver solved.",
    ),
}
"""The sections with pictures, in their order."""

STYLE = """
:root { color-scheme: light dark; --ink: #1b2330; --soft: #5d6879; --line: #e3e7ee; --accent: #1f4e8c;
  --page: #fff; --card: #f8fafc; --code: #f5f7fa; }
@media screen and (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ef; --soft: #a3adbb; --line: #333b47; --accent: #8fbcf5; --page: #14181f;
    --card: #1c222b; --code: #1c222b; }
  img { background: #fff; padding: 8px; border-radius: 8px; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, "Segoe UI", Roboto, Helvetica, Arial, sans-serif; }
main { max-width: 960px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { margin: 0; font-size: 1.9rem; line-height: 1.2; overflow-wrap: anywhere; }
h2 { margin: 48px 0 4px; font-size: 1.25rem; padding-top: 20px; border-top: 1px solid var(--line); }
p { margin: 0 0 14px; color: var(--soft); max-width: 72ch; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(165px, 1fr)); gap: 12px; margin: 24px 0 0; }
.card { border: 1px solid var(--line); border-radius: 10px; padding: 14px 16px; background: var(--card); }
.card b { display: block; font-size: 1.45rem; line-height: 1.3; color: var(--accent); font-variant-numeric: tabular-nums; }
.card span { display: block; font-size: .85rem; color: var(--soft); }
.card .what { color: var(--ink); font-weight: 600; }
img { display: block; max-width: 100%; height: auto; margin: 10px auto 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { padding: 6px 10px; border-bottom: 1px solid var(--line); text-align: right; }
th { color: var(--soft); font-weight: 600; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
.indent { padding-left: 30px; color: var(--soft); }
pre { background: var(--code); border: 1px solid var(--line); border-radius: 8px; padding: 12px 14px; overflow-x: auto;
  margin: 8px 0 18px; font: .82rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
pre.wrap { white-space: pre-wrap; overflow-wrap: anywhere; }
footer { margin-top: 40px; font-size: .85rem; color: var(--soft); }
@media (max-width: 640px) { .wide { min-width: 620px; } body { font-size: 15px; } }
@media print { pre { white-space: pre-wrap; } h2 { break-after: avoid; } img, .card { break-inside: avoid; } }
"""


def page(
    title: str,
    subtitle: str,
    cards: Iterable[tuple[str, str, str]],
    numbers: Iterable[tuple[str, str]],
    pictures: dict[str, Path],
    worst: list[dict[str, str]],
    command: str,
    recipe: str,
    footer: str,
    captions: dict[str, tuple[str, str]] | None = None,
) -> str:
    """The HTML, whole: styles and pictures are inside.

    Args:
        title: the run's name.
        subtitle: one line below it.
        cards: the headline figures: what, value, and what else to know.
        numbers: all figures, by label.
        pictures: PNG files by the names of :data:`CAPTIONS`; a section without one is left out.
        worst: rows of the table of the worst contexts.
        command: what was typed.
        recipe: every setting, as YAML.
        footer: versions and date.
        captions: heading and caption of pictures that :data:`CAPTIONS` has not, by name.
    """
    body = [
        f"<header><h1>{escape(title)}</h1><p>{escape(subtitle)}</p></header>",
        '<div class="cards">',
        *(
            f'<div class="card"><span class="what">{escape(what)}</span><b>{escape(value)}</b><span>{escape(more)}</span></div>'
            for what, value, more in cards
        ),
        "</div>",
    ]
    for name, (heading, caption) in {**CAPTIONS, **(captions or {})}.items():
        rows = worst if name == "worst" else []
        if name not in pictures and not rows:
            continue
        body.append(f'<section id="{name}"><h2>{heading}</h2><p>{caption}</p>')
        if rows:
            lines = [list(row.values()) for row in rows]
            body.append(_table(lines, head=list(rows[0])))
        if name in pictures:
            body.append(_image(pictures[name], heading))
        body.append("</section>")
    body += [
        '<section id="numbers"><h2>All numbers</h2><p>Also in results.json.</p>',
        _table([[label, value] for label, value in numbers]),
        '</section><section id="recipe"><h2>Recipe</h2>',
        f'<p>What was typed:</p><pre class="wrap">{escape(command)}</pre>' if command else "",
        f"<p>Every setting, as in config.yaml beside this file:</p><pre>{escape(recipe)}</pre>" if recipe else "",
        f"</section><footer>{escape(footer)}</footer>",
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><main>\n"
        + "\n".join(body)
        + "\n</main></body></html>\n"
    )


def _image(path: Path, alt: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    wide = "" if path.stem == "gap" else ' class="wide"'  # scrolls on a phone, rather than being too small to read
    return f'<div class="scroll"><img{wide} alt="{escape(alt)}" src="data:image/png;base64,{data}"></div>'


def _table(rows: list[list[str]], head: list[str] | None = None) -> str:
    """An indented first cell says that the row belongs to the one above."""
    top = "<tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in head) + "</tr>" if head else ""
    lines = []
    for first, *rest in rows:
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in rest)
        indent = ' class="indent"' if first.startswith(" ") else ""
        lines.append(f"<tr><td{indent}>{escape(first.strip())}</td>{cells}</tr>")
    return f'<div class="scroll"><table>{top}{"".join(lines)}</table></div>'
