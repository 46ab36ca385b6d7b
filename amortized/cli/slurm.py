"""SLURM: a job that goes back into the queue."""

from __future__ import annotations

import os
import subprocess
import sys


def requeue() -> None:
    """Put this SLURM job back into the queue; there the same command goes on from the checkpoint."""
    array, job = (os.environ.get(name) for name in ("SLURM_ARRAY_JOB_ID", "SLURM_JOB_ID"))
    job = f"{array}_{os.environ.get('SLURM_ARRAY_TASK_ID')}" if array else job
    if not job:
        return
    try:
        subprocess.run(["scontrol", "requeue", job], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"job {job} could not be put back into the queue: {error}", file=sys.stderr)
    else:
        print(f"job {job} is back in the queue")
