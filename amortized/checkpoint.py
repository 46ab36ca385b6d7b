"""Checkpoints that are whole, finite, harmless and of this recipe, or refused in one line.

A checkpoint ``step=000200.ckpt`` has its SHA-256 beside it, in ``step=000200.ckpt.sha256`` (``sha256sum -c`` reads it).
Both are written under another name first, so that a process killed at any moment leaves none that is half written.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from torch import Tensor

RECIPE = "amortized_recipe"
"""Key under which a checkpoint holds the recipe it was trained with."""


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message says why, and which one can."""


Check: TypeAlias = Callable[[Path, dict[str, Any]], None]


def accept(path: Path, checkpoint: dict[str, Any]) -> None:
    """The condition on a checkpoint that always holds."""


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
            try:
                torch.save(checkpoint, file)
            except RuntimeError as error:
                # Where a signal breaks off PyTorch's writer, that fails on its way out and hides why.
                if isinstance(error.__context__, SystemExit | KeyboardInterrupt):
                    raise error.__context__ from None
                raise
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


def load(path: str | Path, check: Check = accept) -> dict[str, Any]:
    """Read a checkpoint on the CPU, executing nothing in it.

    Args:
        path: of the file.
        check: a further condition; it raises a :class:`CheckpointError` where it does not hold.

    Raises:
        CheckpointError: if it is missing, incomplete, changed since it was written, not a plain checkpoint (a pickle that
            would run code), holds NaN or infinite weights, or does not pass the check. The message names the newest
            checkpoint of that folder that is good, and passes.
    """
    path = Path(path)
    try:
        return _load(path, check)
    except CheckpointError as error:
        good = newest(path.parent, check, but=path)
        hint = f"the newest good checkpoint there is {good}" if good else "there is no good checkpoint beside it"
        raise CheckpointError(f"{error}; {hint}") from error.__cause__


def _load(path: Path, check: Check) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"no such checkpoint: {path}")
    if path.stat().st_size == 0:
        raise CheckpointError(f"{path} is empty")
    digest = digest_path(path)
    if digest.is_file() and digest.read_text().split()[:1] != [sha256(path)]:
        raise CheckpointError(f"{path} is damaged: it does not have the SHA-256 it was written with ({digest.name})")
    if not zipfile.is_zipfile(path):
        with path.open("rb") as file:
            start = file.read(1)
        reasons = {b"P": "is truncated", b"\x80": "is refused: it is a bare pickle, and loading it could run code"}
        raise CheckpointError(f"{path} {reasons.get(start, 'is no checkpoint file')}")
    try:
        with zipfile.ZipFile(path) as archive:  # torch does not look at the checksums inside
            damaged = archive.testzip()
        if damaged is not None:
            raise zipfile.BadZipFile(f"{damaged} does not have its checksum")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is refused: it holds more than tensors and plain values, and loading it could run code"
        ) from error
    except Exception as error:
        cause = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{path} is damaged: {cause}") from error
    weights = checkpoint.get("state_dict", checkpoint) if isinstance(checkpoint, dict) else None
    if not isinstance(weights, dict):
        raise CheckpointError(f"{path} is no checkpoint of a module: it holds no weights by name")
    for name, weight in weights.items():
        if isinstance(weight, Tensor) and weight.is_floating_point() and not torch.isfinite(weight).all():
            raise CheckpointError(f"{path} is refused: {name} holds NaN or infinite weights")
    check(path, checkpoint)
    return checkpoint


def newest(directory: str | Path, check: Check = accept, but: Path | None = None) -> Path | None:
    """The last written checkpoint of a run's folder (or of its ``checkpoints``) that loads; ``None`` if there is none."""
    directory = Path(directory)
    found = [path for pattern in ("*.ckpt", "checkpoints/*.ckpt") for path in directory.glob(pattern)]
    found = [path for path in found if path != but and not path.name.startswith(".")]
    for path in sorted(found, key=lambda path: (path.stat().st_mtime_ns, path.name), reverse=True):
        try:
            _load(path, check)
        except CheckpointError:
            continue
        return path
    return None


def strip(source: str | Path, to: str | Path) -> None:
    """Write what testing and predicting need of a checkpoint: weights and recipe, without the state of training.

    Raises:
        CheckpointError: if ``source`` is no good checkpoint; see :func:`load`.
    """
    whole = load(source)
    save({key: whole[key] for key in ("state_dict", RECIPE, "global_step", "epoch", "pytorch-lightning_version")}, to)


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
    """Where two recipes differ, one line each: ``model.network.hidden: the checkpoint has 64, given 32``.

    A setting that a class did not have when the checkpoint was written counts as its default.
    """
    if isinstance(saved, dict) and isinstance(given, dict):
        if "class_path" in saved and saved["class_path"] == given.get("class_path"):
            saved = saved | {"init_args": _defaults(saved["class_path"]) | (saved.get("init_args") or {})}
            given = given | {"init_args": _defaults(saved["class_path"]) | (given.get("init_args") or {})}
        keys = dict.fromkeys([*saved, *given])
        return [
            line
            for key in keys
            for line in compare_recipes(saved.get(key), given.get(key), f"{at}.{key}" if at else str(key))
        ]
    return [] if saved == given else [f"{at}: the checkpoint has {saved!r}, given {given!r}"]


def _defaults(class_path: str) -> dict[str, Any]:
    """The default settings of a class and its bases, those that are plain values."""
    module, _, name = class_path.rpartition(".")
    try:
        bases = reversed(getattr(importlib.import_module(module), name).__mro__)
    except (ImportError, AttributeError):
        return {}
    every = [parameter for base in bases for parameter in inspect.signature(base.__init__).parameters.values()]
    return {p.name: p.default for p in every if isinstance(p.default, bool | int | float | str | None)}
