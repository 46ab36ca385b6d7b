"""``amortized predict``: decoded solutions on disk."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor
from torch.distributions import Distribution

from amortized.module import AmortizedModule


def arrays(decoded: Any, name: str = "decoded") -> dict[str, np.ndarray]:
    """A decoded solution as named arrays: a tensor, a ``NamedTuple`` or dict of tensors, or a distribution's mean and stddev."""
    if isinstance(decoded, Tensor):
        return {
            name: decoded.detach().float().cpu().numpy()
            if decoded.is_floating_point()
            else decoded.detach().cpu().numpy()
        }
    if isinstance(decoded, Distribution):
        return {
            f"{name}.{what}": array for what in ("mean", "stddev") for array in arrays(getattr(decoded, what)).values()
        }
    parts = decoded._asdict() if hasattr(decoded, "_asdict") else decoded
    if not isinstance(parts, dict):
        raise TypeError(
            f"decode must give a tensor, a NamedTuple or dict of them, or a distribution; got {type(decoded).__name__}"
        )
    return {key: array for field, part in parts.items() for key, array in arrays(part, f"{name}.{field}").items()}


class PredictionWriter(Callback):
    """Writes ``predictions.npz`` into the run's folder: ``b``, ``objective`` and what ``decode`` gives.

    A row for each context, in the order of the contexts, whatever the number of processes. A module that writes files of
    its own (:meth:`~amortized.AmortizedModule.save`) does so batch by batch, into ``predictions/``; nothing of a batch is kept
    but the names of the files and their objectives, in ``predictions.csv``.
    """

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._batches: list[tuple[int, dict[str, np.ndarray]]] = []

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
        if type(pl_module).save is AmortizedModule.save:
            parts = {**arrays(outputs["b"], "b"), **arrays(outputs["objective"], "objective")}
            self._batches.append((number, parts | arrays(outputs["decoded"])))
            return
        names = trainer.datamodule.names("predict", number)  # type: ignore[attr-defined]
        folder = Path(trainer.default_root_dir) / "predictions"
        folder.mkdir(parents=True, exist_ok=True)
        files = pl_module.save(outputs["decoded"], [folder / name for name in names])
        self._batches.append(
            (number, {"file": np.array([file.name for file in files]), **arrays(outputs["objective"], "objective")})
        )

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        batches = self._batches
        if trainer.world_size > 1:
            gathered: list[Any] = [None] * trainer.world_size
            torch.distributed.all_gather_object(gathered, batches)
            batches = [batch for process in gathered for batch in process]
        if not trainer.is_global_zero:
            return
        batches.sort(key=lambda batch: batch[0])
        folder = Path(trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        columns: dict[str, Any] = {key: np.concatenate([parts[key] for _, parts in batches]) for key in batches[0][1]}
        count = len(columns["objective"])
        if "file" in columns:
            with (folder / "predictions.csv").open("w", newline="") as table:
                writer = csv.writer(table)
                writer.writerow(columns)
                writer.writerows(zip(*columns.values(), strict=True))
            print(f"{count} predictions written into {folder / 'predictions'}")
            return
        path = folder / "predictions.npz"
        np.savez(path, **columns)
        print(f"{count} solutions written to {path}")
