"""``amortized predict``: decoded solutions on disk."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.distributions import Distribution

from amortized.contexts.data_module import ContextDataModule
from amortized.contract import ProblemError, feasibility_tol
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
    is decoded is NaN; how many there are is said in a warning.

    A module that writes files of its own (:meth:`~amortized.AmortizedModule.save`) does so batch by batch, into
    ``predictions/``; nothing of a batch is kept but the names of the files and their objectives, in ``predictions.csv``. Of
    a row that is not finite no file is written.

    Args:
        contexts: write the contexts as well: ``a``, or ``a.FIELD`` of each field.

    Raises:
        ProblemError: if contexts are asked for of a module that writes files of its own.
    """

    def __init__(self, contexts: bool = False) -> None:
        self.contexts = contexts

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, AmortizedModule)
        self._batches: list[tuple[int, dict[str, np.ndarray]]] = []
        # Processes that were launched apart may have chosen folders of their own.
        self._folder = Path(trainer.strategy.broadcast(trainer.default_root_dir))
        self._saves = type(pl_module).save is not AmortizedModule.save
        if self._saves and self.contexts:
            raise ProblemError(
                f"predictions.contexts: {type(pl_module).__name__} writes each prediction as a file, whose name says of which "
                "context it is, and no predictions.npz that contexts could be in"
            )

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
        number = batch_idx * trainer.world_size + trainer.global_rank
        data = trainer.datamodule  # type: ignore[attr-defined]
        names = np.array(data.names("predict", number), str) if isinstance(data, ContextDataModule) else None
        finite = arrays(outputs["finite"], "finite")
        objective = arrays(outputs["objective"], "objective")
        objective |= arrays(outputs["violation"], "violation") if "violation" in outputs else {}
        if self._saves:
            assert names is not None
            folder = self._folder / "predictions"
            folder.mkdir(parents=True, exist_ok=True)
            known = finite["finite"]
            paths = [folder / name for name in names[known]]
            files = pl_module.save(outputs["decoded"], paths) if paths else []
            file = np.full(len(names), "", object)
            file[known] = [path.name for path in files]
            columns = {"file": file} | objective
        else:
            columns = {} if names is None else {"name": names}
            columns |= arrays(outputs["b"], "b") | objective
            columns |= {k: filled(v, finite["finite"]) for k, v in arrays(outputs["decoded"]).items()}
            columns |= arrays(batch, "a") if self.contexts else {}
        self._batches.append((number, columns | finite))

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        batches = self._batches
        if trainer.world_size > 1:
            gathered: list[Any] | None = [None] * trainer.world_size if trainer.is_global_zero else None
            torch.distributed.gather_object(batches, gathered)
            batches = [batch for process in gathered or [] for batch in process]
        if not trainer.is_global_zero:
            return
        batches.sort(key=lambda batch: batch[0])
        self._folder.mkdir(parents=True, exist_ok=True)
        columns = _concatenated([parts for _, parts in batches])
        finite = columns.pop("finite")
        if self._saves:
            with (self._folder / "predictions.csv").open("w", newline="") as table:
                writer = csv.writer(table)
                writer.writerow(columns)
                writer.writerows(zip(*columns.values(), strict=True))
            print(f"{finite.sum()} predictions written into {self._folder / 'predictions'}")
        else:
            path = self._folder / "predictions.npz"
            np.savez(path, **columns)
            print(f"{len(finite)} solutions written to {path}")
        assert isinstance(pl_module, AmortizedModule)
        _tell_rows(~finite, "not finite")
        if "violation" in columns:
            tol = feasibility_tol(pl_module)
            _tell_rows(finite & ~(columns["violation"] <= tol), f"not feasible within {tol:g}")


def _concatenated(batches: list[dict[str, np.ndarray]]) -> dict[str, Any]:
    """All rows of each column, NaN in those of a batch of which nothing was decoded."""
    known = {key: column for parts in batches for key, column in parts.items()}
    full = max(batches, key=len)
    for parts in batches:
        none = np.zeros(len(parts["finite"]), bool)
        parts |= {key: filled(column[:0], none) for key, column in known.items() if key not in parts}
    return {key: np.concatenate([parts[key] for parts in batches]) for key in full}


def _tell_rows(which: np.ndarray, what: str) -> None:
    """Say of how many rows something holds, and of which."""
    if rows := np.flatnonzero(which).tolist():
        named = ", ".join(map(str, rows[:10])) + (", ..." if len(rows) > 10 else "")
        rank_zero_warn(f"{len(rows)} of {len(which)} {'is' if len(rows) == 1 else 'are'} {what}: row {named}")


def filled(rows: np.ndarray, given: np.ndarray) -> np.ndarray:
    """The ``given`` rows, in their places, and NaN in the others; integers become floats for it."""
    if given.all() and len(rows) == len(given):
        return rows
    filled = np.full((len(given), *rows.shape[1:]), np.nan, np.result_type(rows, np.float32))
    filled[given] = rows
    return filled
