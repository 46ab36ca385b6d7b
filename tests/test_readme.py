"""What the README tells a newcomer to do, done."""

import json
import re
from pathlib import Path

import numpy as np
import torch

from amortized.cli.app import main
from amortized.cli.recipes import recipes

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_the_new_problem_trains_resumes_and_predicts():
    code = re.search(r"```python\n(.*?)```", README, re.S)[1]
    assert len(code.strip().splitlines()) <= 30
    Path("circle.py").write_text(code)
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
    predictions = next(Path("runs").rglob("predictions.npz"))
    on_circle = np.load(predictions)["decoded"]
    assert np.allclose((on_circle**2).sum(1), 1, atol=1e-5)


def test_the_refined_model_of_the_readme():
    flags = re.search(r"`(--model.refine GradientDescent.*?)`", README)[1].split()
    main(
        [
            "fit",
            "--model=toy.Quadratic",
            "--data=toy.Gaussians",
            *flags,
            "--trainer.max_steps=3",
            "--data.num_test=32",
            "--trainer.enable_progress_bar=false",
            "--budget.enabled=false",
        ]
    )


def test_the_table_of_recipes_is_that_of_the_folder_and_of_the_headers():
    rows = dict(re.findall(r"^\| \[`(\w+)`\]\(recipes/\w+.yaml\) .*?\| ([\d.]+ ± [\d.]+)", README, re.M))
    assert set(rows) == set(recipes())
    for name, path in recipes().items():
        assert re.search(r"expected gap: ([\d.]+ ± [\d.]+)", path.read_text())[1] == rows[name], name
