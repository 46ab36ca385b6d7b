"""Weights & Biases, offline, by reading back the files that the runs wrote; and not even imported when it is off."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from runs import Run, metrics
from wandb_file import WandbRun

from amortized.cli.app import main

STEPS = 40
FIT = [
    "fit",
    "--model=toy.Quadratic",
    "--data=toy.Gaussians",
    "--data.num_val=64",
    "--data.num_test=64",
    "--gap.solver=LBFGS",
    "--gap.max_fraction=1",
]
FIT += ["--budget.contexts=8", '--budget.rivals={"Adam": {"class_path": "Adam", "init_args": {"steps": 20}}}']
FIT += [f"--trainer.max_steps={STEPS}", "--trainer.val_check_interval=20", "--trainer.check_val_every_n_epoch=null"]
FIT += ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.log_every_n_steps=5"]
FIT += ["--checkpoint.every_n_steps=20"]


@pytest.fixture(autouse=True)
def _no_account(monkeypatch):
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)


def run(*args):
    process = Run([*FIT, *args])
    assert process.wait() == 0, process.output()
    return process


def wandb_runs(folder):
    return [WandbRun(path) for path in sorted(Path(folder).glob("wandb/offline-run-*/run-*.wandb"))]


def test_an_offline_run_has_everything():
    run("--model=toy.Drawn", "--wandb=offline", "--wandb_artifact=true", "--run_folder=kept")
    (logged,) = wandb_runs("kept")
    assert logged.exit_code == 0
    assert (logged.project, logged.group) == ("amortized", "Drawn")

    recipe = yaml.safe_load(Path("kept/config.yaml").read_text())
    assert {key: logged.config[key] for key in recipe} == recipe

    assert logged.x_axes["*"] == "trainer/global_step"
    for name in ("train/loss", "val/objective", "val/gap/mean", "val/gap/median", "val/gap/converged", "test/gap/mean"):
        kept = {int(line["step"]): float(line[name]) for line in metrics("kept") if line[name]}
        assert logged.curve(name) == pytest.approx(kept), name
        assert len(kept) == {"train": 8, "val": 2, "test": 1}[name.split("/")[0]], name

    found = json.loads(Path("kept/results.json").read_text())
    for group, values in found.items():
        assert {key: logged.summary[f"{group}.{key}"] for key in values} == values
    assert found["gap"]["mean"] == pytest.approx(logged.curve("test/gap/mean")[STEPS])

    pictures = {path.stem for path in Path("kept/pictures").glob("*.png")}
    assert pictures == {"curves", "gap", "budget", "solutions", "worst"}
    for name in pictures:
        (file,) = [file for file in logged.files if file.startswith(f"media/images/pictures/{name}_")]
        (copy,) = Path("kept").glob(f"wandb/offline-run-*/files/{file}")
        assert copy.read_bytes() == Path(f"kept/pictures/{name}.png").read_bytes()
        assert list(logged.curve(f"pictures/{name}/filenames")) == [STEPS]

    assert logged.curve("test/gap/histogram/_type") == {STEPS: "histogram"}
    assert sum(logged.curve("test/gap/histogram/values")[STEPS]) == found["rows"]["total"] == 64

    (file,) = [file for file in logged.files if file.startswith("media/html/report_")]
    (copy,) = Path("kept").glob(f"wandb/offline-run-*/files/{file}")
    assert copy.read_text() == Path("kept/report.html").read_text()
    assert logged.curve("report/path") == {STEPS: file}

    (file,) = [file for file in logged.files if file.startswith("media/table/test/worst_")]
    (path,) = Path("kept").glob(f"wandb/offline-run-*/files/{file}")
    worst = json.loads(path.read_text())
    assert worst["columns"] == ["index", "network", "solver", "gap", "converged", "picture"]
    gaps = [row[3] for row in worst["data"]]
    assert len(gaps) == 8
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[0] >= found["gap"]["p95"]
    assert len({row[0] for row in worst["data"]}) == 8
    for row in worst["data"]:
        assert row[1] - row[2] == pytest.approx(row[3])
        assert row[5] == "Image"
    (table,) = [files for kind, _, files in logged.artifacts if kind == "run_table"]
    assert len([file for file in table if file.endswith(".png")]) == 8
    (artifact,) = [artifact for artifact in logged.artifacts if artifact[0] == "model"]
    last = f"step={STEPS:08d}.ckpt"
    assert artifact == ("model", f"checkpoint-{logged.id}", [last, f"{last}.sha256"])


def test_a_resumed_run_goes_on_in_the_same_wandb_run():
    run("--wandb=offline", "--run_folder=kept", "--trainer.max_steps=20")
    run("--wandb=offline", "--run_folder=kept", "--ckpt_path=kept")
    first, second = wandb_runs("kept")
    assert first.id == second.id
    assert [kind for kind, *_ in first.artifacts + second.artifacts] == ["run_table"] * 2  # no checkpoints
    assert max(first.curve("train/loss")) < min(second.curve("train/loss"))
    assert max(second.curve("train/loss")) == STEPS - 1
    run("--wandb=offline", "--run_folder=another/kept", "--trainer.max_steps=20")
    (other,) = wandb_runs("another/kept")
    assert other.id != first.id


def test_processes_of_one_run_lose_nothing():
    run(
        "--wandb=offline",
        "--run_folder=kept",
        "--trainer.devices=2",
        "--trainer.strategy=ddp_fork",
        "--budget.enabled=false",
    )
    runs = wandb_runs("kept")  # the processes that fit are not those that test
    assert len({logged.id for logged in runs}) == 1
    assert all(logged.exit_code == 0 for logged in runs)
    for name in ("train/loss", "val/gap/mean", "test/gap/mean"):
        kept = {int(line["step"]): float(line[name]) for line in metrics("kept") if line[name]}
        assert {k: v for logged in runs for k, v in logged.curve(name).items()} == pytest.approx(kept), name


def test_two_runs_of_one_process_do_not_mix(monkeypatch):
    import wandb

    monkeypatch.setenv("WANDB_MODE", "disabled")  # the flag says offline, and counts
    monkeypatch.setenv("WANDB_SILENT", "true")
    for folder in ("one", "two"):
        main([*FIT, "--wandb=offline", f"--run_folder={folder}", "--trainer.max_steps=20", "--budget.enabled=false"])
    wandb.teardown()
    (one,), (two,) = wandb_runs("one"), wandb_runs("two")
    assert one.id != two.id
    assert one.curve("train/loss") == two.curve("train/loss")
    assert len(one.curve("train/loss")) == 4


def test_the_names_that_the_user_gave_are_in_the_run(monkeypatch):
    import wandb

    given = {"NAME": "mine", "RUN_GROUP": "ours", "TAGS": "first,second", "PROJECT": "unused", "ENTITY": "unused"}
    for name, value in given.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    monkeypatch.setenv("WANDB_SILENT", "true")
    options = ["--wandb=offline", "--wandb_project=typed", "--wandb_entity=team", "--run_folder=kept"]
    main([*FIT, *options, "--trainer.max_steps=1", "--budget.enabled=false"])
    wandb.teardown()
    (logged,) = wandb_runs("kept")
    assert (logged.name, logged.group, logged.project, logged.entity) == ("mine", "ours", "typed", "team")
    assert logged.tags == ["first", "second"]


def test_a_stopped_run_is_marked():
    stopped = Run([*FIT, "--wandb=offline", "--run_folder=kept", "--trainer.max_steps=100000"])
    stopped.wait_for(lambda: Path("kept/checkpoints").is_dir())
    stopped.signal(signal.SIGTERM)
    assert stopped.wait(20) == 143, stopped.output()
    (logged,) = wandb_runs("kept")
    assert logged.exit_code == 143
    assert logged.curve("train/loss")


def test_off_does_not_import_wandb():
    code = (
        "import sys; from amortized.cli import main; main(sys.argv[1:]); "
        "assert 'lightning' in sys.modules; assert 'wandb' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code, *FIT, "--run_folder=off"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not list(Path().rglob("wandb"))
