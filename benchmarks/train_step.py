"""A training step by the command line's own Trainer beside the same step in a bare PyTorch loop.

``python -m benchmarks.train_step [--quick] [--json FILE]``

After every training step of Lightning a callback makes one bare step of a twin (same network, optimizer, objective and
batch size, contexts drawn from one generator), so noise of the machine hits both sides alike. The value of a row is the
speed ratio bare / ours, its time summed over blocks that hold one of everything a run does now and then (log lines,
refreshes of the progress bar, one checkpoint), median over the blocks after the first. One thread. Then the updates of five
recipes, compiled too: see :mod:`benchmarks.train_recipes`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn

from amortized import AmortizedModule, ContextDataModule
from amortized.cli.app import AmortizedCLI
from amortized.networks import MLP

DIM, HIDDEN, BATCH = 20, 128, 1024
BLOCK = 500
"""Training steps in a block: the command line's interval between checkpoints."""


def rosenbrock(b: Tensor, a: Tensor) -> Tensor:
    """Shifted Rosenbrock functions, one for each row."""
    return (10 * (b[:, 1::2] - b[:, 0::2] ** 2) ** 2 + (a[:, 0::2] - b[:, 0::2]) ** 2).sum(1)


class Rosenbrock(AmortizedModule):
    """The problem of both sides."""

    def __init__(self, fused: bool = False) -> None:
        torch.manual_seed(0)
        super().__init__(
            MLP(DIM, DIM, [HIDDEN, HIDDEN]),
            optimizer=lambda parameters: torch.optim.Adam(parameters, 1e-3, fused=fused),
        )
        self.fused = fused

    def objective(self, b: Tensor, a: Tensor) -> Tensor:
        """``L(b; a)``."""
        return rosenbrock(b, a)


class Gaussians(ContextDataModule):
    """``a ~ N(0, I)``."""

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """Drawn on the training device."""
        return torch.randn(n, DIM, generator=generator, device=generator.device)


class Bare:
    """The plain loop."""

    def __init__(self, fused: bool) -> None:
        torch.manual_seed(0)
        layers = nn.Linear(DIM, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, DIM)
        self.network = nn.Sequential(*layers)
        self.optimizer = torch.optim.Adam(self.network.parameters(), 1e-3, fused=fused)
        self.generator = torch.Generator().manual_seed(0)

    def step(self) -> None:
        """One update."""
        a = torch.randn(BATCH, DIM, generator=self.generator)
        loss = rosenbrock(self.network(a), a).mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


class Twin(Callback):
    """Makes as many bare updates after each training step as that made, and times both."""

    def __init__(self) -> None:
        self.ours: list[float] = []
        self.bare: list[float] = []
        self._ended: float | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A fresh twin."""
        assert isinstance(pl_module, Rosenbrock)
        assert pl_module.device.type == "cpu", "these clocks do not wait for a device"
        self.twin = Bare(pl_module.fused)
        self.updates = trainer.datamodule.batches_per_step  # type: ignore[attr-defined]

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        """The bare side's turn."""
        started = time.perf_counter()
        with torch.enable_grad():
            for _ in range(self.updates):
                self.twin.step()
        ended = time.perf_counter()
        if self._ended is not None:
            self.ours.append(started - self._ended)
            self.bare.append(ended - started)
        self._ended = time.perf_counter()


class Fit(AmortizedCLI):
    """``amortized fit`` without the test at its end."""

    def after_fit(self) -> None:
        """Nothing."""


def recommended(steps: int, updates: int, fused: bool) -> Twin:
    """The trainer of the command line."""
    args = ["fit", "--model=benchmarks.train_step.Rosenbrock", f"--model.fused={fused}"]
    args += [
        "--data=benchmarks.train_step.Gaussians",
        f"--data.batch_size={BATCH}",
        f"--data.batches_per_step={updates}",
    ]
    args += [
        f"--trainer.max_steps={steps}",
        "--trainer.val_check_interval=1000000",
        "--trainer.check_val_every_n_epoch=null",
    ]
    args += [f"--checkpoint.every_n_steps={min(BLOCK, steps)}", "--trainer.accelerator=cpu"]
    args += ["--trainer.callbacks+=benchmarks.train_step.Twin", "--run_folder=run"]
    callbacks: list[Any] = Fit(args).trainer.callbacks  # type: ignore[attr-defined]
    return next(callback for callback in callbacks if type(callback).__name__ == "Twin")


def minimal(steps: int, updates: int, fused: bool) -> Twin:
    """No logger, progress bar or checkpoints."""
    off = ("logger", "enable_progress_bar", "enable_checkpointing", "enable_model_summary", "use_distributed_sampler")
    twin = Twin()
    trainer = Trainer(
        max_steps=steps, accelerator="cpu", limit_val_batches=0, callbacks=[twin], **dict.fromkeys(off, False)
    )
    trainer.fit(Rosenbrock(fused), Gaussians(batch_size=BATCH, batches_per_step=updates))
    return twin


def measure(settings: Any, blocks: int, size: int, updates: int = 1, fused: bool = False) -> tuple[float, str]:
    """The speed ratio, and in words what it rests on."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.chdir(stack.enter_context(tempfile.TemporaryDirectory())))
        nowhere = stack.enter_context(Path(os.devnull).open("w"))
        stack.enter_context(contextlib.redirect_stdout(nowhere))
        stack.enter_context(contextlib.redirect_stderr(nowhere))
        stack.enter_context(warnings.catch_warnings(action="ignore"))
        twin = settings(size * (blocks + 1) + 1, updates, fused)
    sums = [[sum(times[k * size :][:size]) for k in range(1, blocks + 1)] for times in (twin.bare, twin.ours)]
    ratios = sorted(b / o for b, o in zip(*sums, strict=True))
    bare, ours = (statistics.median(times[size:]) / updates for times in (twin.bare, twin.ours))
    words = f"{blocks} blocks of {size} steps, {ratios[0]:.3f} to {ratios[-1]:.3f}; median step alone {bare / ours:.3f}"
    return statistics.median(ratios), f"{words}, {1e6 * (ours - bare):+.0f} us an update"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--quick", action="store_true", help="short blocks, three of them: to see that it runs")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    blocks, size = (3, 50) if options.quick else (5, BLOCK)
    rows = []
    for name, goal, settings, extra in [
        ("recommended", 0.85, recommended, {}),
        ("recommended, batches_per_step=10", 0.95, recommended, {"updates": 10}),
        ("recommended, fused Adam on both sides", None, recommended, {"fused": True}),
        ("minimal", None, minimal, {}),
        ("minimal, batches_per_step=10", None, minimal, {"updates": 10}),
    ]:
        length = max(size // extra.get("updates", 1), 20)
        value, detail = measure(settings, blocks, length, **extra)
        holds = None if goal is None else value >= goal
        rows.append(
            {"id": f"train step: {name}", "value": round(value, 4), "goal": goal, "holds": holds, "detail": detail}
        )
        verdict = "" if goal is None else f"  goal {goal}: {'holds' if holds else 'MISSED'}"
        print(f"{name:40s} {value:.3f}{verdict:22s}  {detail}", flush=True)
    from benchmarks.train_recipes import rows as of_recipes

    rows += of_recipes(options.quick)
    if options.json:
        options.json.write_text(json.dumps({"rows": rows}, indent=2))


if __name__ == "__main__":
    main()
