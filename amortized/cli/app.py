"""``amortized fit|validate|test|predict -c RECIPE``: one LightningCLI.

A recipe is a YAML file; a bare name (``-c vae_digits``) is a packaged one. Every setting can be changed on the command
line (``--trainer.max_steps 100``). Each run has a folder of its own, ``runs/RECIPE/TIME``, with its config, metrics,
pictures, checkpoints and results. A recipe is code: it can name any class that can be imported. Run only those you trust.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shlex
import signal
import sys
import warnings
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from lightning import Trainer
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ProgressBar as LightningProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch.multiprocessing import ProcessExitedException

import amortized.networks
import amortized.problems
import amortized.shipping.solutions  # noqa: F401  (imported so that recipes can use short class names)
from amortized import checkpoint
from amortized.callbacks import BudgetMonitor, CertificateMonitor, Checkpoint, GapMonitor, Interrupt, Report
from amortized.callbacks.checkpoint import STOPS, raise_interrupted
from amortized.callbacks.predictions import PredictionWriter
from amortized.callbacks.progress import ProgressBar
from amortized.cli import ship
from amortized.cli.errors import UsageError
from amortized.cli.help_text import COMMANDS, help_text, top_help
from amortized.cli.next_steps import next_steps
from amortized.cli.parsing import Parser, cause_of, full_options
from amortized.cli.recipes import recipes, resolve_recipe
from amortized.cli.run_folder import RUN, Agree, RunTrainer, run_folder
from amortized.cli.saved_recipe import SaveRecipe, check_recipe, predictions_of, recipe_of
from amortized.cli.slurm import requeue
from amortized.cli.surroundings import any_terminal, say, working_directory_importable
from amortized.cli.which_checkpoint import find_checkpoint, resumable, trained
from amortized.contexts.data_module import ContextDataModule
from amortized.contract import ProblemError, faults
from amortized.evaluation.calibration import Calibration
from amortized.launched import tell_faults
from amortized.lightning_private import CommandLine, log_from_step
from amortized.loggers.csv import MetricsLogger
from amortized.loggers.wandb import attempt, finish, log_checkpoint, wandb_logger
from amortized.module import AmortizedModule
from amortized.strategies import check_strategy

CERTIFIED = (SingleDeviceStrategy, DDPStrategy)
"""Strategies under which every process has the whole model."""

DISK_FAULTS = {getattr(errno, name) for name in ("ENOSPC", "EDQUOT", "EFBIG", "EROFS", "EACCES", "EPERM", "EIO")}
"""What a disk that is full, read-only, forbidden or broken says."""


class AmortizedCLI(CommandLine):
    """The command line; see the module's docstring."""

    recipe = ""
    resumed = initial = checkpoint.Newest(None, {}, [])

    def __init__(self, args: ArgsType = None) -> None:
        super().__init__(
            AmortizedModule,
            ContextDataModule,
            save_config_callback=SaveRecipe,
            trainer_class=RunTrainer,
            trainer_defaults={
                "max_steps": 5000,  # training contexts have no end, so neither has an epoch
                "val_check_interval": 1000,
                "check_val_every_n_epoch": None,
                "use_distributed_sampler": False,
                "num_sanity_val_steps": 0,
                "enable_model_summary": False,
            },
            seed_everything_default=0,
            parser_class=Parser,
            parser_kwargs={"prog": "amortized"},
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            args=args,
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        given = list(sys.argv[1:] if args is None else args)
        self.command = shlex.join(["amortized", *map(str, given)])
        for at, word in enumerate(given):
            if word in ("-c", "--config") and at + 1 < len(given):
                given[at + 1] = resolve_recipe(given[at + 1])
                self.recipe = Path(given[at + 1]).stem
            elif word.startswith("--config="):
                given[at] = f"--config={resolve_recipe(word.removeprefix('--config='))}"
                self.recipe = Path(given[at]).stem
        self._help(given)
        self.config = parser.parse_args(full_options(given))
        settings = self.config[self.config.subcommand]
        if not self.recipe:  # named after the problem
            self.recipe = settings["model"]["class_path"].rpartition(".")[2]
        if self.recipe.startswith("config") and settings.get("recipe"):
            self.recipe = settings["recipe"]
        settings["recipe"] = self.recipe

    def _help(self, given: list[str]) -> None:
        """Print the help that was asked for, if it was, and exit."""
        asked = [at for at, word in enumerate(given) if word in ("-h", "--help")]
        if not asked:
            return
        command = next((word for word in given if word in COMMANDS), None)
        topics = [word for word in given[asked[0] + 1 :][:1] if word != command and not word.startswith("-")]
        if command is None:
            print(top_help(), end="")
        else:
            print(help_text(command, self.parser_of(command).format_help(), recipes(), *topics), end="")
        raise SystemExit(0)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(GapMonitor, "gap")
        parser.add_lightning_class_args(BudgetMonitor, "budget")
        parser.add_lightning_class_args(CertificateMonitor, "certificate")
        parser.add_lightning_class_args(Checkpoint, "checkpoint")
        parser.add_lightning_class_args(PredictionWriter, "predictions")
        parser.add_argument(
            "--threads",
            type=int | None,
            default=None,
            help="CPU threads of torch; by default one for a small network without convolutions.",
        )
        parser.add_argument("--recipe", type=str | None, default=None, help="Name of the recipe; set by -c.")
        parser.add_argument(
            "--run_folder", type=str | None, default=None, help="The run's folder; default runs/RECIPE/TIME."
        )
        parser.add_argument(
            "--resume",
            type=Literal["never", "auto"],
            default="never",
            help="auto: fit goes on from the newest good checkpoint in --run_folder, or starts if there is none; stopped by "
            "USR1 under SLURM, the job is put back into the queue.",
        )
        parser.add_argument(
            "--init_from",
            type=str | None,
            default=None,
            help="Checkpoint, or run's folder: fit starts from its weights alone; other settings may differ.",
        )
        parser.add_argument(
            "--wandb", type=Literal["off", "offline", "online"], default="off", help="Log to Weights & Biases."
        )
        parser.add_argument(
            "--wandb_project", type=str | None, default=None, help="W&B project; default WANDB_PROJECT, or amortized."
        )
        parser.add_argument(
            "--wandb_entity", type=str | None, default=None, help="W&B account or team; default WANDB_ENTITY."
        )
        parser.add_argument(
            "--wandb_artifact", type=bool, default=False, help="Log the last checkpoint there as an artifact."
        )

    def read_checkpoint(self) -> None:
        """Find, read and check the checkpoint before anything is built."""
        command = self.config.subcommand
        settings = self.config[command]
        given = settings.get("ckpt_path")
        if command == "fit":
            given = resumable(settings, given)
        elif not given:
            given = trained(command, settings, self.recipe)
        elif given == checkpoint.UNTRAINED:
            return
        if given:
            self.resumed = find_checkpoint(str(given), self.recipe, self._check_recipe)
            settings["ckpt_path"] = str(self.resumed.path)
        elif settings["init_from"]:
            self.initial = find_checkpoint(settings["init_from"], self.recipe)
            settings["init_from"] = str(self.initial.path)
            say(f"starts from the weights of {self.initial.path} alone")

    def _check_recipe(self, path: Path, loaded: dict[str, Any]) -> None:
        command = self.config.subcommand
        given = recipe_of(self.parser_of(command).dump(self.config[command], skip_unset=False))
        check_recipe(path, loaded, command, given)

    def before_instantiate_classes(self) -> None:
        if threads := self.config[self.config.subcommand]["threads"]:
            torch.set_num_threads(threads)
        if self.config.subcommand == "predict" and self.config.predict.return_predictions is None:
            self.config.predict.return_predictions = False  # they are written; the trainer need not keep them as well

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except (UsageError, checkpoint.CheckpointError):
            raise
        except ValueError as error:  # of a class's own __init__, in jsonargparse's wrapping
            origin = faults.origin(error)
            if not isinstance(origin, ValueError) and faults.place(origin):
                raise origin from None
            raise UsageError(cause_of(str(error))) from error

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The trainer with this run's folder, loggers, checkpoint files and callbacks."""
        settings = self.config_init[self.subcommand]
        check_strategy(settings["trainer"]["strategy"])  # before Lightning says what it lacks
        if settings["threads"] is None:
            torch.set_num_threads(default_threads(self.model))
        folder = run_folder(str(self.subcommand), self.recipe, settings["run_folder"], self.resumed.path)
        kwargs["default_root_dir"] = str(folder)
        self._load_weights()
        kwargs["logger"] = self._loggers(settings, folder)
        plugins = settings["trainer"]["plugins"] or []
        kwargs["plugins"] = [*(plugins if isinstance(plugins, list) else [plugins]), checkpoint.WholeCheckpointIO()]
        gap, budget, saver = settings["gap"], settings["budget"], settings["checkpoint"]
        if held := self.resumed.checkpoint.get(checkpoint.CERTIFICATE):
            settings["certificate"].calibration = Calibration.of(held)
        if self.subcommand == "predict":
            text = self.parser_of("predict").dump(self.config.predict, skip_unset=False)
            settings["predictions"].plan = predictions_of(text, self.resumed.path)
        given = settings["trainer"]["callbacks"] or []
        callbacks = list(given) if isinstance(given, list) else [given]
        if settings["trainer"]["enable_progress_bar"] is not False and not any(
            isinstance(c, LightningProgressBar) for c in callbacks
        ):
            callbacks.append(ProgressBar())
        report = Report(self.recipe, gap, budget, command=self.command)
        kwargs["callbacks"] = [Agree(self._start()), *callbacks, Interrupt(saver), report]
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except RuntimeError as error:  # Lightning's, of what SLURM says
            raise UsageError(str(error)) from error
        self._check_processes(trainer)
        if not os.environ.get("AMORTIZED_DEBUG"):
            tell_faults(trainer, one_line)
        # Lightning reads the checkpoint itself; these may be large.
        self.resumed = self.initial = checkpoint.Newest(None, {}, [])
        return trainer

    def _start(self) -> str:
        """What this process begins with, in words."""
        path = self.resumed.path
        return "no checkpoint" if path is None else f"{path.name} of step {self.resumed.step}"

    def _loggers(self, settings: Any, folder: Path) -> list[Logger] | bool:
        """Ours after the user's own, unless there are to be none."""
        given = settings["trainer"]["logger"]
        if given is False:
            if settings["wandb"] != "off":
                raise UsageError(f"--wandb {settings['wandb']} and --trainer.logger false exclude each other")
            return False
        theirs = [] if given in (None, True) else [given] if isinstance(given, Logger) else list(given)
        ours: list[Logger] = [MetricsLogger(folder, drop_from=self.resumed.step if self.subcommand == "fit" else None)]
        if settings["wandb"] != "off":
            names = {"project": settings["wandb_project"], "entity": settings["wandb_entity"]}
            ours.append(wandb_logger(folder, settings["wandb"], self.recipe, recipe_config(self), **names))
        return [*theirs, *ours]

    def _load_weights(self) -> None:
        """Start from the weights of ``--init_from``; what its loss had learned belongs to the old run."""
        path, loaded, _ = self.initial
        if path is None:
            return
        start = loaded if "state_dict" in loaded else {"state_dict": loaded}
        try:
            self.model.on_load_checkpoint(start)
            self.model.load_state_dict(start["state_dict"])
        except checkpoint.MismatchError as error:
            raise UsageError(f"--init_from {path}: {error}") from error

    def _check_processes(self, trainer: Trainer) -> None:
        """Refuse to go on with another number of processes: each step would see other contexts."""
        path, loaded, _ = self.resumed
        trained = loaded.get(checkpoint.PROCESSES, trainer.world_size)
        if self.subcommand == "fit" and trained != trainer.world_size:
            raise checkpoint.MismatchError(
                f"{path} was trained on {trained} processes, here are {trainer.world_size}: go on with as many, or start "
                f"another run from its weights with --init_from {path}"
            )

    def run_command(self, command: str) -> None:
        settings = self.config_init[command]
        if settings["ckpt_path"] == checkpoint.UNTRAINED:
            settings["ckpt_path"] = None
        for number in STOPS:
            signal.signal(number, self._interrupt)
        exit_code: Any = 1
        try:
            super().run_command(command)
            exit_code = 0
        except ProcessExitedException as error:
            exit_code = error.exit_code
            raise SystemExit(exit_code) from None
        except SystemExit as stop:
            exit_code = stop.code
            raise
        except checkpoint.MismatchError as error:
            raise checkpoint.MismatchError(f"{settings['ckpt_path']}: {error}") from error
        except Exception as error:
            if cause := faults.known_cause(error):
                raise UsageError(f"{cause}{self._sizes() if 'memory' in cause else ''}") from error
            raise
        finally:
            for logger in self.trainer.loggers:
                if isinstance(logger, WandbLogger):
                    finish(logger, exit_code)
            if exit_code == 128 + signal.SIGUSR1 and self.trainer.is_global_zero and settings["resume"] == "auto":
                requeue()

    def _sizes(self) -> str:
        """What was asked for that takes memory."""
        settings = yaml.safe_load(
            self.parser_of(str(self.subcommand)).dump(self.config[self.subcommand], skip_unset=False)
        )
        data = settings["data"].get("init_args", {})
        asked = {f"data.{name}": data.get(name) for name in ("batch_size", "eval_batch_size")}
        asked["budget.contexts"] = settings["budget"]["contexts"]
        return ": asked for " + ", ".join(f"--{name} {value}" for name, value in asked.items() if value is not None)

    def _interrupt(self, signum: int, frame: Any) -> None:
        """Stop; where the training happens in forked processes, tell those, and wait for their checkpoint."""
        forked = [process for process in getattr(self.trainer.strategy.launcher, "procs", ()) if process.is_alive()]
        if not forked:
            raise_interrupted(signum, frame)
        for process in forked:
            os.kill(process.pid, signum)

    def before_fit(self) -> None:
        """A test follows: what its contexts lack is better known now."""
        self.datamodule.fit_needs = ("train", "val", "test")

    def after_fit(self) -> None:
        """Measure the trained model on the test contexts."""
        if self.config_init.fit.trainer.fast_dev_run or self.trainer.interrupted:
            return
        steps = self.trainer.global_step
        last = checkpoint.newest(self.trainer.default_root_dir)
        if steps == 0:  # they were made in forked processes
            steps = last.step
        if last.path is not None and last.path.name == "best.ckpt":  # killed before the last step had a file of its own
            path = last.path.with_name(f"step={last.step:08d}.ckpt")
            if self.trainer.is_global_zero:
                checkpoint.save(last.checkpoint, path)
            last = last._replace(path=path)
        self._certify(last)
        # One less, where all steps were made before the run resumed.
        log_from_step(self.trainer, steps)
        # Under SLURM Lightning would take the weights of a requeue checkpoint that it wrote itself, however old.
        weights = last.path if SLURMEnvironment.detect() else None
        self.trainer.test(self.model, datamodule=self.datamodule, ckpt_path=weights, verbose=False)
        if self.config_init.fit.wandb_artifact and last.path is not None:
            for logger in self.trainer.loggers:
                if isinstance(logger, WandbLogger):
                    attempt(logger, log_checkpoint, logger, last.path)
        say(next_steps(Path(self.trainer.default_root_dir)))

    def _certify(self, last: checkpoint.Newest) -> None:
        """Calibrate what the trained model's answers lack, and keep that in its last checkpoint."""
        settings = self.config_init.fit
        if not settings.certificate.enabled or not isinstance(self.trainer.strategy, CERTIFIED):
            return
        calibration = settings.certificate.calibrate(self.trainer, self.model, self.datamodule, settings.gap)
        if last.path is not None and self.trainer.is_global_zero:
            checkpoint.save(last.checkpoint | {checkpoint.CERTIFICATE: calibration.state()}, last.path)


def recipe_config(cli: AmortizedCLI) -> dict[str, Any]:
    """Every setting of the run, as plain values."""
    command = str(cli.subcommand)
    settings: dict[str, Any] = yaml.safe_load(cli.parser_of(command).dump(cli.config[command], skip_unset=False))
    return settings


SMALL = 1_000_000
"""Parameters of a network below which torch's threads wait for each other longer than they work."""


def default_threads(model: torch.nn.Module) -> int:
    """How many CPU threads torch takes where ``threads`` is not given.

    One for a small network: fewer than a million parameters, no convolution. Otherwise, and where ``OMP_NUM_THREADS`` is
    set, as many as torch has.
    """
    parameters = list(model.parameters())
    small = sum(p.numel() for p in parameters) < SMALL and all(p.ndim <= 2 for p in parameters)
    return 1 if small and "OMP_NUM_THREADS" not in os.environ else torch.get_num_threads()


def main(args: list[str] | None = None) -> None:
    """Run the command line; ``args`` in place of ``sys.argv[1:]``. Classes in the working directory can be named.

    Raises:
        SystemExit: 2 for a fault in the command line, recipe, problem or checkpoint, told in one line on standard error,
            with its place in the user's own file (with ``AMORTIZED_DEBUG`` set in the environment the exception itself
            passes through); 128 + the signal's number when told to stop.
    """
    for name in (
        "lightning.pytorch.utilities.rank_zero",
        "lightning.pytorch.accelerators.cuda",
        "lightning.fabric.utilities.seed",
    ):
        logging.getLogger(name).setLevel(logging.WARNING)
    environment = dict(os.environ)
    handlers = {number: signal.signal(number, raise_interrupted) for number in STOPS}
    try:
        with warnings.catch_warnings(), any_terminal(), working_directory_importable():
            warnings.filterwarnings(
                "ignore",
                message=".*(does not have many workers|LeafSpec|args parameter is intended|recommended to use .self.log|"
                "your dataloader is not resumable).*",
            )
            try:
                given = list(sys.argv[1:] if args is None else args)
                if given and given[0] in ship.COMMANDS:
                    ship.run(given)
                else:
                    AmortizedCLI(args)
            except Exception as error:
                told = one_line(error)
                if told is None or os.environ.get("AMORTIZED_DEBUG"):
                    raise
                print(f"error: {told}", file=sys.stderr)
                raise SystemExit(2) from None
    finally:
        if RUN in os.environ and RUN not in environment:
            with contextlib.suppress(OSError):  # unless something was written there
                os.rmdir(os.environ[RUN])
        for number, handler in handlers.items():
            signal.signal(number, handler)
        os.environ.clear()  # Lightning leaves its seed there
        os.environ.update(environment)


def one_line(error: Exception) -> str | None:
    """What a person must know of an error that is theirs to mend; ``None`` for a fault of ours."""
    if isinstance(error, OSError) and error.errno in DISK_FAULTS:
        return f"{error.filename or os.environ.get(RUN)}: {error.strerror}"
    if isinstance(error, UsageError | ProblemError | checkpoint.CheckpointError | MisconfigurationException):
        return str(error)
    if faults.place(error) is None:
        return None
    return f"{faults.describe(error)}; AMORTIZED_DEBUG=1 shows the whole traceback"
