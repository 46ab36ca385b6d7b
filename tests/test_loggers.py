"""Logs and bars: ``metrics.csv`` at a cost that does not grow, the user's own beside ours, and W&B, which may fail."""

import csv
import json
import os
from pathlib import Path

import pytest
import yaml
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.logger import Logger

from amortized.cli.app import AmortizedCLI, main
from amortized.loggers.csv import MetricsLogger
from amortized.loggers.wandb import wandb_logger

FIT = [
    "fit",
    "--model=toy.Quadratic",
    "--data=toy.Gaussians",
    "--data.num_val=32",
    "--data.num_test=32",
    "--run_folder=run",
]
FIT += ["--trainer.max_steps=4", "--trainer.val_check_interval=2", "--trainer.log_every_n_steps=1"]
FIT += ["--trainer.accelerator=cpu", "--budget.enabled=false", "--gap.max_fraction=1"]
SILENT = "--trainer.enable_progress_bar=false"


def lines(path="metrics.csv"):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_metrics_are_appended_and_rewritten_only_for_a_new_column(monkeypatch):
    rewrites, written = [], []
    rewrite, rows = MetricsLogger._rewrite, MetricsLogger._rows
    monkeypatch.setattr(
        MetricsLogger, "_rewrite", lambda self, lines: (rewrites.append(len(lines)), rewrite(self, lines))
    )
    monkeypatch.setattr(MetricsLogger, "_rows", lambda self, lines: written.append(len(lines)) or rows(self, lines))
    logger, expected = MetricsLogger("."), []
    for step in range(5000):
        logger.log_metrics({"epoch": 0, "train/loss": 1 / (1 + step)}, step)
        expected.append({"step": str(step), "train/loss": str(1 / (1 + step)), "val/objective": ""})
        if step % 1000 == 999:
            logger.log_metrics({"val/objective": step}, step)  # of a step whose line may be on disk already
            expected[-1]["val/objective"] = str(step)
    logger.finalize("success")
    assert lines() == expected
    assert len(rewrites) == 2  # the first line, and the first validation
    assert sum(written) < 2 * 5000 + 1100


def test_metrics_of_an_earlier_step_and_of_an_earlier_run_are_kept():
    logger = MetricsLogger(".", flush_every=1)
    for step in (0, 1, 2):
        logger.log_metrics({"a": step}, step)
    logger.log_metrics({"b": 5}, 1)
    assert [(line["step"], line["a"], line["b"]) for line in lines()] == [
        ("0", "0", ""),
        ("1", "1", "5"),
        ("2", "2", ""),
    ]
    with open("metrics.csv", "a") as file:
        file.write("3,3")  # a process was killed here
    again = MetricsLogger(".", drop_from=2)
    again.log_metrics({"a": 20}, 2)
    again.save()
    assert [(line["step"], line["a"]) for line in lines()] == [("0", "0"), ("1", "1"), ("2", "20")]


class Kept(Logger):
    """Stands for any logger of the user's (MLflow, TensorBoard)."""

    def __init__(self):
        super().__init__()
        self.logged = {}

    name = version = property(lambda self: "kept")

    def log_hyperparams(self, params):
        pass

    def log_metrics(self, metrics, step=None):
        self.logged.setdefault(step, {}).update(metrics)


def run(*args):
    """The trainer of a run through the command line."""
    kept = []
    with pytest.MonkeyPatch.context() as patch:
        instantiate = AmortizedCLI.instantiate_trainer
        patch.setattr(AmortizedCLI, "instantiate_trainer", lambda self: kept.append(instantiate(self)) or kept[0])
        main([*FIT, *args])
    return kept[0]


@pytest.mark.parametrize("option", ["--trainer.logger", "--trainer.logger+"])
def test_a_logger_of_the_user_s_stands_beside_ours(option):
    trainer = run(SILENT, f"{option}=lightning.pytorch.loggers.CSVLogger", "--trainer.logger.save_dir=theirs")
    assert isinstance(trainer.loggers[0], CSVLogger)
    (theirs,) = Path("theirs").rglob("metrics.csv")
    ours = lines("run/metrics.csv")
    columns = ("train/loss", "val/gap/mean", "test/gap/mean")
    for name in columns:
        assert [line[name] for line in ours if line[name]] == [line[name] for line in lines(theirs) if line.get(name)]
    assert Path("run/pictures/curves.png").is_file()


def test_any_logger_and_checkpoints_of_the_user_s():
    callbacks = [{"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {"every_n_train_steps": 1}}]
    trainer = run(SILENT, "--trainer.logger=test_loggers.Kept", f"--trainer.callbacks={json.dumps(callbacks)}")
    assert type(trainer.loggers[0]).__name__ == "Kept"
    assert set(trainer.loggers[0].logged) == {0, 1, 2, 3, 4}
    assert "val/gap/mean" in lines("run/metrics.csv")[1]
    assert {path.name for path in Path("run").rglob("*.ckpt")} >= {
        "epoch=0-step=4.ckpt",
        "step=00000004.ckpt",
        "best.ckpt",
    }
    main([*FIT, SILENT, "--ckpt_path=run", "--trainer.max_steps=6", f"--trainer.callbacks={json.dumps(callbacks)}"])
    assert lines("run/metrics.csv")[-1]["step"] == "6"


def test_no_logger_means_none():
    run(SILENT, "--trainer.logger=false")
    assert not Path("run/metrics.csv").exists()
    assert {path.stem for path in Path("run/pictures").iterdir()} == {"gap"}


@pytest.mark.parametrize("theirs", ["TQDMProgressBar", "test_loggers.Bar"])
def test_a_bar_of_the_user_s_takes_the_place_of_ours(theirs):
    path = theirs if "." in theirs else f"lightning.pytorch.callbacks.{theirs}"
    bars = [bar for bar in run(f"--trainer.callbacks={path}").callbacks if "Bar" in type(bar).__name__]
    assert [type(bar).__name__ for bar in bars] == [theirs.rpartition(".")[2]]


class Bar(ProgressBar):
    """A bar that is none of tqdm's, as RichProgressBar."""

    def disable(self):
        pass

    def enable(self):
        pass


# ---- Weights & Biases


@pytest.fixture
def wandb_environment(monkeypatch):
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    return monkeypatch


def settings_of(wandb_environment, environment, **options):
    seen = {}

    def init(**settings):
        seen.update(settings)
        return AnyRun()

    for name, value in environment.items():
        wandb_environment.setenv(name, value)
    wandb_environment.setattr("wandb.init", init)
    assert wandb_logger(Path("run"), "online", "vae", {"x": 1}, **options).experiment is not None
    return seen


class AnyRun:
    """A run that takes everything."""

    id = "1"

    def __getattr__(self, name):
        return lambda *args, **kwargs: None


def test_the_environment_wins_over_our_defaults_and_options_over_both(wandb_environment):
    ours = settings_of(wandb_environment, {})
    assert (ours["project"], ours["name"], ours["group"], ours["entity"]) == ("amortized", "vae-run", "vae", None)
    environment = {"PROJECT": "p", "NAME": "n", "RUN_GROUP": "g", "ENTITY": "e", "RUN_ID": "i"}
    theirs = settings_of(wandb_environment, {f"WANDB_{k}": v for k, v in environment.items()})
    assert [theirs[k] for k in ("project", "name", "group", "entity", "id")] == ["p", "n", "g", "e", "i"]
    typed = settings_of(wandb_environment, {}, project="P", entity="E")
    assert [typed[k] for k in ("project", "name", "group", "entity")] == ["P", "n", "g", "E"]


def test_wandb_out_of_reach_is_logged_offline_and_a_missing_account_is_told(wandb_environment, capsys):
    from wandb.errors import CommError, UsageError

    used = []

    def init(mode=None, id=None, **settings):
        if id in used:
            raise CommError(f"run ID {id} is in use")
        used.append(id)
        if mode != "offline":
            raise CommError("Run initialization has timed out\nsecond line")
        return AnyRun()

    wandb_environment.setattr("wandb.init", init)
    logger = wandb_logger(Path("run"), "online", "vae", {})
    logger.log_metrics({"a": 1.0}, 1)
    told = capsys.readouterr().err
    assert told.count("warning: W&B is not reached (Run initialization has timed out)") == 1
    assert len(told.strip().splitlines()) == 1
    assert "wandb sync run/wandb/offline-*" in told

    def refused(**settings):
        raise UsageError("No API key configured. Use `wandb login` to log in.")

    wandb_environment.setattr("wandb.init", refused)
    with pytest.raises(SystemExit) as stop:
        main([*FIT, SILENT, "--wandb=online"])
    assert stop.value.code == 2
    assert "error: W&B: No API key configured" in capsys.readouterr().err


def test_wandb_that_cannot_even_start_is_left_out(wandb_environment, capsys):
    def init(mode=None, **settings):
        if mode != "disabled":
            raise OSError("no service")
        return AnyRun()

    wandb_environment.setattr("wandb.init", init)
    for mode in ("online", "offline"):
        logger = wandb_logger(Path("run"), mode, "vae", {})
        assert isinstance(logger.experiment, AnyRun)
        logger.log_metrics({"a": 1.0}, 1)
        assert logger.failed
        assert capsys.readouterr().err.count("W&B failed (OSError: no service): the run goes on without it") == 1


def test_a_run_goes_on_when_wandb_fails(wandb_environment, capsys):
    class Killed(AnyRun):
        logged = 0

        def log(self, metrics):
            Killed.logged += 1
            if Killed.logged > 2:
                raise ConnectionResetError("Connection lost")

    wandb_environment.setattr("wandb.init", lambda **settings: Killed())
    main([*FIT, SILENT, "--wandb=offline"])
    assert Killed.logged == 3
    assert capsys.readouterr().err.count("warning: W&B failed (ConnectionResetError: Connection lost)") == 1
    assert lines("run/metrics.csv")[-1]["test/gap/mean"]
    assert Path("run/report.html").is_file()


SWEEP = yaml.safe_load((Path(__file__).parent.parent / "docs" / "sweep.yaml").read_text())


def test_the_documented_sweep_runs_as_its_agent_would_call_it(wandb_environment):
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    chosen = {name: p.get("value", p.get("values", [p.get("min")])) for name, p in SWEEP["parameters"].items()}
    chosen = {name: value[0] if isinstance(value, list) else value for name, value in chosen.items()}
    args = create_sweep_command_args({"args": {name: {"value": value} for name, value in chosen.items()}})["args"]
    typed = [
        part
        for word in create_sweep_command(list(SWEEP["command"]))
        for part in (args if word == "${args}" else [word])
    ]
    assert typed[:3] == ["${env}", "${program}", "fit"]
    wandb_environment.setenv("WANDB_MODE", "disabled")
    short = ["--trainer.max_steps=2", "--budget.enabled=false", "--gap.solver.init_args.steps=5", "--run_folder=run"]
    main([*typed[2:], *short])
    config = yaml.safe_load(Path("run/config.yaml").read_text())
    for name, value in chosen.items():
        setting = config
        for part in name.split("."):
            setting = (
                setting.get(part, setting.get("init_args", {}).get(part))
                if part != "init_args"
                else setting["init_args"]
            )
        assert setting == value, name
    found = json.loads(Path("run/results.json").read_text())
    assert SWEEP["metric"]["name"] in lines("run/metrics.csv")[-1]
    assert found["rows"]["total"] > 0
