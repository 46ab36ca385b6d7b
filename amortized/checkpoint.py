"""Checkpoints that are whole, finite, harmless and of this recipe, or refused in one line.

A checkpoint ``step=000200.ckpt`` has its SHA-256 beside it, in ``step=000200.ckpt.sha256`` (``sha256sum -c`` reads it).
Both are written under another name first, so that a process killed at any moment leaves none that is half written.
"""

from __future__ import annotations

import hashlib
import os
import pickle
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from torch import Tensor

RECIPE = "amortized_recipe"
"""Key under which a checkpoint holds the recipe it was trained with."""


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message says why, and which one can."""


def digest_path(path: str | Path) -> Path:
    """Where the SHA-256 of a checkpoint is kept."""
    return Path(f"{path}.sha256")


def save(checkpoint: dict[str, Any], path: str | Path) -> None:
    """Write a checkpoint and its SHA-256, each whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    try:
        with unfinished.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        digest = unfinished.with_suffix(".sha256")
        digest.write_text(f"{sha256(unfinished)}  {path.name}\n")
        digest.replace(digest_path(path))
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def sha256(path: Path) -> str:
    """The hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint on the CPU, executing nothing in it.

    Raises:
        CheckpointError: if it is missing, incomplete, changed since it was written, not a plain checkpoint (a pickle that
            would run code), or holds NaN or infinite weights. The message names the newest good checkpoint beside it.
    """
    path = Path(path)
    try:
        return _load(path)
    except CheckpointError as error:
        good = newest(path.parent, but=path)
        hint = f"the newest good checkpoint there is {good}" if good else "there is no good checkpoint beside it"
        raise CheckpointError(f"{error}; {hint}") from error.__cause__


def _load(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"no such checkpoint: {path}")
    digest = digest_path(path)
    if digest.is_file() and sha256(path) != digest.read_text().split()[0]:
        raise CheckpointError(f"{path} is damaged: it does not have the SHA-256 it was written with ({digest.name})")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is refused: it holds more than tensors and plain values, and loading it could run code"
        ) from error
    except Exception as error:
        raise CheckpointError(
            f"{path} is no readable checkpoint (truncated?): {str(error).splitlines()[0] or type(error).__name__}"
        ) from error
    if not isinstance(checkpoint, dict):
        raise CheckpointError(f"{path} is no checkpoint: it holds a {type(checkpoint).__name__}")
    for name, weight in checkpoint.get("state_dict", checkpoint).items():
        if isinstance(weight, Tensor) and weight.is_floating_point() and not torch.isfinite(weight).all():
            raise CheckpointError(f"{path} is refused: {name} holds NaN or infinite weights")
    return checkpoint


def newest(directory: str | Path, but: Path | None = None) -> Path | None:
    """The checkpoint written last in a run's folder, or in its ``checkpoints``, that loads; ``None`` if there is none."""
    directory = Path(directory)
    if not directory.is_dir():
        return None
    everything = [*directory.glob("*.ckpt"), *directory.glob("checkpoints/*.ckpt")]
    found = [path for path in everything if path != but and not path.name.startswith(".")]
    for path in sorted(found, key=lambda path: (path.stat().st_mtime_ns, path.name), reverse=True):
        try:
            _load(path)
        except CheckpointError:
            continue
        return path
    return None


class WholeCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint files, written by :func:`save` and read by :func:`load`."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        save(checkpoint, path)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        return load(path)

    def remove_checkpoint(self, path: Any) -> None:
        super().remove_checkpoint(path)
        digest_path(path).unlink(missing_ok=True)


def compare_recipes(saved: Any, given: Any, at: str = "") -> list[str]:
    """Where two recipes differ, one line each: ``model.network.hidden: the checkpoint has 64, given 32``."""
    if isinstance(saved, dict) and isinstance(given, dict):
        keys = dict.fromkeys([*saved, *given])
        return [
            line
            for key in keys
            for line in compare_recipes(saved.get(key), given.get(key), f"{at}.{key}" if at else str(key))
        ]
    return [] if saved == given else [f"{at}: the checkpoint has {saved!r}, given {given!r}"]
