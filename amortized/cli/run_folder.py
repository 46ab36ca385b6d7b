"""The folder of a run, the same for all of its processes."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from lightning import Callback, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from amortized import checkpoint, disk
from amortized.cli.errors import UsageError
from amortized.contract import of_every_process

RUN = "AMORTIZED_RUN_FOLDER"
"""Environment variable by which processes that a run launches find its folder."""


class RunTrainer(Trainer):
    """A trainer whose folder is the first process's on all of them, also where each was launched on its own (torchrun)."""

    agreed: str | None = None

    @property
    def default_root_dir(self) -> str:
        return self.agreed or super().default_root_dir


class Agree(Callback):
    """As soon as the processes are connected, tells every one the folder of the first.

    Args:
        start: the checkpoint that this process begins with, in words.

    Raises:
        UsageError: if another process begins with another one.
    """

    def __init__(self, start: str) -> None:
        self.start = start

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        assert isinstance(trainer, RunTrainer)
        trainer.agreed = trainer.strategy.broadcast(trainer.default_root_dir)
        starts = of_every_process(self.start, trainer.world_size)
        for process, start in enumerate(starts):
            if start != starts[0]:
                raise UsageError(
                    f"process 0 begins with {starts[0]}, process {process} with {start}: all need the same folder "
                    f"{trainer.agreed}, on a disk that their machines share"
                )


def run_folder(command: str, recipe: str, named: str | None, resumed: Path | None) -> Path:
    """The run's folder, made unless another process makes it.

    Args:
        command: ``fit``, ``validate``, ``test`` or ``predict``.
        recipe: its name.
        named: by ``--run_folder``.
        resumed: the checkpoint that the command begins with.

    Raises:
        UsageError: if it cannot be made, or holds what this command would spoil.
    """
    start = time.strftime("%Y%m%d-%H%M%S") + ("" if command == "fit" else f"-{command}")
    folder, new = Path("runs", recipe, start), False
    if named:
        folder = Path(named)
    elif RUN in os.environ:  # this process was launched by the run's first one
        folder = Path(os.environ[RUN])
    elif command == "fit" and resumed and resumed.parent.name == "checkpoints":
        folder = resumed.parent.parent  # a resumed run goes on in its folder
    else:
        new = True
    held = [] if new else checkpoint.found_in(folder)
    goes_on = resumed and any(path.samefile(resumed) for path in held)
    if held and command == "fit" and not goes_on:
        raise UsageError(f"{folder} holds a run: continue it with --ckpt_path {folder}, or name another --run_folder")
    if held and command != "fit" and not resumed:
        raise UsageError(
            f"{folder} holds a trained run, whose results those of an untrained network would replace: name another "
            "--run_folder"
        )
    # The first process makes it, and tells the others once they are connected.
    if rank_zero_only.rank:  # type: ignore[attr-defined]
        return folder
    try:
        folder = disk.make_new(folder) if new else disk.make(folder)
    except OSError as error:
        raise UsageError(
            f"the run's folder {folder} cannot be made ({error.strerror}): name another with --run_folder"
        ) from error
    os.environ[RUN] = str(folder)
    return folder
