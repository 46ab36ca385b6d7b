"""All that is used of Lightning beyond its public face, in one place, a test each: what a new version may break.

The first half leaves out what Lightning does around a training step for nobody; ``benchmarks/train_step.py`` shows what that
saves. The second asks the Trainer what no public attribute says.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher

from amortized.contexts.data_module import Batch
from amortized.contract import check_context

STEP_HOOKS = (
    "on_train_batch_start",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
)


class LeanModule(LightningModule):
    """A LightningModule with less to do around its steps, and the same results."""

    def __setattr__(self, name: str, value: Any) -> None:
        """As in ``nn.Module``, whose way costs microseconds; Lightning notes the name of each hook, 42 times a step."""
        if name == "_current_fx_name":
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)

    def _on_before_batch_transfer(self, batch: Any, dataloader_idx: int = 0) -> Any:
        return batch if isinstance(batch, Batch) else super()._on_before_batch_transfer(batch, dataloader_idx)

    def _apply_batch_transfer_handler(
        self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0
    ) -> Any:
        if isinstance(batch, Batch) and batch.contexts is None:  # nothing to move: spares a search for who moves it
            return self.trainer.datamodule.on_after_batch_transfer(batch, dataloader_idx)  # type: ignore[attr-defined]
        moved = super()._apply_batch_transfer_handler(batch, device, dataloader_idx)
        return moved if isinstance(batch, Batch) else check_context(moved, "the batch of a loader")

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        if gradient_clip_val is not None and any(p.grad is not None for p in self.parameters()):
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)


class Unprofiled(PassThroughProfiler):
    """Profiles nothing, without a new context manager for each of the 70 actions of a training step."""

    _nothing = contextlib.nullcontext("")

    def profile(self, action_name: str) -> Any:
        return self._nothing


def lean(trainer: Trainer, plain_step: bool) -> None:
    """Spare the trainer the hooks that no callback writes and, for a plain ``training_step``, a look at its signature."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        for hook in STEP_HOOKS:
            if getattr(type(callback), hook) is getattr(Callback, hook):
                setattr(callback, hook, None)  # Lightning calls what is callable
    if plain_step:
        trainer.fit_loop.epoch_loop._build_kwargs = _arguments  # type: ignore[method-assign]


def _arguments(kwargs: OrderedDict, batch: Any, batch_idx: int) -> OrderedDict:
    return OrderedDict(batch=batch, batch_idx=batch_idx)


# ---- what no public attribute says


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
