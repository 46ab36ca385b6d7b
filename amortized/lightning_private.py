"""All that is used of Lightning beyond its public face, in one place, a test each: what a new version may break."""

from __future__ import annotations

from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher


def trainer_of(module: LightningModule) -> Trainer | None:
    """The module's trainer, if it has one."""
    return module._trainer


def logs_now(trainer: Trainer) -> bool:
    """Whether what is logged in this training step is kept; logging costs more than a small network's step."""
    return trainer._logger_connector.should_update_logs


def hand_over_metrics(trainer: Trainer) -> None:
    """Give the loggers the metrics of the training step that runs, as its end will do."""
    if trainer.training and trainer._logger_connector._first_loop_iter is not None:
        trainer._logger_connector.update_train_step_metrics()


def between_steps(trainer: Trainer) -> bool:
    """Whether the last batch ended a window of accumulated gradients."""
    return not trainer.fit_loop._should_accumulate()


def validates_now(trainer: Trainer) -> bool:
    """Whether a validation follows the last batch."""
    assert trainer.fit_loop._data_fetcher is not None
    return trainer.fit_loop.epoch_loop._should_check_val_fx(trainer.fit_loop._data_fetcher)


def validate(trainer: Trainer) -> None:
    """Make up for the validation that was due when the run stopped, as the training loop would have done it."""
    loop, connector = trainer.fit_loop.epoch_loop.val_loop, trainer._logger_connector
    loop.restarting = False
    loop.reset_restart_stage()
    first = connector._first_loop_iter
    trainer.validating = True
    loop.run()
    trainer.training = True
    connector._first_loop_iter = first


def log_from_step(trainer: Trainer, step: int) -> None:
    """Let what is logged from now on count as logged at that step."""
    trainer.fit_loop.epoch_loop._batches_that_stepped = step


class CommandLine(LightningCLI):
    """Lightning's command line, with the steps that ours changes under public names."""

    def parser_of(self, command: str) -> LightningArgumentParser:
        """The parser of ``fit``, ``test`` and the like."""
        return self._parser(command)

    def read_checkpoint(self) -> None:
        """Whatever a checkpoint has to say, before anything is built; Lightning would let it override the settings."""

    def run_command(self, command: str) -> None:
        """What was asked for."""
        super()._run_subcommand(command)

    def _parse_ckpt_path(self) -> None:
        self.read_checkpoint()

    def _run_subcommand(self, subcommand: str) -> None:
        self.run_command(subcommand)


def launches_processes(trainer: Trainer) -> bool:
    """Whether the Trainer starts its processes itself, by fork or spawn."""
    return isinstance(trainer.strategy.launcher, _MultiProcessingLauncher)


def begun_run(logger: WandbLogger) -> Any:
    """The logger's W&B run, if it has begun one."""
    return logger._experiment


def set_run(logger: WandbLogger, run: Any) -> None:
    """Let the logger log to that W&B run; ``None``: to the one that it begins next."""
    logger._experiment = run
