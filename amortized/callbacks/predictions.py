"""``amortized predict``: decoded solutions on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor
from torch.distributions import Distribution


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

    A row for each context, in the order of the contexts, whatever the number of processes.
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
        number = batch_idx * trainer.world_size + trainer.global_rank
        parts = {**arrays(outputs["b"], "b"), **arrays(outputs["objective"], "objective"), **arrays(outputs["decoded"])}
        self._batches.append((number, parts))

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        batches = self._batches
        if trainer.world_size > 1:
            gathered: list[Any] = [None] * trainer.world_size
            torch.distributed.all_gather_object(gathered, batches)
            batches = [batch for process in gathered for batch in process]
        if not trainer.is_global_zero:
            return
        batches.sort(key=lambda batch: batch[0])
        path = Path(trainer.default_root_dir) / "predictions.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        columns: dict[str, Any] = {key: np.concatenate([parts[key] for _, parts in batches]) for key in batches[0][1]}
        np.savez(path, **columns)
        print(f"{sum(len(parts['b']) for _, parts in batches)} solutions written to {path}")
