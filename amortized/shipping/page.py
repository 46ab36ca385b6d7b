"""The page at ``/`` of a server: what it solves, how to ask it, and a place to try."""

from __future__ import annotations

from html import escape
from typing import Any

STYLE = """
body { max-width: 860px; margin: 0 auto; padding: 32px 20px 64px; color: #1b2330;
  font: 16px/1.55 system-ui, "Segoe UI", Roboto, Helvetica, Arial, sans-serif; }
h1 { margin: 0; font-size: 1.8rem; } h2 { margin: 36px 0 6px; font-size: 1.15rem; } p { color: #5d6879; }
table { border-collapse: collapse; } td { padding: 4px 18px 4px 0; vertical-align: top; } td:first-child { color: #5d6879; }
pre, textarea { width: 100%; background: #f5f7fa; border: 1px solid #e3e7ee; border-radius: 8px; padding: 12px 14px;
  font: .85rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; overflow-x: auto; box-sizing: border-box; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; } textarea { min-height: 110px; }
button { font: inherit; padding: 8px 22px; border: 0; border-radius: 8px; background: #1f4e8c; color: #fff; cursor: pointer; }
"""

SCRIPT = """
const short = (key, value) => Array.isArray(value) && value.length > 16
  ? [...value.slice(0, 16), `... ${value.length} in all`] : value;
document.getElementById("try").onclick = async () => {
  const out = document.getElementById("answer"), began = performance.now();
  out.textContent = "...";
  try {
    const reply = await fetch("solve", {method: "POST", body: document.getElementById("contexts").value});
    const text = JSON.stringify(await reply.json(), short, 1).replace(/\\n\\s+(?=-?[\\d"tfn\\]])/g, " ");
    out.textContent = `${reply.status}, ${(performance.now() - began).toFixed(0)} ms\\n${text}`;
  } catch (error) { out.textContent = String(error); }
};
"""


def page(about: dict[str, Any], example: str) -> str:
    """The HTML, whole.

    Args:
        about: what ``/info`` says.
        example: one context, as JSON.
    """
    certificate = about["certificate"]
    confidence = f"{1 - certificate['alpha']:.0%}"
    facts = {
        "problem": about["problem"],
        "tolerance": f"{about['tol']:g}, in the unit of the {about['objective']}",
        "gap of the network": f"{about['gap']:.4g}, mean over validation contexts",
        "certificate": f"{certificate['kind']}: holds for {confidence} of contexts; calibrated on {certificate['calibrated_on']}",
        "it assumes that": certificate["assumption"],
        "contexts": ", ".join(f"{name} ({', '.join(map(str, shape))})" for name, shape in about["contexts"].items()),
        "limits": f"{about['limits']['rows']} contexts and {about['limits']['megabytes']:g} MB in a request",
    }
    shown = example if len(example) < 400 else "@contexts.json"
    curl = f"curl -X POST http://HOST:PORT/solve -d '{shown}'"
    python = (
        "import httpx\n\n"
        f"contexts = {example if len(example) < 400 else '...'}\n"
        'answer = httpx.post("http://HOST:PORT/solve", json=contexts, timeout=60).json()\n'
        'answer["b"], answer["certificate"], answer["path"]'
    )
    rows = "".join(f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>" for name, value in facts.items())
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(about['recipe'])}</title><style>{STYLE}</style></head><body>"
        f"<h1>{escape(about['recipe'])}</h1>"
        "<p>A trained solver: contexts in, solutions out, each with a bound on what it lacks.</p>"
        f"<table>{rows}</table>"
        "<h2>Ask it</h2><p>One context, or a list of them for each field; a .npz file too.</p>"
        f'<pre id="curl">{escape(curl)}</pre><pre id="python">{escape(python)}</pre>'
        "<h2>Try it</h2>"
        f'<textarea id="contexts" aria-label="contexts">{escape(example)}</textarea>'
        '<p><button id="try">solve</button></p><pre id="answer" aria-live="polite">the answer comes here</pre>'
        f"<script>document.body.innerHTML = document.body.innerHTML.replaceAll('HOST:PORT', location.host);{SCRIPT}</script>"
        "</body></html>"
    )
