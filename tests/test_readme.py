"""What the README tells a newcomer to do, done."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from amortized.cli import main
from amortized.cli.recipes import header, recipes

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
CODE = re.findall(r"```python\n(.*?)```", README, re.S)


def test_the_new_problem_trains_goes_on_predicts_and_answers_with_a_certificate(monkeypatch):
    monkeypatch.delitem(sys.modules, "ellipse", raising=False)
    code, use = CODE
    assert len(code.strip().splitlines()) <= 24
    Path("ellipse.py").write_text(code)
    np.save("points.npy", torch.cat([torch.randn(5, 2), torch.ones(5, 2)], 1).numpy())
    commands = [line.split()[1:] for line in README.splitlines() if line.startswith("amortized ") and "ellipse" in line]
    assert [command[0] for command in commands] == ["fit", "fit", "predict"]
    shorter = {"2000": "200", "3000": "300"}
    for command in commands:
        main(
            [shorter.get(word, word) for word in command]
            + ["--trainer.enable_progress_bar=false", "--budget.enabled=false"]
        )
    assert json.loads(Path("runs/ellipse/results.json").read_text())["rows"]["total"] == 1024
    on_circle = np.load(next(Path("runs").rglob("predictions.npz")))["decoded"]
    assert np.allclose((on_circle**2).sum(1), 1, atol=1e-5)
    monkeypatch.syspath_prepend(".")
    told = {}
    exec(use, told)
    answer = told["answer"]
    told_decoded = torch.tensor(json.loads(re.search(r"answer.decoded +# (\[.*\])", use)[1]))
    assert torch.allclose(answer.decoded, told_decoded, atol=1e-3)
    assert answer.path[1] == "solver"
    assert answer.certificate.isnan().tolist() == [False, True]


def test_its_commands_are_those_of_the_command_line(capsys):
    told = re.findall(r"`amortized (\w+)", README) + re.findall(r"^amortized (\w+)", README, re.M)
    for command in set(told):
        with pytest.raises(SystemExit) as stop:
            main([command, "--help"])
        assert not stop.value.code
        assert "usage: amortized" in capsys.readouterr().out


def test_the_first_command_of_the_readme_is_the_one_that_is_tested_to_train():
    first, second = re.findall(r"^python3.11 .*", README, re.M)
    assert first.endswith("amortized fit -c vae_digits")  # as .ci/run does, which takes the second from here
    assert first.rsplit(" && ", 1)[0] == second.rsplit(" && ", 1)[0]


def test_the_table_of_fields_has_recipes_with_the_gaps_of_their_headers():
    rows = re.findall(r"^\| .*?\| .*?\| \[`(\w+)`\]\(recipes/\w+.yaml\)(.*?)\| ([\d.]+ ± [\d.]+)", README, re.M)
    assert len(rows) >= 6
    for name, others, gap in rows:
        assert header(recipes()[name]).gap == gap, name
        assert set(re.findall(r"`(\w+)`", others)) <= set(recipes())


def test_it_is_a_front_page():
    assert len(README.splitlines()) <= 125
    for target in re.findall(r"\]\(([^)#:]+)(?:#[\w-]+)?\)", README) + re.findall(r'src="([^"]+)"', README):
        assert (ROOT / target).exists(), target
