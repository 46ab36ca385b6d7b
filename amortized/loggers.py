"""Metrics of a run: a CSV file that survives being killed and resumed, and Weights & Biases one flag away."""

from __future__ import annotations

import csv
import os
from argparse import Namespace
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only


class MetricsLogger(Logger):
    """``metrics.csv`` in the run's folder: a line for each logged step, its columns sorted by name.

    Lightning's CSVLogger deletes the file of an earlier run; this one continues it.

    Args:
        folder: of the run.
        drop_from: what the file says of this training step and later ones is dropped, since the run makes them again.
        flush_every: lines between two writes to disk; a checkpoint also writes.
    """

    def __init__(self, folder: str | Path, drop_from: int | None = None, flush_every: int = 100) -> None:
        super().__init__()
        self.path = Path(folder) / "metrics.csv"
        self.flush_every = flush_every
        self._lines: dict[int, dict[str, Any]] | None = None
        self._unsaved = 0
        if drop_from is not None and self.path.is_file():
            self._drop(drop_from)

    @property
    def name(self) -> str:  # noqa: D102
        return ""

    @property
    def version(self) -> str:  # noqa: D102
        return ""

    @property
    def save_dir(self) -> str:  # noqa: D102
        return str(self.path.parent)

    @property
    def log_dir(self) -> str:  # noqa: D102
        return str(self.path.parent)

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Nothing: the run's ``config.yaml`` is the record."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:  # noqa: D102
        if self._lines is None:
            self._lines = self._read()
        step = len(self._lines) if step is None else step
        self._lines.setdefault(step, {"step": step}).update({k: v for k, v in metrics.items() if k != "epoch"})
        self._unsaved += 1
        if self._unsaved >= self.flush_every:
            self.save()

    @rank_zero_only
    def save(self) -> None:  # noqa: D102
        if not self._unsaved or self._lines is None:
            return
        names = sorted({name for line in self._lines.values() for name in line} - {"step"})
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_name(f".metrics.csv.{os.getpid()}.unfinished")
        with unfinished.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["step", *names])
            writer.writeheader()
            writer.writerows(self._lines[step] for step in sorted(self._lines))
        unfinished.replace(self.path)
        self._unsaved = 0

    @rank_zero_only
    def finalize(self, status: str) -> None:  # noqa: D102
        self.save()

    def _read(self) -> dict[int, dict[str, Any]]:
        if not self.path.is_file():
            return {}
        with self.path.open(newline="") as file:
            return {int(line["step"]): {k: v for k, v in line.items() if v != ""} for line in csv.DictReader(file)}

    @rank_zero_only
    def _drop(self, step: int) -> None:
        lines = self._read()
        self._lines = {at: line for at, line in lines.items() if at < step}
        self._unsaved = 1
        self.save()
        self._lines = None


def wandb_logger(folder: Path, mode: str, recipe: str, config: dict[str, Any]) -> WandbLogger:
    """A logger for one W&B run that a resumed run continues: its id is the name of the run's folder.

    Args:
        folder: of the run; W&B's own files go there.
        mode: ``"offline"`` needs no account; ``"online"`` does.
        recipe: its name, the group of the run.
        config: every setting of the run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{recipe}-{folder.name}"
    return WandbLogger(
        project="amortized", name=name, id=name, group=recipe, save_dir=str(folder), offline=mode == "offline", config=config, resume="allow"
    )


def log_checkpoint(logger: WandbLogger, path: Path) -> None:
    """Log a checkpoint file as an artifact (Lightning's ``log_model`` is refused offline)."""
    import wandb

    artifact = wandb.Artifact(f"checkpoint-{logger.version}", type="model")
    artifact.add_file(str(path))
    logger.experiment.log_artifact(artifact)
