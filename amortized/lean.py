"""What Lightning does around a training step for nobody, left out; ``benchmarks/train_step.py`` shows what it saves."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.profilers import PassThroughProfiler

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
        if gradient_clip_val is not None:
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
