"""Faults in the processes that a run launches (``ddp_fork``, ``ddp_spawn``): told once, by the process that launched them."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

from lightning import Trainer
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from amortized.contract import ProblemError
from amortized.lightning_private import launches_processes

OneLine: TypeAlias = Callable[[Exception], str | None]
"""What a person must know of a fault that is theirs to mend; ``None`` for one of ours."""


def tell_faults(trainer: Trainer, one_line: OneLine) -> None:
    """Where the trainer launches processes, raise a fault of any of them here, as a :class:`ProblemError` of its one line."""
    if launches_processes(trainer):
        logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)  # it names the processes that it ends
        launcher = trainer.strategy.launcher
        launcher.launch = _Launch(launcher, one_line)  # type: ignore[method-assign, union-attr]


class _Launch:
    """The launcher's ``launch``, whose processes leave their faults in a folder, by number."""

    def __init__(self, launcher: Any, one_line: OneLine) -> None:
        self.launcher, self.one_line = launcher, one_line

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with tempfile.TemporaryDirectory() as folder:
            try:
                leaving = _Leaving(function, self.one_line, folder)
                return type(self.launcher).launch(self.launcher, leaving, *args, **kwargs)
            except (ProcessExitedException, ProcessRaisedException):
                # One that only lost its peer has left none, and may still be the first that is noticed.
                left = sorted(Path(folder).iterdir())
                if not left:
                    raise
                raise ProblemError(left[0].read_text()) from None


class _Leaving:
    """A function of a launched process; its fault goes into ``folder``, and the process ends with status 2."""

    def __init__(self, function: Callable[..., Any], one_line: OneLine, folder: str) -> None:
        self.function, self.one_line, self.folder = function, one_line, folder

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return self.function(*args, **kwargs)
        except Exception as error:
            told = self.one_line(error)
            if told is None:
                raise
            _, path = tempfile.mkstemp(dir=self.folder)
            Path(path).write_text(told)
            raise SystemExit(2) from None
