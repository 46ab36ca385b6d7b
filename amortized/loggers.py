"""Metrics of a run: a CSV file that survives being killed and resumed, and Weights & Biases one flag away."""

from __future__ import annotations

import csv
import io
import os
import re
import secrets
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from amortized.checkpoint import digest_path


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
    def name(self) -> str:
        return ""

    @property
    def version(self) -> str:
        return ""

    @property
    def save_dir(self) -> str:
        return str(self.path.parent)

    @property
    def log_dir(self) -> str:
        return str(self.path.parent)

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Nothing: the run's ``config.yaml`` is the record."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if self._lines is None:
            self._lines = self._read()
        step = len(self._lines) if step is None else step
        self._lines.setdefault(step, {"step": step}).update({k: v for k, v in metrics.items() if k != "epoch"})
        self._unsaved += 1
        if self._unsaved >= self.flush_every:
            self.save()

    @rank_zero_only
    def save(self) -> None:
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
    def finalize(self, status: str) -> None:
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


class LaunchedWandbLogger(WandbLogger):
    """Ends the W&B run also in a process that the Trainer forked: that exits without writing what is still in memory."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._process = os.getpid()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        super().finalize(status)
        if os.getpid() != self._process:
            finish(self, exit_code=int(status != "success"))


def wandb_logger(folder: Path, mode: str, recipe: str, config: dict[str, Any]) -> WandbLogger:
    """A logger for one W&B run. What resumes in the same folder continues that run: the folder holds its id.

    Args:
        folder: of the run; W&B's own files go there.
        mode: ``"offline"`` needs no account; ``"online"`` does, unless the environment says otherwise (``WANDB_MODE``).
        recipe: its name, the group of the run.
        config: every setting of the run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{recipe}-{folder.resolve().name}"
    return LaunchedWandbLogger(
        project="amortized",
        name=name,
        id=wandb_id(folder) or f"{name}-{secrets.token_hex(4)}",
        group=recipe,
        save_dir=str(folder),
        mode="offline" if mode == "offline" else None,  # Lightning's `offline` would change the environment
        config=config,
        resume="allow",
    )


def wandb_id(folder: Path) -> str | None:
    """The id of the W&B run that a run's folder holds; ``None`` if it holds none."""
    runs = (re.fullmatch(r"(?:offline-)?run-(\d+_\d+)-(.+)", path.name) for path in (folder / "wandb").glob("*run-*"))
    ids = sorted(run.groups() for run in runs if run)
    return ids[-1][1] if ids else None


def log_results(
    logger: WandbLogger,
    found: dict[str, dict[str, Any]],
    pictures: list[Path],
    gap: Tensor,
    report: Path,
    step: int,
) -> None:
    """Log a run's pictures, histogram of the gap and report, and ``results.json`` as its summary: ``gap.mean`` and others."""
    import wandb

    for path in pictures:
        logger.log_image(f"pictures/{path.stem}", [str(path)], step=step)
    media: dict[str, Any] = {"report": wandb.Html(str(report), inject=False)}
    finite = gap[gap.isfinite()].cpu().numpy()
    if len(finite):
        media["test/gap/histogram"] = wandb.Histogram(np_histogram=np.histogram(finite, bins=40))
    logger.log_metrics(media, step)
    logger.experiment.summary.update({f"{group}.{k}": v for group, values in found.items() for k, v in values.items()})


def log_worst(logger: WandbLogger, rows: list[dict[str, float]], portraits: list[Figure | None], step: int) -> None:
    """Log the worst contexts as a table, with a picture of each where the problem draws one."""
    import wandb

    if not rows:
        return
    drawn = any(figure is not None for figure in portraits)
    lines = [
        [*row.values(), *([figure and wandb.Image(_cropped(figure))] if drawn else [])]
        for row, figure in zip(rows, portraits, strict=True)
    ]
    logger.log_table("test/worst", [*rows[0], *(["picture"] if drawn else [])], lines, step=step)


def _cropped(figure: Figure) -> Image.Image:
    """The picture without the panels that nothing is drawn in."""
    for axes in figure.axes:
        axes.set_visible(axes.has_data())
    file = io.BytesIO()
    figure.savefig(file, dpi=120, bbox_inches="tight")
    return Image.open(file)


def log_checkpoint(logger: WandbLogger, path: Path) -> None:
    """Log a checkpoint file, with its SHA-256, as an artifact (Lightning's ``log_model`` is refused offline)."""
    import wandb

    artifact = wandb.Artifact(f"checkpoint-{logger.version}", type="model")
    for file in (path, digest_path(path)):
        artifact.add_file(str(file))
    logger.experiment.log_artifact(artifact)


def finish(logger: WandbLogger, exit_code: int) -> None:
    """End the W&B run, if it began, so that the next run of this process does not go on in it."""
    if logger._experiment is not None:
        logger._experiment.finish(exit_code=exit_code)
        logger._experiment = None
