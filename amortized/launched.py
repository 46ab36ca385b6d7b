"""Faults in the processes that a run launches (``ddp_fork``, ``ddp_spawn``): told once, by the process that launched them."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning import Trainer
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from amortized.problem import ProblemError


def tell_faults(trainer: Trainer, faults: tuple[type[Exception], ...]) -> None:
    """Where the trainer launches processes, raise a fault of any of them here, as a :class:`ProblemError` of its message."""
    launcher = trainer.strategy.launcher
    if isinstance(launcher, _MultiProcessingLauncher):
        logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)  # it names the processes that it ends
        launcher.launch = _Launch(launcher, faults)  # type: ignore[method-assign]


class _Launch:
    """The launcher's ``launch``, whose processes leave their faults in a folder, by number."""

    def __init__(self, launcher: Any, faults: tuple[type[Exception], ...]) -> None:
        self.launcher, self.faults = launcher, faults

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with tempfile.TemporaryDirectory() as folder:
            try:
                leaving = _Leaving(function, self.faults, folder)
                return type(self.launcher).launch(self.launcher, leaving, *args, **kwargs)
            except (ProcessExitedException, ProcessRaisedException):
                # One that only lost its peer has left none, and may still be the first that is noticed.
                left = sorted(Path(folder).iterdir())
                if not left:
                    raise
                raise ProblemError(left[0].read_text()) from None


class _Leaving:
    """A function of a launched process; its fault goes into ``folder``, and the process ends with status 2."""

    def __init__(self, function: Callable[..., Any], faults: tuple[type[Exception], ...], folder: str) -> None:
        self.function, self.faults, self.folder = function, faults, folder

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return self.function(*args, **kwargs)
        except self.faults as error:
            _, path = tempfile.mkstemp(dir=self.folder)
            Path(path).write_text(str(error))
            raise SystemExit(2) from None
