"""``amortized fit|validate|test|predict -c RECIPE``: one LightningCLI.

A recipe is a YAML file; a bare name (``-c vae_digits``) is a packaged one. Every setting can be changed on the command
line (``--trainer.max_steps 100``). Each run has a folder of its own, ``runs/RECIPE/TIME``, with its config, metrics,
pictures, checkpoints and results. A recipe is code: it can name any class that can be imported. Run only those you trust.
"""

from __future__ import annotations

import codecs
import contextlib
import functools
import importlib
import io
import logging
import os
import shlex
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from lightning import Trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ProgressBar as LightningProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.loggers.logger import Logger
from torch.multiprocessing import ProcessExitedException

import amortized.networks
import amortized.problems  # noqa: F401  (imported so that recipes can use short class names)
from amortized import checkpoint, faults
from amortized.callbacks import BudgetMonitor, Checkpoint, GapMonitor, Interrupt, Report
from amortized.callbacks.budget import default_rivals
from amortized.callbacks.checkpoint import raise_interrupted
from amortized.callbacks.predictions import PredictionWriter
from amortized.callbacks.progress import ProgressBar
from amortized.contexts import ContextDataModule
from amortized.help_text import COMMANDS, help_text, top_help
from amortized.lean import Unprofiled, lean
from amortized.loggers import MetricsLogger, attempt, finish, log_checkpoint, wandb_logger
from amortized.module import AmortizedModule
from amortized.parsing import Parser, UsageError, cause_of, close, full_options
from amortized.problem import ProblemError

RUN = "AMORTIZED_RUN_FOLDER"
"""Environment variable by which processes that a run launches find its folder."""


def recipe_folder() -> Path:
    """Where the packaged recipes are: in the installed package, or beside it in a clone."""
    here = Path(__file__).parent
    return here / "recipes" if (here / "recipes").is_dir() else here.parent / "recipes"


def recipes() -> dict[str, Path]:
    """The packaged recipes by name."""
    return {path.stem: path for path in sorted(recipe_folder().glob("*.yaml"))}


def resolve_recipe(name: str) -> str:
    """The path of a recipe: a file, or the name of a packaged one.

    Raises:
        UsageError: if it is neither; with the closest names.
    """
    if Path(name).is_file():
        return name
    known = recipes()
    if name.removesuffix(".yaml") in known:
        return str(known[name.removesuffix(".yaml")])
    raise UsageError(
        f"no recipe {name!r}{close(name, known)}; there are {', '.join(known)}, or give the path of a YAML file"
    )


class SaveRecipe(SaveConfigCallback):
    """Writes ``config.yaml`` into the run's folder and the recipe into every checkpoint; replaces no earlier one."""

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        if not self.already_saved and trainer.is_global_zero:
            folder = Path(trainer.default_root_dir)
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / "config.yaml"
            for number in range(2, 10_000):
                if not path.exists() or path.read_text(encoding="utf-8") == self.text:
                    break
                path = folder / f"config-{number}.yaml"
            path.write_text(self.text, encoding="utf-8")
        self.already_saved = True

    # Once a run, not at every save: a dump takes as long as some ten training steps.
    @functools.cached_property
    def text(self) -> str:
        """All settings, as YAML."""
        text: str = self.parser.dump(self.config, skip_unset=False)
        return text

    @functools.cached_property
    def recipe(self) -> dict[str, Any]:
        """Those that a checkpoint depends on."""
        return recipe_of(self.text)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint_: dict[str, Any]) -> None:
        checkpoint_[checkpoint.RECIPE] = self.recipe


def recipe_of(text: str) -> dict[str, Any]:
    """The settings that a checkpoint depends on: model, data, seed, and how the trainer updates."""
    everything = yaml.safe_load(text)
    trainer = {
        key: everything["trainer"].get(key) for key in ("accumulate_grad_batches", "gradient_clip_val", "precision")
    }
    return {
        "seed_everything": everything["seed_everything"],
        "model": everything["model"],
        "data": everything["data"],
        "trainer": trainer,
    }


class AmortizedCLI(LightningCLI):
    """The command line; see the module's docstring."""

    recipe = ""
    resume_step = 0

    def __init__(self, args: ArgsType = None) -> None:
        super().__init__(
            AmortizedModule,
            ContextDataModule,
            save_config_callback=SaveRecipe,
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
            print(help_text(command, self._parser(command).format_help(), recipes(), *topics), end="")
        raise SystemExit(0)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(GapMonitor, "gap")
        parser.add_lightning_class_args(BudgetMonitor, "budget")
        parser.add_lightning_class_args(Checkpoint, "checkpoint")
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

    def _parse_ckpt_path(self) -> None:
        """Find, read and check the checkpoint before anything is built (Lightning would let it override the settings)."""
        command = self.config.subcommand
        settings = self.config[command]
        if not settings.get("ckpt_path"):
            return
        path = self._find_checkpoint(settings["ckpt_path"])
        loaded = checkpoint.load(path, self._check_recipe)
        settings["ckpt_path"] = str(path)
        self.resume_step = loaded.get("global_step", 0)

    def _check_recipe(self, path: Path, loaded: dict[str, Any]) -> None:
        """Refuse a checkpoint whose settings disagree with those of this command."""
        command = self.config.subcommand
        given = recipe_of(self._parser(command).dump(self.config[command], skip_unset=False))
        saved = loaded.get(checkpoint.RECIPE)
        if not isinstance(saved, dict):
            raise checkpoint.CheckpointError(
                f"{path} does not say which recipe it is of: it was not written by this command line"
            )
        classes = [recipe["model"]["class_path"].split(".")[-1] for recipe in (saved, given)]
        if classes[0] != classes[1]:
            raise checkpoint.CheckpointError(
                f"{path} is of another recipe: it holds a {classes[0]}, the recipe asks for a {classes[1]}"
            )
        if command != "fit":
            saved, given = ({"model": _evaluated(recipe["model"])} for recipe in (saved, given))
        elif "optimizer_states" not in loaded:
            raise checkpoint.CheckpointError(f"{path} holds no state of training: it can be tested, not continued")
        differences = checkpoint.compare_recipes(saved, given)
        if differences:
            more = f" (and {len(differences) - 1} more)" if len(differences) > 1 else ""
            config = path.parent.parent / "config.yaml"
            how = f" (-c {config} has them)" if config.is_file() else ""
            raise checkpoint.CheckpointError(
                f"{path} was trained with other settings: {differences[0]}{more}; give those it was trained with{how}"
            )

    def _find_checkpoint(self, given: str) -> Path:
        """A checkpoint file; or the newest good one of a run's folder, or of the recipe's last run (``last``)."""
        if given == "last":
            runs = sorted(
                Path("runs", self.recipe).glob("*/checkpoints"), key=lambda p: p.stat().st_mtime_ns, reverse=True
            )
            found = next((path for run in runs if (path := checkpoint.newest(run))), None)
            if found is None:
                raise checkpoint.CheckpointError(
                    f"--ckpt_path last: there is no good checkpoint under {Path('runs', self.recipe)}"
                )
            return found
        path = Path(given)
        if path.is_dir():
            found = checkpoint.newest(path)
            if found is None:
                raise checkpoint.CheckpointError(f"there is no good checkpoint in {path}")
            return found
        return path

    def before_instantiate_classes(self) -> None:
        if threads := self.config[self.config.subcommand]["threads"]:
            torch.set_num_threads(threads)

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except UsageError:
            raise
        except ValueError as error:  # of a class's own __init__, in jsonargparse's wrapping
            origin = faults.origin(error)
            if not isinstance(origin, ValueError) and faults.place(origin):
                raise origin from None
            raise UsageError(cause_of(str(error))) from error

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The trainer with this run's folder, loggers, checkpoint files and callbacks."""
        settings = self.config_init[self.subcommand]
        if settings["threads"] is None:
            torch.set_num_threads(default_threads(self.model))
        folder = self._run_folder(settings)
        kwargs["default_root_dir"] = str(folder)
        if self.subcommand == "fit" and not settings["ckpt_path"] and any(folder.glob("checkpoints/*.ckpt")):
            raise UsageError(
                f"{folder} holds a run: continue it with --ckpt_path {folder}, or name another --run_folder"
            )
        kwargs["logger"] = self._loggers(settings, folder)
        plugins = settings["trainer"]["plugins"] or []
        kwargs["plugins"] = [*(plugins if isinstance(plugins, list) else [plugins]), checkpoint.WholeCheckpointIO()]
        gap, budget, saver = settings["gap"], settings["budget"], settings["checkpoint"]
        budget.rivals = budget.rivals or default_rivals(gap.solver)
        given = settings["trainer"]["callbacks"] or []
        callbacks = list(given) if isinstance(given, list) else [given]
        if settings["trainer"]["enable_progress_bar"] is not False and not any(
            isinstance(c, LightningProgressBar) for c in callbacks
        ):
            callbacks.append(ProgressBar())
        report = Report(self.recipe, gap, budget, command=self.command)
        kwargs["callbacks"] = [*callbacks, Interrupt(saver), report]
        if self.subcommand == "predict":
            kwargs["callbacks"].append(PredictionWriter())
        if settings["trainer"]["profiler"] is None:
            kwargs["profiler"] = Unprofiled()
        trainer = super().instantiate_trainer(**kwargs)
        lean(trainer, plain_step=type(self.model).training_step is AmortizedModule.training_step)
        return trainer

    def _loggers(self, settings: Any, folder: Path) -> list[Logger] | bool:
        """Ours after the user's own, unless there are to be none."""
        given = settings["trainer"]["logger"]
        if given is False:
            if settings["wandb"] != "off":
                raise UsageError(f"--wandb {settings['wandb']} and --trainer.logger false exclude each other")
            return False
        theirs = [] if given in (None, True) else [given] if isinstance(given, Logger) else list(given)
        ours: list[Logger] = [MetricsLogger(folder, drop_from=self.resume_step if self.subcommand == "fit" else None)]
        if settings["wandb"] != "off":
            names = {"project": settings["wandb_project"], "entity": settings["wandb_entity"]}
            ours.append(wandb_logger(folder, settings["wandb"], self.recipe, recipe_config(self), **names))
        return [*theirs, *ours]

    def _run_folder(self, settings: Any) -> Path:
        if settings["run_folder"]:
            folder = Path(settings["run_folder"])
        elif RUN in os.environ:  # this process was launched by the run's first one
            folder = Path(os.environ[RUN])
        elif (
            self.subcommand == "fit"
            and settings["ckpt_path"]
            and Path(settings["ckpt_path"]).parent.name == "checkpoints"
        ):
            folder = Path(settings["ckpt_path"]).parent.parent  # a resumed run goes on in its folder
        else:
            start = time.strftime("%Y%m%d-%H%M%S") + ("" if self.subcommand == "fit" else f"-{self.subcommand}")
            folder = Path("runs", self.recipe, start)
            number = 1
            while folder.exists():
                number += 1
                folder = Path("runs", self.recipe, f"{start}-{number}")
        return folder

    def _run_subcommand(self, subcommand: str) -> None:
        os.environ[RUN] = self.trainer.default_root_dir
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._interrupt)
        exit_code: Any = 1
        try:
            super()._run_subcommand(subcommand)
            exit_code = 0
        except ProcessExitedException as error:
            exit_code = error.exit_code
            raise SystemExit(exit_code) from None
        except SystemExit as stop:
            exit_code = stop.code
            raise
        except Exception as error:
            if cause := faults.known_cause(error):
                raise UsageError(f"{cause}{self._sizes() if 'memory' in cause else ''}") from error
            raise
        finally:
            for logger in self.trainer.loggers:
                if isinstance(logger, WandbLogger):
                    finish(logger, exit_code)

    def _sizes(self) -> str:
        """What was asked for that takes memory."""
        settings = yaml.safe_load(self._parser(self.subcommand).dump(self.config[self.subcommand], skip_unset=False))
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

    def after_fit(self) -> None:
        """Measure the trained model on the test contexts."""
        if self.config_init.fit.trainer.fast_dev_run or self.trainer.interrupted:
            return
        last = checkpoint.newest(self.trainer.default_root_dir)
        steps = self.trainer.global_step
        if steps == 0 and last is not None:  # they were made in forked processes
            steps = checkpoint.load(last)["global_step"]
        # One less, where all steps were made before the run resumed.
        self.trainer.fit_loop.epoch_loop._batches_that_stepped = steps
        self.trainer.test(self.model, datamodule=self.datamodule, verbose=False)
        if self.config_init.fit.wandb_artifact and last is not None:
            for logger in self.trainer.loggers:
                if isinstance(logger, WandbLogger):
                    attempt(logger, log_checkpoint, logger, last)


def _evaluated(model: dict[str, Any]) -> dict[str, Any]:
    """The settings of a model that matter once it is trained."""
    module, _, name = model["class_path"].rpartition(".")
    free = getattr(importlib.import_module(module), name).free_settings
    init = {name: value for name, value in model["init_args"].items() if name not in free}
    return {**model, "init_args": init}


def recipe_config(cli: AmortizedCLI) -> dict[str, Any]:
    """Every setting of the run, as plain values."""
    command = str(cli.subcommand)
    settings: dict[str, Any] = yaml.safe_load(cli._parser(command).dump(cli.config[command], skip_unset=False))
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


def _plain(error: UnicodeError) -> tuple[str, int]:
    """Characters for a terminal that lacks those of the table."""
    assert isinstance(error, UnicodeEncodeError)
    plain = {"±": "+-", "─": "-", "−": "-", "…": "~", "·": "-"}
    return "".join(plain.get(character, "?") for character in error.object[error.start : error.end]), error.end


codecs.register_error("plain", _plain)


@contextlib.contextmanager
def _any_terminal() -> Iterator[None]:
    """What a terminal's encoding lacks is printed in other characters, rather than an error."""
    streams = [stream for stream in (sys.stdout, sys.stderr) if isinstance(stream, io.TextIOWrapper)]
    before = [stream.errors for stream in streams]
    for stream in streams:
        stream.reconfigure(errors="plain")
    try:
        yield
    finally:
        for stream, errors in zip(streams, before, strict=True):
            stream.reconfigure(errors=errors)


@contextlib.contextmanager
def _working_directory_importable() -> Iterator[None]:
    """Last on the path, so that a file there hides no library."""
    here = os.getcwd()
    sys.path.append(here)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.reverse()
        sys.path.remove(here)
        sys.path.reverse()


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
    handlers = {number: signal.signal(number, raise_interrupted) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        with warnings.catch_warnings(), _any_terminal(), _working_directory_importable():
            warnings.filterwarnings(
                "ignore",
                message=".*(does not have many workers|LeafSpec|args parameter is intended|recommended to use .self.log).*",
            )
            try:
                AmortizedCLI(args)
            except Exception as error:
                told = one_line(error)
                if told is None or os.environ.get("AMORTIZED_DEBUG"):
                    raise
                print(f"error: {told}", file=sys.stderr)
                raise SystemExit(2) from None
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        os.environ.clear()  # Lightning leaves its seed there
        os.environ.update(environment)


def one_line(error: Exception) -> str | None:
    """What a person must know of an error that is theirs to mend; ``None`` for a fault of ours."""
    if isinstance(error, UsageError | ProblemError | checkpoint.CheckpointError | MisconfigurationException):
        return str(error)
    if faults.place(error) is None:
        return None
    return f"{faults.describe(error)}; AMORTIZED_DEBUG=1 shows the whole traceback"
