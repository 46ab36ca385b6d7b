"""Checkpoints that are whole, finite, harmless and of this recipe, or refused in one line.

A checkpoint ``step=000200.ckpt`` has its SHA-256 beside it, in ``step=000200.ckpt.sha256`` (``sha256sum -c`` reads it).
Both are written under another name first, and to the disk, so that a process killed, or power cut, at any moment leaves
none that is half written.
"""

from __future__ import annotations

import hashlib
import math
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from torch import Tensor

from amortized import disk

RECIPE = "amortized_recipe"
"""Key under which a checkpoint holds the recipe it was trained with."""

UNTRAINED = "untrained"
"""What stands in the place of a checkpoint for the network as it is initialised."""

PROCESSES = "amortized_processes"
"""Key under which it holds how many processes trained it."""


SOLVER = "amortized_solver"
"""Key under which it holds the settings of the gap's solver."""

CERTIFICATE = "amortized_certificate"
"""Key under which it holds what its predictions were calibrated to: see :mod:`amortized.evaluation.calibration`."""


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message says why, and which one can."""


class MismatchError(CheckpointError):
    """A good checkpoint, but of another recipe, network or number of processes."""


Check: TypeAlias = Callable[[Path, dict[str, Any]], None]


def accept(path: Path, checkpoint: dict[str, Any]) -> None:
    """The condition on a checkpoint that always holds."""


def digest_path(path: str | Path) -> Path:
    """Where the SHA-256 of a checkpoint is kept."""
    return Path(f"{path}.sha256")


def save(checkpoint: dict[str, Any], path: str | Path, sealed: bool = True) -> None:
    """Write a checkpoint and, if it is to be ``sealed``, its SHA-256, each whole or not at all; they are on the disk at the end.

    Raises:
        CheckpointError: if :func:`load` would refuse its values.
        OSError: if the disk does not take it; an older file of that name stays as it was.
    """
    path = Path(path)
    if fault := not_finite(checkpoint):
        raise CheckpointError(f"{path} is not written: {fault}")
    disk.make(path.parent)
    unfinished = disk.unfinished(path)
    try:
        with unfinished.open("wb") as file:
            try:
                torch.save(checkpoint, file)
            except RuntimeError as error:
                # Where a signal or a full disk breaks off PyTorch's writer, that fails on its way out and hides why.
                if isinstance(error.__context__, SystemExit | KeyboardInterrupt | OSError):
                    raise error.__context__ from None
                raise
        disk.sync(unfinished)
        digest = sha256(unfinished) if sealed else ""
        if digest_path(path).exists():  # of an older file, which must not be taken for the newer one's
            digest_path(path).unlink()
            disk.sync(path.parent)
        unfinished.replace(path)
        disk.sync(path.parent)
        if sealed:
            disk.write(digest_path(path), f"{digest}  {path.name}\n")
    except OSError as error:
        if error.errno and not error.filename:  # what a write says
            error.filename = str(path)
        raise
    finally:
        unfinished.unlink(missing_ok=True)


def sha256(path: Path) -> str:
    """The hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def not_finite(checkpoint: dict[str, Any]) -> str | None:
    """What makes a checkpoint useless: weights that are NaN or infinite, or NaN in the optimizer's state; ``None`` if nothing."""
    for name, weight in _parts(checkpoint.get("state_dict", checkpoint)):
        if isinstance(weight, Tensor) and not torch.isfinite(_values(weight)).all():
            return f"{name} holds NaN or infinite weights"
    for name, value in _parts(checkpoint.get("optimizer_states", [])):
        if bool(torch.isnan(_values(value)).any()) if isinstance(value, Tensor) else _is_nan(value):
            return f"{name} of the optimizer's state holds NaN"
    return None


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


def _parts(value: Any, at: str = "", depth: int = 8) -> Iterator[tuple[str, Any]]:
    """What nested dicts and sequences hold, by name; a file of others may hold itself, so not without end."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else None
    if items is None or depth == 0:
        yield at, value
        return
    for key, part in items:
        yield from _parts(part, f"{at}.{key}" if at else str(key), depth - 1)


def _values(tensor: Tensor) -> Tensor:
    """The numbers of a tensor, as one that can be asked whether they are finite."""
    if tensor.layout == torch.sparse_coo:
        tensor = tensor.coalesce()
    values = tensor if tensor.layout == torch.strided else tensor.values()
    return values.half() if values.is_floating_point() and values.element_size() == 1 else values


def load(path: str | Path, check: Check = accept) -> dict[str, Any]:
    """Read a checkpoint on the CPU, executing nothing in it.

    Args:
        path: of the file.
        check: a further condition; it raises a :class:`MismatchError` where it does not hold.

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
        other = next((fault for fault in good.faults if isinstance(fault, MismatchError)), None)
        if good.path is not None:
            hint = f"; the newest good checkpoint there is {good.path}"
        elif isinstance(error, MismatchError):
            hint = ""
        else:
            hint = f"; beside it, {other}" if other else "; there is no good checkpoint beside it"
        raise type(error)(f"{error}{hint}") from error.__cause__


def _load(path: Path, check: Check) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"no such checkpoint: {path}")
    if path.stat().st_size == 0:
        raise CheckpointError(f"{path} is empty")
    digest = digest_path(path)
    # One that is empty, or of zeros alone, is what a power cut leaves of a name without its content.
    written = digest.read_bytes().strip(b"\0 \n").split()[:1] if digest.is_file() else []
    if written and written != [sha256(path).encode()]:
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
    if fault := not_finite(checkpoint):
        raise CheckpointError(f"{path} is refused: {fault}")
    check(path, checkpoint)
    return checkpoint


class Newest(NamedTuple):
    """The newest good checkpoint of a folder (``None``: there is none), what it holds, and why later ones are not taken."""

    path: Path | None
    checkpoint: dict[str, Any]
    faults: list[CheckpointError]

    @property
    def step(self) -> int:
        """The training step that it is of."""
        step = self.checkpoint.get("global_step")
        return step if isinstance(step, int) else 0


def found_in(directory: str | Path) -> list[Path]:
    """All checkpoints, good or not, of a run's folder and of its ``checkpoints``."""
    paths = [path for pattern in ("*.ckpt", "checkpoints/*.ckpt") for path in Path(directory).glob(pattern)]
    return [path for path in paths if not path.name.startswith(".")]


def newest(directory: str | Path, check: Check = accept, but: Path | None = None) -> Newest:
    """The checkpoint of the last training step, in a run's folder or its ``checkpoints``, that loads and passes the check."""
    faults: list[CheckpointError] = []
    paths = [path for path in found_in(directory) if path != but]
    for path in sorted(paths, key=lambda path: (_step(path), path.name), reverse=True):
        try:
            return Newest(path, _load(path, check), faults)
        except CheckpointError as fault:
            faults.append(fault)
    return Newest(None, {}, faults)


def _step(path: Path) -> int:
    """The training step that a checkpoint says it is of; the one in its name, where it cannot be read."""
    try:
        return int(torch.load(path, map_location="cpu", weights_only=True, mmap=True)["global_step"])
    except Exception:  # why is said by :func:`load`
        named = re.search(r"step=(\d+)", path.name)
        return int(named[1]) if named else -1


def recipe_in(path: Path, loaded: dict[str, Any]) -> dict[str, Any]:
    """The recipe that a checkpoint holds.

    Raises:
        MismatchError: if it holds none.
    """
    recipe = loaded.get(RECIPE)
    if not isinstance(recipe, dict) or not all(
        isinstance(recipe.get(part), dict) and isinstance(recipe[part].get("class_path"), str)
        for part in ("model", "data")
    ):
        raise MismatchError(f"{path} does not say which recipe it is of: it was not written by this command line")
    return recipe


def mismatch(own: dict[str, Any], weights: dict[str, Any]) -> str | None:
    """The first name or shape in which weights differ from a module's own ``state_dict``; ``None`` if they fit."""
    for name in dict.fromkeys([*own, *weights]):
        if name not in weights:
            return f"it has no {name}"
        if name not in own:
            return f"the model has no {name}"
        theirs, ours = (tuple(getattr(part[name], "shape", ())) for part in (weights, own))
        if theirs != ours:
            return f"its {name} has shape {theirs}, the model's {ours}"
    return None


def strip(source: str | Path, to: str | Path) -> None:
    """Write what testing and predicting need of a checkpoint: weights and recipe, without the state of training.

    Raises:
        CheckpointError: if ``source`` is no good checkpoint; see :func:`load`.
    """
    whole = load(source)
    kept = ("state_dict", RECIPE, "global_step", "epoch", "pytorch-lightning_version")
    save({key: whole[key] for key in kept} | {key: whole[key] for key in (SOLVER, CERTIFICATE) if key in whole}, to)


class WholeCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint files, written by :func:`save` and read by :func:`load`."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        # Under SLURM Lightning numbers its own, and takes the 256 of a digest beside them for a part of the number.
        save(checkpoint, path, sealed="hpc_ckpt_" not in Path(path).name)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        return load(path)

    def remove_checkpoint(self, path: Any) -> None:
        """Remove a file and its SHA-256; nothing else, for names to rotate out can come from a checkpoint of others."""
        if Path(path).suffix == ".ckpt" and Path(path).is_file():
            Path(path).unlink()
            digest_path(path).unlink(missing_ok=True)
