"""Random objectives: torch's generators, and draws that are common to all evaluations."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from amortized.contract.problem import Problem
from amortized.contract.rows import Context
from amortized.contract.streams import stream_seed


def start_draws(seed: int, device: torch.device) -> None:
    """Start torch's generators of the CPU and of ``device`` from ``seed``.

    ``torch.manual_seed`` also starts those of every other device: it would disturb what draws there, and where CUDA is
    not in use it formats a stack trace for later, which costs a third of a small network's training step.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        torch.cuda.default_generators[index].manual_seed(seed)
    elif device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)


@contextmanager
def draws(seed: int, device: torch.device) -> Iterator[None]:
    """Inside, torch's generators start from ``seed``; afterwards they are as if nothing had been drawn."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices, enabled=True):
        start_draws(seed, device)
        yield


def is_random(problem: Problem, b: Tensor, a: Context) -> bool:
    """Whether the objective draws random numbers: evaluating it moves torch's generator."""
    state = torch.cuda.get_rng_state if b.is_cuda else torch.get_rng_state
    with torch.no_grad(), draws(stream_seed(0, "check", 0), b.device):
        before = state()
        problem.objective(b, a)
        return not torch.equal(before, state())


class CommonDraws:
    """A random objective with its draws fixed (common random numbers): the same seed before every evaluation.

    The draws belong to places in the batch, so the rows of ``b`` and ``a`` must keep their places. In memory ``b`` is put in
    its usual order first: what is drawn like a tensor (``randn_like``) is drawn in the order of that tensor's memory.

    Args:
        problem: with the random objective.
        seed: of the draws; ``None`` draws one from torch's generator.
    """

    def __init__(self, problem: Problem, seed: int | None = None) -> None:
        self.problem = problem
        self.seed = stream_seed(0, "search", int(torch.randint(2**25, ()))) if seed is None else seed

    def objective(self, b: Tensor, a: Context) -> Tensor:
        with draws(self.seed, b.device):
            return self.problem.objective(b.contiguous(), a)

    def __getattr__(self, name: str) -> Any:
        """What else the problem has, under the same draws."""
        if name == "problem":  # not there yet: a copy being made
            raise AttributeError(name)
        attribute = getattr(self.problem, name)
        if not callable(attribute):
            return attribute

        def drawn(b: Tensor, *rest: Any) -> Any:
            with draws(self.seed, b.device):
                return attribute(b.contiguous(), *rest)

        return drawn
