"""Metrics in ``metrics.csv``, which a run that is killed and resumed continues."""

from __future__ import annotations

import csv
import io
import math
from argparse import Namespace
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from amortized import disk


class MetricsLogger(Logger):
    """``metrics.csv`` in the run's folder: a line for each logged step, its columns sorted by name.

    Lightning's CSVLogger deletes the file of an earlier run; this one continues it. Lines are appended; the file is written
    anew only when a column is new, or a value comes late, for a step before the last.

    Args:
        folder: of the run.
        drop_from: what the file says of this training step and later ones is dropped, since the run makes them again.
        flush_every: lines between two writes to disk; a checkpoint also writes.
    """

    def __init__(self, folder: str | Path, drop_from: int | None = None, flush_every: int = 100) -> None:
        super().__init__()
        self.path = Path(folder) / "metrics.csv"
        self.flush_every = flush_every
        self._columns: list[str] = []
        self._lines: dict[int, dict[str, Any]] = {}
        """From byte ``_start`` of the file on: its last line, for more may come of that step; and those not yet written."""
        self._start = 0
        self._first: float = math.inf
        """The step of the line at ``_start``; nothing is known of the file before the first writing."""
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
        step = max(self._lines, default=-1) + 1 if step is None else step
        self._lines.setdefault(step, {"step": step}).update({k: v for k, v in metrics.items() if k != "epoch"})
        self._unsaved += 1
        if self._unsaved >= self.flush_every:
            self.save()

    @rank_zero_only
    def save(self) -> None:
        if not self._unsaved:
            return
        names = {name for line in self._lines.values() for name in line}
        if min(self._lines) < self._first or not names <= set(self._columns):
            lines = self._read()
            for step, line in self._lines.items():
                lines.setdefault(step, {}).update(line)
            self._rewrite(lines)
            return
        rows = self._rows(self._lines)
        with self.path.open("r+b") as file:
            file.seek(self._start)
            file.write(b"".join(rows))
            file.truncate()
        self._saved(self._lines, self._start, rows)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self.save()

    def _rewrite(self, lines: dict[int, dict[str, Any]]) -> None:
        """Put these lines in place of the file, whole or not at all."""
        self._columns = ["step", *sorted({name for line in lines.values() for name in line} - {"step"})]
        header = self._rows({-1: {name: name for name in self._columns}})
        rows = self._rows(lines)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = disk.unfinished(self.path)
        unfinished.write_bytes(b"".join(header + rows))
        unfinished.replace(self.path)
        self._saved(lines, len(header[0]), rows)

    def _rows(self, lines: dict[int, dict[str, Any]]) -> list[bytes]:
        def row(line: dict[str, Any]) -> bytes:
            text = io.StringIO()
            csv.DictWriter(text, self._columns).writerow(line)
            return text.getvalue().encode()

        return [row(lines[step]) for step in sorted(lines)]

    def _saved(self, lines: dict[int, dict[str, Any]], start: int, rows: list[bytes]) -> None:
        self._unsaved, self._first = 0, max(lines, default=-1)
        self._lines = {step: line for step, line in lines.items() if step == self._first}
        self._start = start + sum(map(len, rows[:-1]))

    def _read(self) -> dict[int, dict[str, Any]]:
        """The lines of the file by step, but for one that a killed process did not end."""
        if not self.path.is_file():
            return {}
        whole = self.path.read_bytes().rpartition(b"\n")[0].decode()
        lines = csv.DictReader(io.StringIO(whole, newline=""))
        return {int(line["step"]): {k: v for k, v in line.items() if v != ""} for line in lines}

    @rank_zero_only
    def _drop(self, step: int) -> None:
        self._rewrite({at: line for at, line in self._read().items() if at < step})
