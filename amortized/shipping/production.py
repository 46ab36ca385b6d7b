"""Solutions of 10^8 contexts: a folder of shards, each a pure function of its number, written whole or not at all.

A shard ``shard-000012.npz`` has ``b``, ``objective``, ``certificate``, ``path`` (see :class:`~amortized.shipping.answer.Path`)
and ``evaluations``; ``shard-000012.json``, written after it, has its SHA-256 and counts, and says that it is done.
``manifest.json`` says what the shards are of, and ``summary.json``, once all are done, what became of the contexts. Any
number of processes may work in one folder, be killed and started again: done shards are skipped, and one that two
processes make at once is the same bytes from both.
"""

from __future__ import annotations

import inspect
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from amortized import checkpoint, disk, npz
from amortized.contexts.data_module import ContextDataModule
from amortized.contexts.files import fields, nan_in, tell_nan
from amortized.contract import Context, ProblemError, concatenate, num_rows, take
from amortized.shipping import answer
from amortized.shipping.trained import TrainedSolver
from amortized.solvers import Solver


class Plan(NamedTuple):
    """What a folder of shards is of; two of the same plan have the same files."""

    recipe: str
    checkpoint: str
    """Its SHA-256."""
    contexts: int
    shard_size: int
    batch_size: int
    """Contexts that are solved together: a solution's last digits can depend on it."""
    tol: float
    seed: int
    """Of the contexts."""
    with_contexts: bool
    """Whether shards have the contexts too: ``a``, or ``a.FIELD`` of each field."""
    device: str
    source: str
    """Where contexts come from: ``drawn``, the ``train`` or ``test`` rows of a finite set, or a ``file``."""
    solver: str
    """The gap's, with its settings."""

    @property
    def shards(self) -> int:
        """How many there are."""
        return -(-self.contexts // self.shard_size)

    def rows(self, shard: int) -> int:
        """How many contexts a shard has."""
        return min(self.shard_size, self.contexts - shard * self.shard_size)


def share(given: str | None) -> tuple[int, int]:
    """``i/n``, the i-th of n processes (from 0); without it, what torchrun or SLURM say of this one.

    Raises:
        ProblemError: if it is no such share.
    """
    if given is not None:
        part, _, parts = given.partition("/")
        if not (part.isdigit() and parts.isdigit() and int(part) < int(parts)):
            raise ProblemError(f"--shards is i/n, the i-th of n processes, counted from 0 (0/4 to 3/4); got {given}")
        return int(part), int(parts)
    for rank, world, first in (
        ("RANK", "WORLD_SIZE", None),
        ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT", "SLURM_ARRAY_TASK_MIN"),
        ("SLURM_PROCID", "SLURM_NTASKS", None),
    ):
        if rank in os.environ and world in os.environ:
            i, n = int(os.environ[rank]) - int(os.environ.get(first or "", 0)), int(os.environ[world])
            if not 0 <= i < n:
                raise ProblemError(f"{rank}={i} is none of {world}={n} processes: say which by --shards i/n")
            return i, n
    return 0, 1


def produce(
    solver: TrainedSolver, folder: Path, plan: Plan, part: tuple[int, int] = (0, 1), verify: bool = False
) -> dict[str, Any]:
    """Make the shards of this process that are not done yet; what became of all, as far as they are done.

    Args:
        solver: of the plan's checkpoint.
        folder: of the shards.
        plan: what they are of.
        part: this process, and how many there are: it makes the shards ``i, i + n, ...``.
        verify: read done shards again, and make those anew that do not have their checksum.

    Raises:
        ProblemError: if the folder is of another plan, or the data have fewer contexts.
    """
    _agree(folder, plan)
    if plan.source != "drawn" and plan.contexts > (n := size(solver, plan.source)):
        raise ProblemError(f"{type(solver.data).__name__} has {n} contexts; asked for {plan.contexts}")
    mine = range(part[0], plan.shards, part[1])
    todo = [shard for shard in mine if not _done(folder, shard, verify)]
    if solver.trained:
        solver.calibration  # noqa: B018  (made now, if the checkpoint holds none: its time is not that of the contexts)
    total, left = (sum(map(plan.rows, shards)) for shards in (mine, todo))
    with tqdm(total=total, initial=total - left, unit=" contexts", unit_scale=True, smoothing=0.1) as progress:
        for shard in todo:
            if not _done(folder, shard, False):  # another process may have made it in the meantime
                _write(folder, shard, _columns(solver, plan, shard, progress))
    return summary(folder, plan)


def _agree(folder: Path, plan: Plan) -> None:
    """The folder's manifest: the plan's, written if there is none."""
    path = disk.make(folder) / "manifest.json"
    if not path.exists():
        disk.write(
            path, json.dumps(plan._asdict() | {"shards": plan.shards, "paths": list(answer.WORDS)}, indent=2) + "\n"
        )
    held = json.loads(path.read_text(encoding="utf-8"))
    for name, value in plan._asdict().items():
        if held.get(name, value) != value:  # an older folder does not say all
            raise ProblemError(
                f"{folder} has shards of another plan: their {name} is {held.get(name)}, given {value}; name another --out"
            )


def _columns(solver: TrainedSolver, plan: Plan, shard: int, progress: tqdm[Any]) -> dict[str, np.ndarray]:
    """What a shard holds."""
    kept: list[Context] = []
    per_shard = -(-plan.shard_size // plan.batch_size)

    def batches() -> Iterator[tuple[int, Context]]:
        for part, (first, n) in enumerate(_parts(plan, shard)):
            number = shard * per_shard + part
            drawn = plan.source == "drawn"
            a = solver.data.produce(number, n, solver.module.device) if drawn else _rows(solver, plan.source, first, n)
            kept.extend([a] if plan.with_contexts else [])
            if told := tell_nan(nan_in(a), first):
                progress.write(told)
            yield number, a
            progress.update(n)

    whole = solver.all_rows(batches(), plan.tol, plan.batch_size)
    columns = {name: np.asarray(value.cpu().numpy()) for name, value in whole._asdict().items()}
    if kept:
        named = fields(concatenate(kept), "a")
        columns |= {name: leaf.cpu().numpy() for name, leaf in named.items()}
    return columns


def _parts(plan: Plan, shard: int) -> Iterator[tuple[int, int]]:
    """The first context and the number of contexts of each batch of a shard."""
    start = shard * plan.shard_size
    for at in range(0, plan.rows(shard), plan.batch_size):
        yield start + at, min(plan.batch_size, plan.rows(shard) - at)


def described(solver: Solver) -> str:
    """A solver with its settings, as one would write it."""
    names = [name for name in inspect.signature(type(solver)).parameters if hasattr(solver, name)]
    parts = {name: getattr(solver, name) for name in names}
    shown = [f"{name}={described(part) if isinstance(part, Solver) else part!r}" for name, part in parts.items()]
    return re.sub(r" at 0x[0-9a-f]+", "", f"{type(solver).__name__}({', '.join(shown)})")


def source(solver: TrainedSolver, split: Literal["train", "test"]) -> str:
    """Where the contexts come from that are solved: ``drawn``, or of a finite set its ``split``, or a ``file`` for its test."""
    solver._set_up()
    data = solver.data
    if split == "train":
        return "drawn" if data._set("solve") is None else "train"
    if data.predict is not None:
        return "file"
    return "test" if type(data).sample is ContextDataModule.sample else "drawn"


SPLITS = {"train": "solve", "test": "predict", "file": "predict"}
"""Of the data, by a plan's source."""


def size(solver: TrainedSolver, source: str) -> int:
    """How many contexts a finite set has."""
    solver._set_up()
    batches = range(solver.data.num_batches(SPLITS[source]))
    return sum(num_rows(solver.data.batch(SPLITS[source], k)) for k in batches)


def _rows(solver: TrainedSolver, source: str, first: int, n: int) -> Context:
    """Rows of a finite set: of its batches that have them."""
    each = solver.data.eval_batch_size
    batches = [solver.data.batch(SPLITS[source], k) for k in range(first // each, -(-(first + n) // each))]
    return take(concatenate(batches), slice(first % each, first % each + n))


def _names(folder: Path, shard: int) -> tuple[Path, Path]:
    return folder / f"shard-{shard:06d}.npz", folder / f"shard-{shard:06d}.json"


def _done(folder: Path, shard: int, verify: bool) -> bool:
    data, note = _names(folder, shard)
    if not (data.is_file() and note.is_file()):
        return False
    if verify and checkpoint.sha256(data) != json.loads(note.read_text())["sha256"]:
        note.unlink()
    return note.is_file()


def _write(folder: Path, shard: int, columns: dict[str, np.ndarray]) -> None:
    """A shard, then the note that it is done; each reaches the disk before its name does."""
    data, note = _names(folder, shard)
    npz.write(data, columns)
    digest = checkpoint.sha256(data)
    objective, certificate = (columns[name].astype(np.float64) for name in ("objective", "certificate"))
    known = np.isfinite(objective)
    disk.write(
        note,
        json.dumps(
            {
                "sha256": digest,
                "rows": len(objective),
                "finite": int(known.sum()),
                "unlike": int(columns["unlike"].sum()),
                "paths": np.bincount(columns["path"], minlength=len(answer.WORDS)).tolist(),
                "evaluations": int(columns["evaluations"].sum()),
                "objective": float(objective[known].sum()),
                "largest_certificate": _largest(certificate),
            }
        )
        + "\n",
    )


def _largest(certificate: np.ndarray) -> float | None:
    known = certificate[np.isfinite(certificate)]
    return float(known.max()) if len(known) else None


def summary(folder: Path, plan: Plan) -> dict[str, Any]:
    """What became of the contexts of the shards that are done; written to ``summary.json`` once all are."""
    notes = [json.loads(path.read_text()) for path in sorted(folder.glob("shard-*.json"))]
    rows, finite = (sum(note[name] for note in notes) for name in ("rows", "finite"))
    paths = np.sum([note["paths"] for note in notes], 0) if notes else np.zeros(len(answer.WORDS), int)
    largest = [note["largest_certificate"] for note in notes if note["largest_certificate"] is not None]
    found = {
        "shards": len(notes),
        "contexts": rows,
        "finite": finite,
        "unlike": sum(note["unlike"] for note in notes),
        "paths": dict(zip(answer.WORDS.tolist(), map(int, paths), strict=True)),
        "evaluations": sum(note["evaluations"] for note in notes),
        "mean_objective": sum(note["objective"] for note in notes) / finite if finite else None,
        "largest_certificate": max(largest, default=None),
    }
    if len(notes) == plan.shards:
        disk.write(folder / "summary.json", json.dumps(found, indent=2) + "\n")
    return found


def default_device() -> str:
    """The first GPU, or the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"
