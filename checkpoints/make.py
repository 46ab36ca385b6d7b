"""Make the reference checkpoint of a recipe, and print its row of the table in this folder's README.

    python checkpoints/make.py vae_digits

trains the recipe as it is, keeps weights and recipe of the last checkpoint in ``checkpoints/vae_digits.ckpt`` (its SHA-256
beside it), and measures that file by the command in the row. With ``--measure`` it only measures; with ``--certify`` it puts the
gap's solver of the recipe and a new calibration of the answers into the file, whose weights stay as they are.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import yaml

import amortized
from amortized import checkpoint
from amortized.cli.app import main
from amortized.cli.parsing import full_names
from amortized.cli.recipes import recipes

FOLDER = Path(__file__).parent
QUIET = ("--budget.enabled=false", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false")


def command(recipe: str) -> str:
    """How to measure a reference checkpoint, from the root of a clone."""
    return f"amortized test -c {recipe} --ckpt_path checkpoints/{recipe}.ckpt"


def make(recipe: str) -> None:
    """Train a recipe and keep its last checkpoint, stripped."""
    with tempfile.TemporaryDirectory() as folder:
        main(["fit", "-c", recipe, "--run_folder", folder, *QUIET])
        checkpoint.strip(max(Path(folder, "checkpoints").glob("step=*.ckpt")), FOLDER / f"{recipe}.ckpt")


def certify(recipe: str) -> None:
    """Put the gap's solver and a new calibration into a reference checkpoint."""
    path = FOLDER / f"{recipe}.ckpt"
    held = checkpoint.load(path)
    held.pop(checkpoint.CERTIFICATE, None)
    held[checkpoint.SOLVER] = full_names(yaml.safe_load(recipes()[recipe].read_text()))["gap"].get("solver")
    checkpoint.save(held, path)
    try:
        held[checkpoint.CERTIFICATE] = amortized.load(path).calibration.state()
    except amortized.ProblemError as error:  # data that are not here
        print(f"{recipe} has no certificate: {error}", file=sys.stderr)
    checkpoint.save(held, path)


def measure(recipe: str) -> str:
    """The row of the table."""
    path = FOLDER / f"{recipe}.ckpt"
    with tempfile.TemporaryDirectory() as folder:
        main(["test", "-c", recipe, "--ckpt_path", str(path), "--run_folder", folder, *QUIET])
        found = json.loads(Path(folder, "results.json").read_text())
    gap, rows = found["gap"], found["rows"]
    tolerance = max(0.05 * abs(gap["mean"]), 0.25 * gap["stderr"])
    size = f"{path.stat().st_size / 1024:.0f} KiB"
    converged = f"{rows['converged']:.1%} of {rows['total']}"
    return f"| {recipe} | `{command(recipe)}` | {gap['mean']:.4g} | {tolerance:.1g} | {converged} | {size} |"


if __name__ == "__main__":
    names = [name for name in sys.argv[1:] if not name.startswith("--")]
    for name in names:
        if "--certify" in sys.argv:
            certify(name)
        elif "--measure" not in sys.argv:
            make(name)
    print(*map(measure, names), sep="\n")
