"""What Lightning does around a training step for nobody, left out."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from typing import Any

from lightning import Callback, Trainer
from lightning.pytorch.profilers import PassThroughProfiler

from amortized.module import AmortizedModule

STEP_HOOKS = (
    "on_train_batch_start",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
)


class Unprofiled(PassThroughProfiler):
    """Profiles nothing, without a new context manager for each of the 70 actions of a training step."""

    _nothing = contextlib.nullcontext("")

    def profile(self, action_name: str) -> Any:
        return self._nothing


def lean(trainer: Trainer, module: AmortizedModule) -> None:
    """Spare the trainer, in every training step, the hooks that a callback does not write and a look at a signature."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        for hook in STEP_HOOKS:
            if getattr(type(callback), hook) is getattr(Callback, hook):
                setattr(callback, hook, None)  # Lightning calls what is callable

    def arguments(kwargs: OrderedDict, batch: Any, batch_idx: int) -> OrderedDict:
        return OrderedDict(batch=batch, batch_idx=batch_idx)

    if type(module).training_step is AmortizedModule.training_step:
        trainer.fit_loop.epoch_loop._build_kwargs = arguments  # type: ignore[method-assign]
