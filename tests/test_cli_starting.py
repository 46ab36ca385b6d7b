"""The commands that start something new: what they write works as it stands, and each says what to do next."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from test_cli import FAST

from amortized.cli import main
from amortized.cli.help_text import STARTING
from amortized.cli.new import named
from amortized.cli.recipes import header, recipes


def said(args, capsys):
    with pytest.raises(SystemExit) as stop:
        main(args)
    assert stop.value.code == 0
    return capsys.readouterr().out


def refused(args, capsys):
    with pytest.raises(SystemExit) as stop:
        main(args)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_list_tells_of_every_recipe_what_its_header_says(capsys):
    out = said(["list"], capsys)
    for name, path in recipes().items():
        told = header(path)
        assert all((told.shows, told.time, told.gap)), f"the header of {name} lacks one of {told}"
        (line,) = [line for line in out.splitlines() if re.match(rf"{name}\s", line)]
        assert told.time in line
        assert told.gap in line
        assert line.endswith(told.needs or "-")
    assert all(len(line) <= 110 for line in out.splitlines())
    assert "next: amortized fit -c vae_digits" in out


def test_list_of_a_word_has_whole_sentences(capsys):
    out = said(["list", "TWO_moons"], capsys)
    assert "slcp" not in out
    assert header(recipes()["two_moons"]).shows in " ".join(out.split())
    assert "no recipe has 'two_mons'" in (line := refused(["list", "two_mons"], capsys))
    assert "did you mean two_moons" in line


@pytest.mark.parametrize(
    ("name", "needs"), [("vae_mnist", "the MNIST files"), ("transport_digits", ""), ("slcp", "amortized[flows]")]
)
def test_what_a_recipe_needs_is_read_from_its_header(name, needs):
    assert header(recipes()[name]).needs == needs


def test_copy_gives_the_recipe_as_a_file_that_the_command_line_takes(capsys):
    out = said(["copy", "vae_digits"], capsys)
    assert "next: amortized fit -c vae_digits.yaml" in out
    text = Path("vae_digits.yaml").read_text()
    assert yaml.safe_load(text) == yaml.safe_load(recipes()["vae_digits"].read_text())
    assert "#   amortized fit -c vae_digits.yaml\n" in text
    said(["fit", "-c", "vae_digits.yaml", "--print_config"], capsys)
    Path("vae_digits.yaml").write_text("mine")
    assert "is here already" in refused(["copy", "vae_digits"], capsys)
    assert Path("vae_digits.yaml").read_text() == "mine"
    assert "did you mean vae_digits" in refused(["copy", "vae_digit"], capsys)
    assert "required: NAME; amortized copy --help" in refused(["copy"], capsys)


def test_a_new_problem_passes_its_own_test_and_trains(capsys):
    out = said(["new", "InverseKinematics"], capsys)
    files = {"inverse_kinematics.py", "inverse_kinematics.yaml", "test_inverse_kinematics.py"}
    assert {path.name for path in Path().iterdir()} == files
    assert all(name in out for name in files)
    assert "next: pytest test_inverse_kinematics.py" in out
    assert "class InverseKinematics(AmortizedModule)" in Path("inverse_kinematics.py").read_text()
    for name in files:
        assert "$" not in Path(name).read_text()
    ruff = [sys.executable, "-m", "ruff", "check", "--isolated", "--line-length=120", "."]
    assert subprocess.run(ruff, capture_output=True, text=True).returncode == 0
    main(
        [
            "fit",
            "-c",
            "inverse_kinematics.yaml",
            "--run_folder=run",
            "--budget.enabled=false",
            "--data.num_test=8",
            *FAST,
        ]
    )
    assert "next: run/report.html" in capsys.readouterr().out
    assert json.loads(Path("run/results.json").read_text())["rows"]["total"] == 8
    assert Path("run/pictures/solutions.png").stat().st_size > 10_000
    told = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"], capture_output=True, text=True
    )
    assert "2 passed" in told.stdout, told.stdout


def test_a_new_problem_replaces_nothing_and_hides_nothing(capsys):
    Path("portfolio.yaml").write_text("mine")
    assert refused(["new", "Portfolio"], capsys) == "error: portfolio.yaml is here already: name another problem"
    assert [path.name for path in Path().iterdir()] == ["portfolio.yaml"]
    assert "would hide the installed module torch" in refused(["new", "torch"], capsys)
    for wrong in ("3d", "a.b", "class", "../up", ""):
        assert "a problem's name has letters" in refused(["new", wrong], capsys)


@pytest.mark.parametrize(
    ("given", "module", "problem"),
    [
        ("portfolio", "portfolio", "Portfolio"),
        ("inverse-kinematics", "inverse_kinematics", "InverseKinematics"),
        ("OPFlow", "op_flow", "OPFlow"),
        ("MyQP", "my_qp", "MyQP"),
        ("qp2d", "qp2d", "Qp2d"),
    ],
)
def test_names(given, module, problem):
    assert (named(given)["module"], named(given)["Problem"]) == (module, problem)


def test_the_version_is_that_of_what_a_result_depends_on(capsys):
    out = said(["--version"], capsys)
    assert re.match(r"amortized(,| \d).* \(torch \d.*, lightning \d.*, Python 3\.", out)


def test_help_fits_a_screen_and_names_every_command(capsys):
    out = said(["--help"], capsys)
    assert len(out.splitlines()) <= 24
    assert all(f"  {command} " in out for command in (*STARTING, "fit", "predict"))
    for command in STARTING:
        assert f"usage: amortized {command}" in said([command, "--help"], capsys)


@pytest.mark.parametrize("args", [["list"], ["--version"], ["copy", "sphere"], ["new", "mine"]])
def test_none_of_them_loads_anything_heavy(args):
    code = (
        f"import sys; from amortized.cli import main\ntry: main({args})\nfinally: print(*sys.modules, file=sys.stderr)"
    )
    start = time.perf_counter()
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert time.perf_counter() - start < 5  # a tenth of that, on a machine that does nothing else
    assert not set(told.stderr.split()) & {"torch", "lightning", "matplotlib", "jsonargparse"}
