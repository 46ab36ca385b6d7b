"""A progress bar that costs a short training step little."""

from __future__ import annotations

import contextlib
import time
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar


class ProgressBar(TQDMProgressBar):
    """Lightning's bar, drawn a few times a second instead of every n steps, with the training loss beside it.

    The loss is read when the bar is drawn. ``self.log(..., prog_bar=True)`` would read it at every step, each time
    waiting for the device.

    Args:
        interval: seconds between two drawings.
    """

    def __init__(self, interval: float = 0.2) -> None:
        super().__init__()
        self.interval = interval
        self._next = 0.0

    def _should_update(self, current: int, total: int) -> bool:
        now = time.monotonic()
        if now < self._next and current != total:
            return False
        self._next = now + self.interval
        return bool(self.is_enabled)

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        loss = trainer.logged_metrics.get("train/loss")
        return super().get_metrics(trainer, pl_module) | ({} if loss is None else {"train/loss": float(loss)})

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        with contextlib.suppress(TypeError):  # no bar has been drawn
            self.train_progress_bar.close()  # so that what is told starts a line

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.train_progress_bar.n = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        super().on_train_epoch_end(trainer, pl_module)
