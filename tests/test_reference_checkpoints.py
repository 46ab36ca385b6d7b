"""The reference checkpoints have the gaps that the table in ``checkpoints/README.md`` says they have."""

import json
import re
import shlex
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import yaml
from test_checkpoints import moved
from test_recipes import skip_without_data

from amortized import checkpoint
from amortized.cli.app import main
from amortized.cli.differences import differences, named, same_class, without
from amortized.cli.recipes import recipes

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "checkpoints"


class Row(NamedTuple):
    """Of the table: a recipe, how to measure its checkpoint, and what to find."""

    recipe: str
    command: str
    gap: float
    tolerance: float
    converged: float
    contexts: int
    kib: int


def table():
    pattern = r"\| (\w+) \| `(.*)` \| (.*) \| (.*) \| (.*)% of (\d+) \| (\d+) KiB \|"
    rows = [re.fullmatch(pattern, line) for line in (FOLDER / "README.md").read_text().splitlines()]
    kinds = (str, str, float, float, float, int, int)
    return [Row(*(kind(x) for kind, x in zip(kinds, row.groups(), strict=True))) for row in rows if row]


def test_the_table_lists_every_checkpoint():
    assert sorted(row.recipe for row in table()) == sorted(path.stem for path in FOLDER.glob("*.ckpt"))
    assert table()


@pytest.mark.parametrize("row", table(), ids=[row.recipe for row in table()])
def test_it_is_whole_harmless_and_small(row):
    path = FOLDER / f"{row.recipe}.ckpt"
    digest, name = checkpoint.digest_path(path).read_text().split()
    assert (digest, name) == (checkpoint.sha256(path), path.name)
    loaded = torch.load(path, weights_only=True)
    assert "optimizer_states" not in loaded
    assert '"/' not in json.dumps(loaded[checkpoint.RECIPE])  # no path of the machine that made it
    assert round(path.stat().st_size / 1024) == row.kib


@pytest.mark.parametrize("row", table(), ids=[row.recipe for row in table()])
def test_it_is_of_its_recipe_wherever_the_classes_move(row, capsys):
    saved = torch.load(FOLDER / f"{row.recipe}.ckpt", weights_only=True)[checkpoint.RECIPE]["model"]
    with pytest.raises(SystemExit):
        main(["test", "-c", row.recipe, "--print_config"])
    given = yaml.safe_load(capsys.readouterr().out)["model"]
    free = named(given["class_path"]).free_settings
    for theirs, ours in (
        (saved, given),
        (moved(saved), given),
        (saved, moved(given) | {"class_path": given["class_path"]}),
    ):
        assert same_class(theirs["class_path"], ours["class_path"])
        assert differences(without(theirs, free), without(ours, free)) == []


SLOW = ("cartpole_swingup", "lista", "omniglot", "power_flow_30", "power_flow_57", "power_flow_118", "two_moons")
"""Whose solver takes twenty seconds or more; a sister of each is quick."""


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(row, id=row.recipe, marks=[pytest.mark.slow, pytest.mark.long] if row.recipe in SLOW else [])
        for row in table()
    ],
)
def test_its_gap_is_what_the_table_says(row, capsys):
    skip_without_data(recipes()[row.recipe])
    program, *args = shlex.split(row.command)
    assert program == "amortized"
    assert args == ["test", "-c", row.recipe, "--ckpt_path", f"checkpoints/{row.recipe}.ckpt"]
    args[-1] = str(ROOT / args[-1])
    quiet = ["--budget.enabled=false", "--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"]
    if "PosteriorDiagnostics" in recipes()[row.recipe].read_text():  # these have tests of their own
        quiet.append("--trainer.callbacks=null")
    main([*args, "--run_folder=test", *quiet])
    found = json.loads(Path("test/results.json").read_text())
    assert found["rows"]["total"] == row.contexts
    assert found["rows"]["diverged"] == 0
    assert found["gap"]["mean"] == pytest.approx(row.gap, abs=row.tolerance)
    assert 100 * found["rows"]["converged"] == pytest.approx(row.converged, abs=5)
