"""How the time of measuring the gap falls with the number of processes.

``python -m benchmarks.sharding [--quick] [--json FILE]``

A test of 2,048 contexts, 20 variables each, in batches of 128, by 1, 2 (and 4, where the machine has the cores) processes of
one thread each: the same batches, dealt out. The value is the median over the turns, in each of which all take their turn, of
the time on k processes over the time on one: of the slowest process, from its first batch to its last row, before they gather.
Both by the clock on the wall, which other work on the machine disturbs, and by the processor's. Starting the processes is left
out: it is a matter of seconds once, not of the solving. All must find the same gap.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import math
import os
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer

from amortized.callbacks import GapMonitor
from benchmarks.gap import Gaussians, Rosenbrock

CONTEXTS, BATCH = 2048, 128


class Stopwatch(GapMonitor):
    """The gap monitor, which logs also what the slowest process took, by both clocks, and the most rows that one solved."""

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clocks."""
        super().on_test_epoch_start(trainer, pl_module)
        self.started = time.perf_counter(), time.process_time()

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop them, before any process waits for another."""
        taken = {  # each the largest of any process
            "wall": time.perf_counter() - self.started[0],
            "processor": time.process_time() - self.started[1],
            "rows": float(len(self.metric.rows().index)),
        }
        pl_module.log_dict(taken, reduce_fx="max", sync_dist=True)
        super().on_test_epoch_end(trainer, pl_module)


def measure(processes: int) -> dict[str, float]:
    """One test, and all that it logged."""
    off = ("logger", "enable_progress_bar", "enable_checkpointing", "enable_model_summary", "use_distributed_sampler")
    trainer = Trainer(
        accelerator="cpu",
        devices=processes,
        strategy="ddp_fork",
        callbacks=[Stopwatch()],
        **dict.fromkeys(off, False),  # type: ignore[arg-type]
    )
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
        (found,) = trainer.test(Rosenbrock(), Gaussians(num_test=CONTEXTS, eval_batch_size=BATCH), verbose=False)
    return dict(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--quick", action="store_true", help="three turns")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in ("pytorch", "fabric"):
        logging.getLogger(f"lightning.{name}").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    several = [k for k in (2, 4) if k <= len(os.sched_getaffinity(0))]
    turns = [{k: measure(k) for k in (1, *several)} for _ in range(3 if options.quick else 7)]
    rows = [row(turns, k, clock) for k in several for clock in ("wall", "processor")]
    for found in rows:
        verdict = "holds" if found["holds"] else "MISSED"
        print(f"{found['id']:48s} {found['value']:.3f}  goal {found['goal']}: {verdict}  {found['detail']}")
    if options.json:
        options.json.write_text(json.dumps({"rows": rows}, indent=2))


def row(turns: list[dict[int, dict[str, float]]], processes: int, clock: str) -> dict[str, Any]:
    """The ratio of one number of processes to one process, by one clock."""
    ratios = sorted(turn[processes][clock] / turn[1][clock] for turn in turns)
    value, goal = statistics.median(ratios), round(1.2 / processes, 3)
    one, shared = turns[-1][1], turns[-1][processes]
    same = all(math.isclose(one[name], shared[name], rel_tol=1e-6) for name in one if name.startswith("test/gap/"))
    got = [result["processor"] / result["wall"] for result in (one, shared)]
    details = (
        f"{len(turns)} turns, {ratios[0]:.3f} to {ratios[-1]:.3f}",
        f"the most rows of a process {shared['rows']:.0f} of {CONTEXTS}",
        f"of a core each process got {got[0]:.0%} alone, {got[1]:.0%} together: under 100% other work held the machine",
        f"gap {one['test/gap/mean']:.4g} on both: {same}",
        f"converged {one['test/gap/converged']:.1%}, lost {one['test/gap/lost']:.1%}",
    )
    return {
        "id": f"gap on {processes} processes over 1, {clock} clock",
        "value": round(value, 4),
        "goal": goal,
        "holds": value <= goal and same,
        "detail": "; ".join(details),
    }


if __name__ == "__main__":
    main()
