"""Two processes: every recipe trains, validates, tests and predicts; a fault there is told as on one."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from lightning import Trainer
from lightning.pytorch.strategies import SingleDeviceStrategy
from test_recipes import skip_without_data
from toy import Gaussians, Quadratic

from amortized import strategies
from amortized.cli.app import main
from amortized.cli.recipes import recipes
from amortized.contract import ProblemError

TWO = [
    "--trainer.devices=2",
    "--trainer.strategy=ddp_fork",
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
]


CASES = [
    pytest.param(
        path,
        size,
        id=f"{name}-{size}",
        marks=[] if (name, size) == ("classify_digits", 512) else [pytest.mark.slow, pytest.mark.long],
    )
    for name, path in recipes().items()
    for size in (512, 7)
]


@pytest.mark.parametrize(("recipe", "size"), CASES)
def test_a_recipe_trains_validates_tests_and_predicts(recipe, size):
    """On a set of one batch, so that a process has none; and on sets of three."""
    skip_without_data(recipe)
    args = ["-c", str(recipe), *TWO, "--gap.solver.init_args.steps=5", "--budget.enabled=false"]
    args += [f"--data.init_args.eval_batch_size={size}", "--data.init_args.num_val=16", "--data.init_args.num_test=16"]
    if "compile" in yaml.safe_load(recipe.read_text())["model"]["init_args"]:
        args.append("--model.init_args.compile=false")
    steps = ["--data.init_args.batch_size=8", "--trainer.max_steps=4", "--trainer.val_check_interval=2"]
    main(["fit", *args, *steps, "--run_folder=fit"])
    total = json.loads(Path("fit/results.json").read_text())["rows"]["total"]
    assert total == 16 or "Digits" in recipe.read_text()
    for command in ("validate", "test", "predict"):
        main([command, *args, "--ckpt_path=fit/checkpoints/step=00000004.ckpt", f"--run_folder={command}"])
    assert json.loads(Path("test/results.json").read_text())["rows"]["total"] == total
    if Path("predict/predictions.npz").exists():
        assert len(np.load("predict/predictions.npz")["b"]) == total
    else:
        assert len(Path("predict/predictions.csv").read_text().splitlines()) == total + 1


@pytest.mark.parametrize("strategy", ["fsdp", "fsdp_cpu_offload", "deepspeed", "deepspeed_stage_3"])
def test_a_strategy_that_splits_the_model_is_refused_before_the_first_step(strategy, capsys):
    with pytest.raises(SystemExit) as end:
        main(["fit", "--model=toy.Quadratic", "--data=toy.Gaussians", f"--trainer.strategy={strategy}"])
    assert end.value.code == 2
    told = capsys.readouterr().err
    assert told.startswith(f"error: strategy {strategy} splits the model")
    assert told.endswith("write --trainer.strategy ddp, with a model that one device can hold\n")


class Split(SingleDeviceStrategy):
    """Stands, on one device, for those that split a model over devices, which need several."""


def test_a_trainer_of_one_s_own_is_refused_such_a_strategy_too(monkeypatch):
    monkeypatch.setattr(strategies, "SPLITTING", (Split,))
    trainer = Trainer(strategy=Split("cpu"), accelerator="cpu", max_steps=1, logger=False, enable_progress_bar=False)
    with pytest.raises(ProblemError, match="strategy Split splits the model"):
        trainer.fit(Quadratic(), Gaussians())
    assert trainer.global_step == 0


FAULTY = {
    "in the contexts of both": (
        "toy.Quadratic",
        "toy.FailingLate",
        r"FailingLate.augment\(..., ...\) fails: ValueError: batch 5",
    ),
    "in the contract": ("toy.Mixing", "toy.Gaussians", "Mixing.objective mixes rows"),
}


@pytest.mark.parametrize(
    "strategy", ["ddp_fork", pytest.param("ddp_spawn", marks=[pytest.mark.slow, pytest.mark.long])]
)
@pytest.mark.parametrize(("model", "data", "message"), FAULTY.values(), ids=FAULTY)
def test_a_fault_is_one_line_and_status_2(model, data, message, strategy, capfd):
    args = [*TWO, f"--trainer.strategy={strategy}", "--trainer.max_steps=9", "--data.num_val=8", "--data.num_test=8"]
    with pytest.raises(SystemExit) as end:
        main(["fit", f"--model={model}", f"--data={data}", *args])
    assert end.value.code == 2
    told = capfd.readouterr().err
    assert re.findall("^error: .*", told, re.MULTILINE) == told.strip().splitlines()[-1:]
    assert re.search(f"^error: {message}", told, re.MULTILINE)
    assert "Traceback" not in told
