"""Which checkpoint a command begins with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from amortized import checkpoint
from amortized.cli.errors import UsageError
from amortized.cli.surroundings import say


def resumable(settings: Any, given: Any) -> Any:
    """Where a ``fit`` goes on from; ``None`` if it starts."""
    if settings["resume"] == "never":
        return given
    if given or not settings["run_folder"]:
        raise UsageError("--resume auto goes on in the folder that --run_folder names; give that, and no --ckpt_path")
    return settings["run_folder"] if checkpoint.found_in(settings["run_folder"]) else None


def trained(command: str, settings: Any, recipe: str) -> str:
    """The folder of the run whose config or folder is given.

    Raises:
        UsageError: if there is no trained model.
    """
    configs = [Path(str(path)) for path in settings.get("config") or []]
    folders = [path.parent for path in configs if path.name.startswith("config")]
    for folder in (*([Path(settings["run_folder"])] if settings["run_folder"] else []), *folders):
        if checkpoint.found_in(folder):
            return str(folder)
    raise UsageError(
        f"{command} needs a trained model: give --ckpt_path a checkpoint, the folder of a run, or last (the last run of "
        f"{recipe}); or --ckpt_path {checkpoint.UNTRAINED} for the network as it is initialised"
    )


def find_checkpoint(given: str, recipe: str, check: checkpoint.Check = checkpoint.accept) -> checkpoint.Newest:
    """A checkpoint file; or the newest good one of a run's folder, or of the recipe's last run (``last``)."""
    folder = _last_run(recipe) if given == "last" else Path(given)
    if not folder.is_dir():
        return checkpoint.Newest(folder, checkpoint.load(folder, check), [])
    found = checkpoint.newest(folder, check)
    if found.path is None:
        for fault in found.faults:
            if isinstance(fault, checkpoint.MismatchError):
                raise fault
        why = f": {found.faults[0]}" if found.faults else ""
        raise checkpoint.CheckpointError(f"there is no good checkpoint in {folder}{why}")
    for fault in found.faults:
        say(f"not the newest checkpoint: {fault}")
    say(f"takes {found.path}, of step {found.step}")
    return found


def _last_run(recipe: str) -> Path:
    runs = Path("runs", recipe).glob("*/checkpoints")
    for run in sorted(runs, key=lambda path: path.stat().st_mtime_ns, reverse=True):
        if checkpoint.newest(run).path is not None:
            return run.parent
    raise checkpoint.CheckpointError(f"--ckpt_path last: there is no good checkpoint under {Path('runs', recipe)}")
