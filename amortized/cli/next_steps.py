"""What one does after a run: told at its end."""

from __future__ import annotations

from pathlib import Path


def next_steps(folder: Path) -> str:
    """The commands that go on from a trained model, for the run in ``folder``."""
    return "\n".join(
        [
            f"next: {folder / 'report.html'} shows it all in a browser",
            f"      amortized predict -c {folder / 'config.yaml'} --data.predict FILE     for contexts of yours",
        ]
    )
