"""``amortized predict``: decoded solutions on disk."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.distributions import Distribution

from amortized import disk, npz
from amortized.callbacks.parts import Parts, Table, joined
from amortized.contexts.data_module import ContextDataModule
from amortized.contexts.files import nan_in
from amortized.contract import ProblemError, feasibility_tol, of_every_process
from amortized.module import AmortizedModule


def arrays(decoded: Any, name: str = "decoded") -> dict[str, np.ndarray]:
    """A decoded solution as named arrays: a tensor, a ``NamedTuple`` or dict of tensors, or a distribution's mean and stddev."""
    if isinstance(decoded, Tensor):
        known = decoded.float() if decoded.dtype == torch.bfloat16 else decoded  # to numpy
        return {name: known.detach().cpu().numpy()}
    if isinstance(decoded, Distribution):
        return {
            f"{name}.{what}": array for what in ("mean", "stddev") for array in arrays(getattr(decoded, what)).values()
        }
    if decoded is None:
        return {}
    parts = decoded._asdict() if hasattr(decoded, "_asdict") else decoded
    if not isinstance(parts, dict):
        raise TypeError(
            f"decode must give a tensor, a NamedTuple or dict of them, or a distribution; got {type(decoded).__name__}"
        )
    return {key: array for field, part in parts.items() for key, array in arrays(part, f"{name}.{field}").items()}


class PredictionWriter(Callback):
    """Writes ``predictions.npz`` into the run's folder: ``name``, ``b``, ``objective`` and what ``decode`` gives.

    A row for each context, in the order of the contexts, whatever the number of processes; ``name`` is what
    :meth:`~amortized.ContextDataModule.names` calls it, by default its number. Of a row that is not finite what
    is decoded is NaN; how many there are, and what is NaN in their contexts, is said in a warning.

    Rows are written part by part into ``predictions.parts``, a part after some batches, whole or not at all, and put together
    at the end: no more than a part is ever in memory. A command that was killed goes on, when it is given again, after the
    parts that are done, on any number of processes; parts of other weights, settings or contexts are made anew.

    A module that writes files of its own (:meth:`~amortized.AmortizedModule.save`) does so batch by batch, into
    ``predictions/``, and ``predictions.csv`` has the names of the files and their objectives. Of a row that is not finite no
    file is written.

    Args:
        contexts: write the contexts as well: ``a``, or ``a.FIELD`` of each field.

    Raises:
        ProblemError: if contexts are asked for of a module that writes files of its own.
    """

    def __init__(self, contexts: bool = False) -> None:
        self.contexts = contexts
        self.plan: dict[str, Any] | None = None
        """What the predictions depend on: given to a later command with the same plan, parts that are done stay."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Deal the parts that are not done to the processes."""
        if stage != "predict":
            return
        assert isinstance(pl_module, AmortizedModule)
        self._saves = type(pl_module).save is not AmortizedModule.save
        if self._saves and self.contexts:
            raise ProblemError(
                f"predictions.contexts: {type(pl_module).__name__} writes each prediction as a file, whose name says of which "
                "context it is, and no predictions.npz that contexts could be in"
            )
        # Processes that were launched apart may have chosen folders of their own.
        self._folder = Path(trainer.strategy.broadcast(trainer.default_root_dir))
        folder = self._folder / "predictions.parts"
        data = trainer.datamodule  # type: ignore[attr-defined]
        self._rows: list[dict[str, np.ndarray]] = []
        self._made: list[int] = []
        self._batches: list[int] | None = None
        """Numbers of the batches of this process; ``None``: the loader is the user's own, or ends before its last batch."""
        if not _all_batches(trainer):
            self._parts = Parts(folder)
            if trainer.is_global_zero:
                self._parts.begin()
            trainer.strategy.barrier("predictions.parts")
            return
        plan = None if self.plan is None else self.plan | {"contexts": self.contexts, "device": _device(trainer)}
        self._parts = Parts(folder, plan, data.num_batches("predict"))
        done = trainer.strategy.broadcast(self._parts.begin() if trainer.is_global_zero else [])
        if done and trainer.is_global_zero:
            print(f"goes on: {len(done)} of {len(self._parts.all())} parts of the predictions are done")
        left = sorted({*self._parts.all()} - {*done})[trainer.global_rank :: trainer.world_size]
        self._batches = data.predict_batches = [batch for part in left for batch in self._parts.batches_of(part)]

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        assert isinstance(pl_module, AmortizedModule)
        finite = arrays(outputs["finite"], "finite")
        if not len(finite["finite"]):  # of a process with nothing to do
            return
        known = self._batches
        number = batch_idx * trainer.world_size + trainer.global_rank if known is None else known[batch_idx]
        data = trainer.datamodule  # type: ignore[attr-defined]
        names = np.array(data.names("predict", number), str) if isinstance(data, ContextDataModule) else None
        objective = arrays(outputs["objective"], "objective")
        objective |= arrays(outputs["violation"], "violation") if "violation" in outputs else {}
        if self._saves:
            assert names is not None
            columns = {"file": self._save(pl_module, outputs["decoded"], names, finite["finite"])} | objective
        else:
            columns = {} if names is None else {"name": names}
            columns |= arrays(outputs["b"], "b") | objective
            columns |= {k: filled(v, finite["finite"]) for k, v in arrays(outputs["decoded"]).items()}
            columns |= arrays(batch, "a") if self.contexts else {}
        self._rows.append(columns | finite | {"why": nan_in(batch)})
        part = number // self._parts.size
        if number == self._parts.batches_of(part)[-1]:
            self._parts.write(part, self._rows)
            self._made.append(part)
            self._rows = []

    def _save(self, module: AmortizedModule, decoded: Any, names: np.ndarray, finite: np.ndarray) -> np.ndarray:
        """The names of the files that the module writes, empty for a row that is not finite."""
        folder = self._folder / "predictions"
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / name for name in names[finite]]
        written = iter(module.save(decoded, paths) if paths else [])
        return np.array([next(written).name if known else "" for known in finite])

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._batches is not None:
            trainer.datamodule.predict_batches = None  # type: ignore[attr-defined]
        made = [part for of_one in of_every_process(self._made, trainer.world_size) for part in of_one]
        if not trainer.is_global_zero:
            return
        tables = self._parts.read(sorted(made) if self._batches is None else self._parts.all())
        columns = joined(tables)
        rows = columns.pop("finite").shape[0]
        del columns["why"]
        if self._saves:
            path = self._folder / "predictions"
            with disk.whole(self._folder / "predictions.csv") as unfinished, unfinished.open("w", newline="") as file:
                writer = csv.writer(file)
                writer.writerow(columns)
                for pieces in zip(*(column.pieces for column in columns.values()), strict=True):
                    writer.writerows(zip(*pieces, strict=True))
        else:
            path = self._folder / "predictions.npz"
            npz.write(path, columns)
        bad = _Told(tables, lambda table: ~table["finite"])
        if self._saves:
            print(f"{rows - bad.count} predictions written into {path}")
        else:
            print(f"{rows} solutions written to {path}")
        bad.tell("not finite")
        if "violation" in columns:
            assert isinstance(pl_module, AmortizedModule)
            tol = feasibility_tol(pl_module)
            broken = _Told(tables, lambda table: table["finite"] & ~(table["violation"] <= tol))
            broken.tell(f"not feasible within {tol:g}")
        self._parts.end()


def _all_batches(trainer: Trainer) -> bool:
    """Whether every batch of a data module of ours is predicted for."""
    data, limit = trainer.datamodule, trainer.limit_predict_batches  # type: ignore[attr-defined]
    ours = isinstance(data, ContextDataModule) and (
        type(data).predict_dataloader is ContextDataModule.predict_dataloader
    )
    return ours and isinstance(limit, float) and limit == 1.0


def _device(trainer: Trainer) -> str:
    """Its kind: on another, the last digits are others."""
    return trainer.strategy.root_device.type


class _Told:
    """Of how many rows something holds, and of which first; with what is NaN in their contexts."""

    def __init__(self, tables: Iterable[Table], holds: Callable[[Table], np.ndarray]) -> None:
        self.rows = self.count = 0
        self.first: list[str] = []
        for table in tables:
            which = holds(table)
            found = np.flatnonzero(which)
            for row in found[: 10 - len(self.first)].tolist():
                why = table["why"][row]
                self.first.append(f"{self.rows + row}" + (f" ({why})" if why else ""))
            self.rows, self.count = self.rows + len(which), self.count + len(found)

    def tell(self, what: str) -> None:
        """Say so, if there are any."""
        if self.count:
            named = ", ".join(self.first) + (", ..." if self.count > len(self.first) else "")
            verb = "is" if self.count == 1 else "are"
            rank_zero_warn(f"{self.count} of {self.rows} {verb} {what}: row {named}")


def filled(rows: np.ndarray, given: np.ndarray) -> np.ndarray:
    """The ``given`` rows, in their places, and NaN in the others; integers become floats for it."""
    if given.all() and len(rows) == len(given):
        return rows
    filled = np.full((len(given), *rows.shape[1:]), np.nan, np.result_type(rows, np.float32))
    filled[given] = rows
    return filled
