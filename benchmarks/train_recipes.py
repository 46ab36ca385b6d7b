"""The updates of five recipes, ours eager and compiled, beside bare PyTorch loops and JAX, taking turns in one process.

After each training step of the command line's own Trainer, which makes ten updates, a callback lets every other side make ten: a
bare loop (the recipe's loss, backward, clipping and optimizer, on its contexts), the same with the loss compiled, and the same
work in JAX. So noise of the machine hits all alike; a side's time is the median over its turns. One thread. Compiling is left
out, and said.
"""

from __future__ import annotations

import contextlib
import importlib.util
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from lightning import Callback, Trainer

from benchmarks import train_jax
from benchmarks.train_step import Fit

TOGETHER = 10
"""Updates in a turn."""

REST = 0.1
"""Seconds between turns: XLA's threads look for work for a while, at the expense of who comes next."""


class Goal(NamedTuple):
    """What ours, compiled, must reach, as a ratio of speeds."""

    steps: int
    """Turns of each side."""
    eager: float | None = None
    """Beside the bare loop."""
    compiled: float = 0.95
    """Beside the bare loop with the loss compiled."""
    jax: float | None = None


RECIPES = {
    "sphere": Goal(12, eager=1.3, jax=1.0),
    "vae_digits": Goal(60, eager=1.3, jax=1.0),
    "sinusoid": Goal(40),
    "maml_sinusoid": Goal(20, eager=2.0, jax=1.0),
    "classify_digits": Goal(30),
}


class Turns(Callback):
    """Times ours, and lets the other sides have their turns."""

    rivals: dict[str, Callable[[], Any]]

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {"ours": []}
        self._ended: float | None = None

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        """The others' turns."""
        now = time.perf_counter()
        if self._ended is not None:
            self.seconds["ours"].append(now - self._ended)
        for name, run in self.rivals.items():
            started = time.perf_counter()
            with torch.enable_grad():
                run()
            self.seconds.setdefault(name, []).append(time.perf_counter() - started)
            time.sleep(REST)
        self._ended = time.perf_counter()

    def median(self, name: str) -> float:
        """Seconds of an update."""
        return statistics.median(self.seconds[name][2:]) / TOGETHER


def bare(recipe: str, compile: bool) -> Callable[[], Any]:
    """The plain loop, on a twin of the recipe's module and contexts."""
    made = Fit(
        ["fit", "-c", recipe, "--trainer.max_steps=0", "--run_folder=twin", "--trainer.enable_progress_bar=false"]
    )
    module, data, clip = made.model.train(), made.datamodule, made.trainer.gradient_clip_val
    optimizer = module.optimizer(module.parameters())
    scheduler = None if module.scheduler is None else module.scheduler(optimizer)
    parameters = list(module.parameters())
    loss: Callable[[Any], Any] = lambda a: module.amortized_step(a).mean()  # noqa: E731
    loss = torch.compile(loss, dynamic=False) if compile else loss
    number = 0

    def run() -> None:
        nonlocal number
        for _ in range(TOGETHER):
            a = data.batch("train", number)
            number += 1
            value = loss(a)
            optimizer.zero_grad()
            value.backward()
            if clip is not None:
                torch.nn.utils.clip_grad_norm_(parameters, clip)
            optimizer.step()
        if scheduler is not None:
            scheduler.step()

    return run


def ours(recipe: str, steps: int, compile: bool, rivals: dict[str, Callable[[], Any]]) -> Turns:
    """The command line's training beside those."""
    Turns.rivals = rivals
    args = ["fit", "-c", recipe, f"--trainer.max_steps={steps + 3}", f"--data.init_args.batches_per_step={TOGETHER}"]
    args += [
        f"--model.init_args.compile={compile}",
        "--trainer.val_check_interval=1000000",
        "--trainer.limit_val_batches=0",
    ]
    args += [
        f"--trainer.callbacks+={__name__}.Turns",
        f"--run_folder=ours-{compile}",
        "--trainer.enable_progress_bar=false",
    ]
    callbacks: list[Any] = Fit(args).trainer.callbacks  # type: ignore[attr-defined]
    return next(callback for callback in callbacks if type(callback).__name__ == "Turns")


def rows(quick: bool) -> list[dict[str, Any]]:
    """The table's rows; each is printed when it is known."""
    train_jax.one_thread()
    has_jax = all(importlib.util.find_spec(name) for name in ("jax", "optax"))
    found = []
    for recipe, goal in RECIPES.items():
        steps = 3 if quick else goal.steps
        with contextlib.ExitStack() as stack:
            stack.enter_context(contextlib.chdir(stack.enter_context(tempfile.TemporaryDirectory())))
            stack.enter_context(warnings.catch_warnings(action="ignore"))
            rivals = {"bare": bare(recipe, False)}
            try:
                compiled_loop = bare(recipe, True)
                compiled_loop()
                rivals["bare, compiled"] = compiled_loop
            except RuntimeError as error:  # of second derivatives
                print(f"{recipe}: no bare compiled loop: {str(error).splitlines()[0]}")
            if has_jax and goal.jax is not None:
                rivals["JAX"] = getattr(train_jax, recipe)(TOGETHER)
            eager, compiled = ours(recipe, steps, False, {"bare": rivals["bare"]}), ours(recipe, steps, True, rivals)
        mine = compiled.median("ours")
        print(
            f"{recipe}: ours compiled {1e6 * mine:.0f} us an update, eager {1e6 * eager.median('ours'):.0f}", flush=True
        )
        sides = [("bare", goal.eager), ("bare, compiled", goal.compiled), ("JAX", goal.jax)]
        measured = [
            (name, compiled.median(name) / mine, least, compiled.median(name))
            for name, least in sides
            if name in rivals
        ]
        measured.append(("bare; ours eager", eager.median("bare") / eager.median("ours"), None, eager.median("bare")))
        for name, value, least, seconds in measured:
            holds = None if least is None else value >= least
            detail = f"{1e6 * seconds:.0f} us an update of the other side, {steps} turns of {TOGETHER} updates"
            identity = f"update: {recipe} over {name}"
            found.append({"id": identity, "value": round(value, 4), "goal": least, "holds": holds, "detail": detail})
            verdict = "" if least is None else f"  goal {least}: {'holds' if holds else 'MISSED'}"
            print(f"  over {name:20s} {value:.3f}{verdict:22s}  {detail}", flush=True)
    return found
