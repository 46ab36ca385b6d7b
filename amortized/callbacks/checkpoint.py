"""Checkpoints from which a run continues exactly, also when it is told to stop."""

from __future__ import annotations

import math
import re
import signal
import time
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch import callbacks

from amortized.checkpoint import CheckpointError, not_finite
from amortized.lightning_private import between_steps, hand_over_metrics, validate, validates_now

STOPS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name))
"""Signals that tell a run to stop; SLURM can send USR1 some time before it ends a job (``sbatch --signal=USR1@90``)."""


class Checkpoint(callbacks.Checkpoint):
    """Saves ``checkpoints/step=N.ckpt`` in the run's folder: every n steps, at the end, and the best so far.

    It saves between optimizer steps only (never inside a window of accumulated gradients), and after the validation of
    a step rather than before it, and that of an epoch's last step once the epoch has ended, so that a run resumed from any
    of them repeats and loses nothing.

    Args:
        every_n_steps: training steps between two checkpoints.
        keep: how many of them to keep; the newest.
        monitor: a logged metric of validation; the checkpoint where it was lowest is kept as ``best.ckpt``, among those whose
            validation had no row with an objective that is not finite. Of a problem with constraints first among those with the
            most feasible predictions, as an objective falls when constraints are broken; while none is feasible, the one with
            the smallest mean violation.
    """

    def __init__(self, every_n_steps: int = 500, keep: int = 2, monitor: str | None = "val/objective") -> None:
        if every_n_steps < 1 or keep < 1:
            raise ValueError(f"checkpoint.every_n_steps and keep must be at least 1; got {every_n_steps} and {keep}")
        self.every_n_steps, self.keep, self.monitor = every_n_steps, keep, monitor
        self.best = (0.0, float("inf"))
        """Less the share of feasible predictions, which is 1 without constraints, and the metric (or the violation)."""
        self.saved: list[str] = []

    def state_dict(self) -> dict[str, Any]:
        infeasible, best = self.best
        return {"best": best, "feasible": -infeasible, "saved": self.saved}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # These files will be removed, and the checkpoint that names them may be another's.
        ours = (name for name in state_dict["saved"] if re.fullmatch(r"step=\d{8,}\.ckpt", str(name)))
        best = float(state_dict["best"])
        self.best = (-float(state_dict.get("feasible", math.isfinite(best))), best)
        self.saved = list(ours)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.directory = Path(trainer.strategy.broadcast(trainer.default_root_dir)) / "checkpoints"

    def save(self, trainer: Trainer, again: bool = False) -> Path:
        """Save this training step, unless it is saved already or is to be ``again``; every process calls it.

        Raises:
            CheckpointError: if the weights or the optimizer's state are not finite; nothing is written or removed then.
        """
        path = self.directory / f"step={trainer.global_step:08d}.ckpt"
        if path.name in self.saved[-1:] and not again:
            return path
        # The metrics up to here must be on disk before a checkpoint says that they are; those of a training batch are
        # logged after its hooks, which is too late.
        hand_over_metrics(trainer)
        for logger in trainer.loggers:
            logger.save()
        self._check(trainer)
        names = [*(name for name in self.saved if name != path.name), path.name]
        old, self.saved = names[: -self.keep], names[-self.keep :]
        trainer.save_checkpoint(path, weights_only=False)
        for name in old:
            trainer.strategy.remove_checkpoint(self.directory / name)
        return path

    def _check(self, trainer: Trainer) -> None:
        """All processes stop if one of them has what may not be saved: the others would wait for it."""
        states = [optimizer.state_dict() for optimizer in trainer.optimizers]
        fault = not_finite({"state_dict": trainer.lightning_module.state_dict(), "optimizer_states": states})
        if trainer.strategy.reduce_boolean_decision(fault is not None, all=False):
            last = f"; the last good checkpoint is {self.directory / self.saved[-1]}" if self.saved else ""
            raise CheckpointError(
                f"step {trainer.global_step} is not saved: {fault or 'another process has NaN or infinite weights'}{last}"
            )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (
            trainer.global_step % self.every_n_steps == 0
            and between_steps(trainer)
            and not ends_epoch(trainer)
            and not validates_now(trainer)
        ):
            self.save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if ends_epoch(trainer) and trainer.global_step % self.every_n_steps == 0:
            self.save(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking or not between_steps(trainer):
            return
        value = trainer.callback_metrics.get(self.monitor) if self.monitor else None
        sound = math.isfinite(trainer.callback_metrics.get("val/objective", 0.0))  # NaN, if one row is
        feasible = float(trainer.callback_metrics.get("val/feasible", 1.0))
        if not feasible:
            value = trainer.callback_metrics["val/violation"]
        if value is not None and sound and (-feasible, float(value)) < self.best:
            self._check(trainer)
            self.best = (-feasible, float(value))
            trainer.save_checkpoint(self.directory / "best.ckpt", weights_only=False)
        if trainer.global_step % self.every_n_steps == 0:
            self.save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step and between_steps(trainer):
            self.save(trainer)


def ends_epoch(trainer: Trainer) -> bool:
    """Whether the last batch was its epoch's last, from where Lightning resumes exactly only once the epoch has ended."""
    return trainer.fit_loop.epoch_loop.batch_progress.is_last_batch


class Interrupted(SystemExit):
    """The run was told to stop by a signal; the exit status is 128 + the signal's number."""

    def __init__(self, signum: int) -> None:
        super().__init__(128 + signum)
        self.signum = signum


def raise_interrupted(signum: int, frame: Any) -> None:
    """A signal handler that stops at once, with the conventional exit status."""
    raise Interrupted(signum)


class Interrupt(callbacks.Callback):
    """TERM, USR1 or Ctrl-C during training: finish the step, agree on it over all processes, save one checkpoint, stop.

    During a validation it stops at once; the resumed run begins with that validation. Told again after a second, it
    stops at once without a checkpoint.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.signum = 0
        self._told = 0.0
        self._validate = False
        self._handlers: dict[int, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        return {"validate": self._validate}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._validate = state_dict["validate"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.signum = 0
        self._make_up(trainer)

        def handle(signum: int, frame: Any) -> None:
            again = self.signum and time.monotonic() - self._told > 1  # a signal to the group can arrive twice at once
            self.signum, self._told = signum, self._told if self.signum else time.monotonic()
            if again or (trainer.validating and trainer.world_size == 1):
                raise Interrupted(signum)

        self._handlers = {number: signal.signal(number, handle) for number in STOPS}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if between_steps(trainer) and not ends_epoch(trainer):
            self._stop_if_told(trainer, validate=validates_now(trainer))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop_if_told(trainer, validate=False)

    def _stop_if_told(self, trainer: Trainer, validate: bool) -> None:
        if trainer.world_size > 1:
            told = torch.tensor(self.signum, device=trainer.strategy.root_device)
            self.signum = int(trainer.strategy.reduce(told, reduce_op="max"))
        if self.signum:
            self._save(trainer, self.signum, validate)
            raise Interrupted(self.signum)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._restore()
        if isinstance(exception, Interrupted) and trainer.validating and trainer.state.fn == "fit":
            self._save(trainer, exception.signum, validate=True)

    def _save(self, trainer: Trainer, signum: int, validate: bool) -> None:
        self._validate = validate
        path = self.checkpoint.save(trainer)
        if trainer.is_global_zero:
            print(
                f"\nstopped by {signal.Signals(signum).name} at step {trainer.global_step}; continue with --ckpt_path {path}"
            )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restore()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._make_up(trainer):  # all steps were made before, so that training never started
            self.checkpoint.save(trainer, again=True)

    def _make_up(self, trainer: Trainer) -> bool:
        """The validation that was due when the run stopped, if one was."""
        due, self._validate = self._validate, False
        if due:
            validate(trainer)
        return due

    def _restore(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}
