"""Weights & Biases: a run, its results, its worst contexts and its checkpoint."""

from __future__ import annotations

import contextlib
import io
import os
import re
import secrets
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from PIL import Image

from amortized.checkpoint import digest_path
from amortized.lightning_private import begun_run, set_run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SECONDS_TO_REACH = 15.0
"""How long a run waits for W&B's server before it logs offline."""


class LaunchedWandbLogger(WandbLogger):
    """A W&B run that never stops the training.

    Where the server is not reached, the run is an offline one, which ``wandb sync`` uploads later; where W&B fails later
    on, it is told once and training goes on without it. The run also ends in a process that the Trainer forked: that
    exits without writing what is still in memory.

    Args:
        settings: for ``wandb.init``.

    Raises:
        MisconfigurationException: where W&B refuses the settings (no account).
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self._settings = settings
        self._process = os.getpid()
        self.failed = False
        """Whether W&B has failed, so that nothing more is logged there."""

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        import wandb

        if (run := begun_run(self)) is not None:
            return run
        try:
            return super().experiment
        except (wandb.errors.UsageError, wandb.errors.AuthenticationError) as error:
            raise MisconfigurationException(f"W&B: {_line(error)} Or log with --wandb offline") from error
        except Exception as error:
            if self._settings["mode"] == "offline":
                _tell_failure(self, error)
                set_run(self, wandb.init(mode="disabled"))
            else:
                folder = self._settings["save_dir"]
                _warn(
                    f"W&B is not reached ({_line(error)}): logged offline; later, wandb sync {folder}/wandb/offline-*"
                )
                name = f"{self._settings['id']}-offline"  # its service holds the first one
                offline = LaunchedWandbLogger(**self._settings | {"mode": "offline", "id": name})
                set_run(self, offline.experiment)
                self.failed = offline.failed
            return begun_run(self)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        attempt(self, super().log_metrics, metrics, step)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        super().finalize(status)
        if os.getpid() != self._process:
            finish(self, exit_code=int(status != "success"))


def attempt(logger: WandbLogger, log: Callable[..., Any], *args: Any) -> None:
    """Call a function that logs to W&B; where it fails, say so once, and log there no more."""
    if getattr(logger, "failed", False):
        return
    try:
        log(*args)
    except MisconfigurationException:
        raise
    except Exception as error:
        _tell_failure(logger, error)


def _tell_failure(logger: WandbLogger, error: Exception) -> None:
    logger.failed = True  # type: ignore[attr-defined]
    _warn(f"W&B failed ({type(error).__name__}: {_line(error)}): the run goes on without it")


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)


def wandb_logger(
    folder: Path, mode: str, recipe: str, config: dict[str, Any], project: str | None = None, entity: str | None = None
) -> LaunchedWandbLogger:
    """A logger for one W&B run. What resumes in the same folder continues that run: the folder holds its id.

    An argument wins over W&B's environment variable (``WANDB_PROJECT``, ``WANDB_ENTITY``, ``WANDB_NAME``,
    ``WANDB_RUN_GROUP``, ``WANDB_TAGS``, ``WANDB_RUN_ID``), that over our default.

    Args:
        folder: of the run; W&B's own files go there.
        mode: ``"offline"`` needs no account; ``"online"`` does, unless the environment says otherwise (``WANDB_MODE``).
        recipe: its name, the group of the run.
        config: every setting of the run.
        project: by default ``amortized``.
        entity: account or team; by default the one that is logged in.
    """
    import wandb

    folder.mkdir(parents=True, exist_ok=True)
    given, name = os.environ.get, f"{recipe}-{folder.resolve().name}"
    return LaunchedWandbLogger(
        project=project or given("WANDB_PROJECT") or "amortized",
        entity=entity or given("WANDB_ENTITY") or None,
        name=given("WANDB_NAME") or name,
        id=wandb_id(folder) or given("WANDB_RUN_ID") or f"{name}-{secrets.token_hex(4)}",
        group=given("WANDB_RUN_GROUP") or recipe,
        save_dir=str(folder),
        mode="offline" if mode == "offline" else None,  # Lightning's `offline` would change the environment
        config=config,
        resume="allow",
        settings=wandb.Settings(init_timeout=float(given("WANDB_INIT_TIMEOUT") or SECONDS_TO_REACH)),
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
    histogram: tuple[np.ndarray, np.ndarray] | None,
    report: Path,
    step: int,
) -> None:
    """Log a run's pictures, histogram of the gap and report, and ``results.json`` as its summary: ``gap.mean`` and others."""
    import wandb

    for path in pictures:
        logger.log_image(f"pictures/{path.stem}", [str(path)], step=step)
    media: dict[str, Any] = {"report": wandb.Html(str(report), inject=False)}
    if histogram is not None:
        media["test/gap/histogram"] = wandb.Histogram(np_histogram=histogram)
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
    run = begun_run(logger)
    set_run(logger, None)
    if run is not None:
        attempt(logger, run.finish, exit_code)
    if getattr(logger, "failed", False):
        import wandb

        with contextlib.suppress(Exception):
            wandb.teardown()  # which would fail at the interpreter's end, with a traceback
