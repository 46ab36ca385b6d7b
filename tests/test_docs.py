"""The site: its Python runs, its commands are of recipes and benchmarks that there are, its links lead somewhere."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from amortized.cli.help_text import COMMANDS, STARTING
from amortized.cli.recipes import recipes

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))


@pytest.fixture(params=PAGES, ids=[page.stem for page in PAGES])
def page(request):
    return request.param.read_text(encoding="utf-8")


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page, re.S | re.M)


@pytest.mark.parametrize("name", [page.stem for page in PAGES if blocks(page.read_text(encoding="utf-8"), "python")])
def test_the_python_of_a_page_runs(name, monkeypatch):
    monkeypatch.syspath_prepend(".")
    told, page = {"__name__": name}, (DOCS / f"{name}.md").read_text(encoding="utf-8")
    files = {
        code: file for file, code in re.findall(r"Save this as `(\w+)\.py`:\n\n```python\n(.*?)^```", page, re.S | re.M)
    }
    for code in blocks(page, "python"):
        if code in files:
            monkeypatch.delitem(sys.modules, files[code], raising=False)
            Path(f"{files[code]}.py").write_text(code)
            continue
        if "import ray" in code:  # on a cluster: test_ship_ray.py
            continue
        if 'load("runs/ellipse")' in code:
            train_the_ellipse()
        if 'load("sphere.pt2")' in code:
            export_the_sphere()
        exec(code, told)


def export_the_sphere():
    from amortized.cli import main

    main(["export", "-c", "sphere", f"--ckpt_path={ROOT / 'checkpoints' / 'sphere.ckpt'}", "--format=torch"])


def train_the_ellipse():
    from amortized.cli import main

    quick = ["--trainer.max_steps=100", "--trainer.enable_progress_bar=false", "--budget.enabled=false"]
    main(["fit", "--model=ellipse.Ellipse", "--data=ellipse.Ellipses", "--run_folder=runs/ellipse", *quick])


def test_the_commands_of_a_page_are_there(page):
    text = page.replace("\n", " ")
    commands = {*COMMANDS, *STARTING}
    for line in "\n".join(blocks(page, "bash")).splitlines():
        if line.startswith("amortized "):
            assert line.split()[1] in commands, line
    for name in re.findall(r"amortized fit -c ([\w/.]+)", text):
        assert name in recipes() or name.endswith(".yaml") or name in ("NAME", "RECIPE"), name
    for module in re.findall(r"python -m (benchmarks\.\w+)", text):
        assert find_spec(module), module


def test_the_links_of_a_page_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#:]+)(?:#[\w-]+)?\)", page):
        assert (DOCS / target).exists(), target


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    for package in ("sphinx", "furo", "myst_parser"):
        pytest.importorskip(package, reason="the site needs amortized[docs]")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", str(DOCS), str(tmp_path)]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    built = subprocess.run(command, capture_output=True, text=True, env=env)
    assert built.returncode == 0, built.stderr
    assert "<td><p><code" in (tmp_path / "recipes.html").read_text(encoding="utf-8")
